"""The experts of the same held-out tokens again and again while a run goes on, in one small file beside its metrics.

How long routing fluctuates is StableMoE's question (arXiv:2204.08396, section 4.4): for each token the last time at which its
expert was not yet the one that it has at the end.
"""

import io
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from moe_jax import compat
from moe_jax.config import Config, TrainConfig
from moe_jax.data import TextData
from moe_jax.layers.block import mixes_slots
from moe_jax.models.places import by_layer, places
from moe_jax.parallel.rules import local_rows, put_batch
from moe_jax.train.metrics import write_whole

FILE_NAME = "routing.npz"
SHARES_OF_TRAINING = (20, 50, 80)  # in per cent, those of the paper's figure 3


class RoutingHistory(NamedTuple):
    """What the file holds.

    steps: int [n], ascending. ids: int32 [T], the tokens. layers: by name in order of depth, uint8 [n, T, ceil(N / 8)], the
    sets of experts as bits, over the N columns that `columns` says.
    """

    steps: np.ndarray
    ids: np.ndarray
    layers: dict[str, np.ndarray]
    columns: dict[str, int]

    def chosen(self, layer: str, index: int) -> np.ndarray:
        """bool [T, N] at the step of that index."""
        return np.unpackbits(self.layers[layer][index], axis=1, count=self.columns[layer]).astype(bool)


def last_changes(packed: np.ndarray) -> np.ndarray:
    """int [T]: of sets [n, T, bytes] the last index at which a token's differs from its final one; -1: never."""
    differs = np.any(packed != packed[-1], axis=2)
    return np.where(differs.any(axis=0), len(packed) - 1 - np.argmax(differs[::-1], axis=0), -1)


def fluctuation(history: RoutingHistory, steps: int) -> dict[str, dict[str, float | None]]:
    """{layer: {"fluctuation_20": share of the tokens whose expert last changed after 20 % of `steps`, ...}}.

    None where that cannot be told: the first record comes later, or there is none after it yet.
    """
    found: dict[str, dict[str, float | None]] = {}
    for layer, packed in history.layers.items():
        last = np.append(history.steps, 0)[last_changes(packed)]  # of -1: step 0
        for share in SHARES_OF_TRAINING:
            known = history.steps[0] <= share / 100 * steps < history.steps[-1]
            value = float(np.mean(last > share / 100 * steps)) if known else None
            found.setdefault(layer, {})[f"fluctuation_{share}"] = value
    return found


def due(step: int, train: TrainConfig) -> bool:
    """Whether one of `train.routing_snapshots`, evenly spaced and the last after the last step, comes after this step."""
    count = train.routing_snapshots
    return step * count // train.steps > (step - 1) * count // train.steps


def read_history(workdir) -> RoutingHistory | None:
    """What a run has recorded; None: nothing."""
    path = epath.Path(workdir) / FILE_NAME
    if not path.exists():
        return None
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        names = [str(name) for name in arrays["names"]]
        columns = dict(zip(names, arrays["columns"].tolist(), strict=True))
        return RoutingHistory(arrays["steps"], arrays["ids"], {name: arrays[f"layer/{name}"] for name in names}, columns)


class Recorder:
    """Records a model's routing, and keeps the file.

    The routing is that of training, on whole microbatches, without noise: BASE holds its auction, StableMoE takes its
    backbone's choice in stage 1. The sets are those before a capacity drops any.

    Args:
      config: the run's.
      folder: of the run; what it has recorded after step `step` is left out.
      mesh: the current one.
      data: whose validation text is taken, as many rows of each source: of a few evenly spaced microbatches, or evenly spaced
        ones of the first.
      model: the run's.
      step: the one that it goes on from.
    """

    def __init__(self, config: Config, folder: epath.Path, mesh, data: TextData, model: nn.Module, step: int):
        self.config, self.folder, self.mesh, self.model = config, folder, mesh, model
        self.mixing = {
            p.name for p in places(config.model, "routed") if mixes_slots(p.ffn, config.model.width, model.vocab_size)
        }
        self.rows = config.data.batch_size // config.train.microbatches
        self.batches, self.kept = self._fixed_batches(data)
        self.ids = np.concatenate([b["tokens"].reshape(-1)[kept] for b, kept in zip(self.batches, self.kept, strict=True)])
        self._run, before = jax.jit(self._matrices), read_history(folder) if step else None
        if before is not None and not np.array_equal(before.ids, self.ids):
            before = None  # of other tokens
        self.steps = [] if before is None else [int(s) for s in before.steps if s <= step]
        self.packed = {} if before is None else {name: [*a[: len(self.steps)]] for name, a in before.layers.items()}
        self.columns = {} if before is None else dict(before.columns)

    def _fixed_batches(self, data):
        """The microbatches, and bool [T] of each, the tokens that are recorded."""
        sources, length = data.evaluation("validation").values(), self.config.data.sequence_length
        rows = max(self.config.train.routing_tokens // (length * len(sources)), 1)  # of each source
        batches, kept = [], []
        for source in sources:
            for batch in source.batches(self.rows, -(-rows // self.rows)):
                chosen = np.zeros((self.rows, 1), bool)
                chosen[np.arange(min(rows, self.rows)) * self.rows // min(rows, self.rows)] = True
                batches.append(batch)
                kept.append((chosen & (batch["segment_ids"] > 0)).reshape(-1))
        return batches, kept

    def _matrices(self, variables, batch):
        arrays = (batch[name] for name in ("tokens", "positions", "segment_ids"))
        stats = by_layer(self.model.apply(variables, *arrays, train=True, record=True).stats, self.config.model)
        found = {name: sums["matrix"] for name, sums in stats.items() if "matrix" in sums}
        return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, compat.PartitionSpec()), found)

    def record(self, step: int, variables: dict[str, Any]) -> RoutingHistory:
        """Adds what `variables` choose, and writes the file anew."""
        parts = {}
        for batch, kept in zip(self.batches, self.kept, strict=True):
            local = {name: array[local_rows(self.mesh, self.rows)] for name, array in batch.items()}
            matrices = jax.device_get(self._run(variables, put_batch(local, self.mesh, self.rows)))
            for name, matrix in matrices.items():
                self.columns[name] = matrix.shape[1]
                if name in self.mixing:
                    matrix = matrix == matrix.max(axis=1, keepdims=True)
                parts.setdefault(name, []).append(np.packbits(matrix[kept] != 0, axis=1))
        self.steps.append(step)
        for name, sets in parts.items():
            self.packed.setdefault(name, []).append(np.concatenate(sets))
        layers = {name: np.stack(self.packed[name]) for name in parts}
        history = RoutingHistory(np.array(self.steps), self.ids, layers, self.columns)
        if jax.process_index() == 0:
            _write(self.folder, history)
        return history


def _write(folder, history):
    names, buffer = list(history.layers), io.BytesIO()
    arrays = {"steps": history.steps, "ids": history.ids, "names": names, "columns": [history.columns[n] for n in names]}
    np.savez_compressed(buffer, **arrays, **{f"layer/{name}": packed for name, packed in history.layers.items()})
    write_whole(folder / FILE_NAME, buffer.getvalue())
