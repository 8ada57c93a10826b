"""Forward passes over held-out text that record who goes where."""

import contextlib
import math
import sys
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moe_jax import compat
from moe_jax.config import Config, ModelConfig
from moe_jax.config.blocks import RETRIEVING, distinct_layers
from moe_jax.data.pipeline import EvaluationSet
from moe_jax.layers.block import mixes_slots
from moe_jax.models.losses import per_token_cross_entropy
from moe_jax.models.places import by_layer, places
from moe_jax.parallel.rules import local_rows, put_batch
from moe_jax.train.restore import LoadedRun

# Of the matrices of one batch, all layers together.
_BATCH_BYTES = 2**28


class Choices(NamedTuple):
    """What one layer did with T tokens, over N = E + V columns.

    packed: uint8 [T, ceil(N / 8)], the sets of experts as bits. first: int32 [T], the expert with the largest gate; -1: none.
    gates: {source: float32 [P, N]} of the passages. sums: the layer's statistics, summed, float64.
    """

    packed: np.ndarray
    columns: int
    first: np.ndarray
    gates: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]

    def chosen(self) -> np.ndarray:
        """bool [T, N]."""
        return np.unpackbits(self.packed, axis=1, count=self.columns).astype(bool)


class Observed(NamedTuple):
    """A model's choices on some held-out text.

    ids, sources: int32 [T], each token and the index of its source in `names`. positions, rows: int32 [T], its place in its
    document, and the number of its row. nats: float32 [T], of the prediction after it. passages: {source: int32 [P]}, ids.
    scores: {source: {tokens, loss in nats per token, bits_per_byte}}. layers: by name, in order of depth. batch: rows x length
    that went through the model at once. dense: the layers whose routers' matrices are dense, so that the largest entry stands
    for the choice. retrieved: of the layers that retrieve one-neuron experts, the statistics summed, float64, with `mass` [N].
    """

    names: tuple[str, ...]
    ids: np.ndarray
    sources: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    nats: np.ndarray
    passages: dict[str, np.ndarray]
    scores: dict[str, dict[str, float]]
    layers: dict[str, Choices]
    batch: tuple[int, int]
    dense: frozenset[str]
    retrieved: dict[str, dict[str, np.ndarray]]


def column_names(config: ModelConfig) -> dict[str, list[str]]:
    """For each routed layer what to call its E experts and, after them, the virtual ones."""
    names = {}
    for place in places(config, "routed"):
        moe = place.ffn.moe
        kinds = (("zero", moe.zero_experts), ("copy", moe.copy_experts), ("constant", moe.constant_experts))
        virtual = [f"{kind} {i}" if count > 1 else kind for kind, count in kinds for i in range(count)]
        names[place.name] = [str(e) for e in range(moe.experts)] + virtual
    return names


def dense_layers(config: ModelConfig, vocab_size: int) -> frozenset[str]:
    """The routed layers whose routers mix slots, so that every token has a weight for every expert."""
    mixed = {ffn.name for ffn in distinct_layers(config, "routed") if mixes_slots(ffn, config.width, vocab_size)}
    return frozenset(place.name for place in places(config, "routed") if place.ffn.name in mixed)


def routed_layers(config: ModelConfig) -> list[str]:
    """The layers with experts as `by_layer` names them, in the order in which a token meets them."""
    return [place.name for place in places(config, "routed")]


