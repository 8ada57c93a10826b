"""Loss, perplexity and bits per byte of held-out text."""

import math
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compat import PartitionSpec, current_mesh
from moe_jax.data.pipeline import EvaluationSet
from moe_jax.models.flops import experts_per_token
from moe_jax.models.losses import per_token_cross_entropy
from moe_jax.models.places import by_layer
from moe_jax.parallel.rules import local_rows, put_batch
from moe_jax.train.routing_metrics import routing_metrics

EvaluationStep = Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, Any]]


def make_evaluation_step(model: nn.Module, token_bytes: np.ndarray, by_token: bool = False) -> EvaluationStep:
    """A jitted function (variables, batch) -> sums, which never writes `router_state`.

    The batch is that of `PackedRows`, [B, S]. The sums of each row, float32 [B], are whole in every process:
    `nats`, `tokens`, `bytes` of the targets' text, and `documents` that end there. `routing`: the routers'
    sums over the batch by layer, {"layer_01": {"counts": [E], ...}}. Padding counts nowhere.

    Args:
      model: such as `Decoder`.
      token_bytes: int [V], bytes of text behind each id; 0 for the one that ends a document.
      by_token: add `by_token`, what the sums are of, each [B, S].
    """
    config = model.config
    token_bytes = np.asarray(token_bytes, np.int32)

    @jax.jit
    def step(variables, batch):
        out = model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"])
        nats = per_token_cross_entropy(
            out.x, out.table, batch["targets"], chunk=config.loss_chunk, dtype=jnp.dtype(config.dtype)
        )
        weights = batch["loss_weights"]
        lengths = jnp.asarray(token_bytes)[batch["targets"]]
        counted = {
            "nats": jnp.where(weights > 0, nats * weights, 0),
            "tokens": weights,
            "bytes": lengths * weights,
            "documents": (lengths == 0) * weights,
        }
        sums = {name: jnp.sum(values, axis=1) for name, values in counted.items()}
        sums["routing"] = by_layer(out.stats, config)
        if by_token:
            sums["by_token"] = counted
        if current_mesh() is None:
            return sums
        return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, PartitionSpec()), sums)

    return step


def evaluate(
    step: EvaluationStep,
    variables: dict[str, Any],
    evaluation_set: EvaluationSet,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    *,
    limit: int = 0,
    progress: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Scores a set; a row's score does not depend on its neighbours unless `eval_capacity` is set.

    Args:
      step: from `make_evaluation_step`; compiled once for all sets of one row length.
      variables: `params` and `router_state` on `mesh`.
      evaluation_set: the text.
      mesh: the devices.
      batch_size: rows B of a global batch.
      limit: take this many batches, evenly spaced; 0: all.
      progress: called after every batch.

    Returns:
      `loss` in nats per token, `perplexity`, `bits_per_byte`, `tokens`, `bytes`, `documents` and `seconds`;
      with routed layers also the totals of `routing_metrics`, such as `router/dropped`, and `router/experts_per_token`, how
      many ran on average, over the layers. Sums are kept in
      float64 on the host. Where the step gives tokens and `limit` is 0, also `by_document`: the `nats`, float64, and the
      `tokens` and `bytes`, int64 [documents], of each document in the order of the text.
    """
    start, total, tokens = time.monotonic(), None, []
    with jax.set_mesh(mesh):
        for batch in evaluation_set.batches(batch_size, limit, rows=local_rows(mesh, batch_size)):
            sums = jax.device_get(step(variables, put_batch(batch, mesh, batch_size)))
            tokens.append(sums.pop("by_token", None))
            sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
            sums |= {name: sums[name].sum() for name in sums if name != "routing"}
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            if progress:
                progress()
    loss = float(total["nats"] / total["tokens"])
    whole = tokens[0] is not None and limit == 0
    routing = routing_metrics(total["routing"])
    ran = [experts_per_token(sums) for sums in total["routing"].values() if "counts" in sums]
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf if loss >= 700 else math.nan,
        "bits_per_byte": float(total["nats"] / math.log(2) / max(total["bytes"], 1)),
        "tokens": int(total["tokens"]),
        "bytes": int(total["bytes"]),
        "documents": int(total["documents"]),
        "seconds": time.monotonic() - start,
        **{name: value for name, value in routing.items() if name.count("/") == 1},
        **({"router/experts_per_token": float(np.mean(ran))} if ran else {}),
        **({"by_document": sums_by_document(tokens)} if whole else {}),
    }


def sums_by_document(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """`nats`, `tokens` and `bytes` of each document, [documents], from those of the tokens of all batches in order, [B, S].

    A document's last target is the token that ends it; the last document ends with the text.
    """
    flat = {name: np.concatenate([batch[name].ravel() for batch in batches]) for name in batches[0]}
    real = flat["tokens"] > 0
    ends = np.flatnonzero(flat["documents"][real] > 0)
    starts = np.concatenate([[0], ends + 1])
    starts = starts[starts < real.sum()]
    kinds = {"nats": np.float64, "tokens": np.int64, "bytes": np.int64}
    return {name: np.add.reduceat(flat[name][real].astype(kind), starts) for name, kind in kinds.items()}


def batch_count(evaluation_set: EvaluationSet, batch_size: int, limit: int = 0) -> int:
    """How many batches `evaluate` will run."""
    count = -(-evaluation_set.rows // batch_size)
    return min(limit, count) if limit > 0 else count
