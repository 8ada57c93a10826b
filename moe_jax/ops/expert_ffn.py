"""The experts' feed-forward networks over rows sorted by expert."""

from typing import Mapping

import jax
import jax.numpy as jnp

from moe_jax.ops.activations import activate, is_gated
from moe_jax.ops.grouped_matmul import grouped_matmul


def expert_ffn(
    rows: jax.Array,
    weights: Mapping[str, jax.Array],
    group_sizes: jax.Array,
    *,
    activation: str,
    backend: str | None = None,
) -> jax.Array:
    """Each group of rows through its expert: act(x w_in + b_in) w_out + b_out, gated for SwiGLU.

    Args:
      rows: [M, D], sorted by expert.
      weights: w_in [E, D, F], w_out [E, F, D]; w_gate [E, D, F] for a gated activation; optionally the biases
        b_in [E, F], b_gate [E, F], b_out [E, D]. Compute happens in the dtype of `rows`.
      group_sizes: int32 [E]; rows past their sum give 0.
      activation: see `moe_jax.ops.activations.activate`.
      backend: of `grouped_matmul`.

    Returns:
      [M, D].
    """
    weights = {name: weight.astype(rows.dtype) for name, weight in weights.items()}
    m = rows.shape[0]

    def project(x, name):
        y = grouped_matmul(x, weights["w_" + name], group_sizes, backend=backend)
        if "b_" + name not in weights:
            return y
        # The bias's gradient is a sum over rows: in bfloat16 it would stop growing at 256 rows.
        bias = weights["b_" + name].astype(jnp.promote_types(y.dtype, jnp.float32))
        bias = bias[jnp.repeat(jnp.arange(bias.shape[0]), group_sizes, total_repeat_length=m)].astype(y.dtype)
        return y + jnp.where((jnp.arange(m) < jnp.sum(group_sizes))[:, None], bias, 0)

    gate = project(rows, "gate") if is_gated(activation) else None
    return project(activate(activation, project(rows, "in"), gate), "out")