def batch_rows(config: Config, mesh, tokens: int) -> int:
    """Rows of a batch: at most the run's, few enough for `tokens` and the memory, a multiple of the shards."""
    length = config.data.sequence_length
    row_bytes = 4 * length * max(sum(map(len, column_names(config.model).values())), 1)
    rows = min(config.data.batch_size, max(tokens // length, 1), max(_BATCH_BYTES // row_bytes, 1))
    shards = compat.axis_size(mesh, *compat.BATCH_AXES)
    return max(rows // shards, 1) * shards


def make_recording_step(model: nn.Module):
    """A jitted function (variables, batch) -> {"nats": [B, S], "layers": statistics by layer with `matrix` or `mass`}."""
    config = model.config

    @jax.jit
    def step(variables, batch):
        out = model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"], record=True)
        nats = per_token_cross_entropy(
            out.x, out.table, batch["targets"], chunk=config.loss_chunk, dtype=jnp.dtype(config.dtype)
        )
        layers = {name: sums for name, sums in by_layer(out.stats, config).items() if "matrix" in sums or "mass" in sums}
        result = {"nats": nats, "layers": layers}
        return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, compat.PartitionSpec()), result)

    return step


def observe(
    run: LoadedRun, sets: dict[str, EvaluationSet], tokens: int, passage: int, *, label: str = "", step=None
) -> Observed:
    """Runs at most about `tokens` tokens of each set, in whole batches spread evenly over it.

    Args:
      run: the model.
      sets: held-out text by source.
      tokens: of each source; one batch is always taken.
      passage: tokens of each source whose gates are kept.
      label: of the progress bar.
      step: from `make_recording_step`; None: compiles one.
    """
    step = step or make_recording_step(run.model)
    rows, length = batch_rows(run.config, run.mesh, tokens), run.config.data.sequence_length
    limit = max(tokens // (rows * length), 1)
    counts = {name: min(limit, -(-one.rows // rows)) for name, one in sets.items()}
    dense = dense_layers(run.config.model, run.tokenizer.vocab_size)
    recorder = _Recorder(run, passage, dense)
    hidden = jax.process_index() != 0
    pause = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
    bar = tqdm(total=sum(counts.values()), desc=label, unit="batch", disable=hidden, mininterval=pause, delay=1)
    with jax.set_mesh(run.mesh), contextlib.closing(bar):
        for name, evaluation_set in sets.items():
            for i, batch in enumerate(evaluation_set.batches(rows, limit)):
                local_batch = {key: array[local_rows(run.mesh, rows)] for key, array in batch.items()}
                result = jax.device_get(step(run.variables, put_batch(local_batch, run.mesh, rows)))
                recorder.add(name, batch, result, keep=i == counts[name] // 2)
                bar.update()
    return recorder.result((rows, length))


class _Recorder:
    """Adds up batches; keeps a bit for a token and expert, and gates only of the passages."""

    def __init__(self, run: LoadedRun, passage: int, dense: frozenset[str]):
        self.run, self.passage, self.dense = run, passage, dense
        self.ids, self.sources, self.positions, self.rows, self.nats = [], [], [], [], []
        self.passages, self.totals, self.rows_seen = {}, {}, 0
        self.layers: dict[str, dict[str, Any]] = {}
        self.retrieved: dict[str, dict[str, np.ndarray]] = {}

    def add(self, name: str, batch: dict, result: dict, keep: bool) -> None:
        """`batch` and the step's `result`, on the host; keep: take the source's passage from it."""
        valid = batch["segment_ids"].reshape(-1) > 0
        self.ids.append(batch["tokens"].reshape(-1)[valid])
        total = self.totals.setdefault(name, {"nats": 0.0, "tokens": 0.0, "bytes": 0.0})
        weights = batch["loss_weights"]
        total["nats"] += float(np.sum(np.where(weights > 0, result["nats"], 0), dtype=np.float64))
        total["tokens"] += float(weights.sum())
        total["bytes"] += float((self.run.tokenizer.token_bytes[batch["targets"]] * weights).sum())
        self.sources.append(np.full(valid.sum(), len(self.totals) - 1, np.int32))
        self.positions.append(batch["positions"].reshape(-1)[valid])
        count, length = batch["tokens"].shape
        self.rows.append(np.repeat(np.arange(self.rows_seen, self.rows_seen + count, dtype=np.int32), length)[valid])
        self.rows_seen += count
        self.nats.append(np.asarray(result["nats"], np.float32).reshape(-1)[valid])
        if keep:
            self.passages[name] = self.ids[-1][: self.passage]
        for layer, stats in result["layers"].items():
            stats = dict(stats)
            if "matrix" not in stats:
                stats = jax.tree.map(lambda a: np.asarray(a, np.float64), stats)
                self.retrieved[layer] = _added(self.retrieved.get(layer), stats)
                continue
            matrix = stats.pop("matrix")[valid]
            record = self.layers.setdefault(layer, {"packed": [], "first": [], "gates": {}, "sums": None})
            first = np.where(matrix.any(axis=1), matrix.argmax(axis=1), -1).astype(np.int32)
            chosen = matrix != 0
            if layer in self.dense:
                chosen = first[:, None] == np.arange(matrix.shape[1])
            record["packed"].append(np.packbits(chosen, axis=1))
            record["first"].append(first)
            record["columns"] = matrix.shape[1]
            if keep:
                record["gates"][name] = matrix[: self.passage].copy()
            stats = jax.tree.map(lambda a: np.asarray(a, np.float64), stats)
            record["sums"] = _added(record["sums"], stats)

    def result(self, batch: tuple[int, int]) -> Observed:
        """Everything that was added."""
        layers = {
            layer: Choices(
                np.concatenate(self.layers[layer]["packed"]),
                self.layers[layer]["columns"],
                np.concatenate(self.layers[layer]["first"]),
                self.layers[layer]["gates"],
                self.layers[layer]["sums"],
            )
            for layer in routed_layers(self.run.config.model)
        }
        scores = {
            name: {
                "tokens": total["tokens"],
                "loss": total["nats"] / max(total["tokens"], 1),
                "bits_per_byte": total["nats"] / math.log(2) / max(total["bytes"], 1),
            }
            for name, total in self.totals.items()
        }
        return Observed(
            tuple(self.totals),
            np.concatenate(self.ids),
            *(np.concatenate(one) for one in (self.sources, self.positions, self.rows, self.nats)),
            self.passages,
            scores,
            layers,
            batch,
            self.dense,
            {name: self.retrieved[name] for name in (place.name for place in places(self.run.config.model, *RETRIEVING))},
        )


def _added(total: Any, new: Any) -> Any:
    return new if total is None else jax.tree.map(np.add, total, new)
