"""All-gather and reduce-scatter: every shard sees the tokens of its whole group and runs the rows of its own experts.

Shapes are static and nothing can overflow; each shard's products follow the rows that its experts received. Memory and
bytes do not depend on the routing, nor on K. Over the axis `expert`, of n shards with T_local tokens each:

    forward    all-gather x [T_local, D], ids and gates [T_local, K]; reduce-scatter y [n T_local, D] in float32
    backward   all-gather of d_y in the dtype of x; reduce-scatter of d_x in float32 and of d_gates
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.dispatch.exchange.common import AXIS, ExchangeStatistics, Group, RunRows, run_group
from moe_jax.ops.precision import accumulator, standard_promotion
from moe_jax.types import TokenChoice


def exchange(x: jax.Array, choice: TokenChoice, run_rows: RunRows, group: Group, buffer_factor: float = 0.0):
    """One shard's part: x [T_local, D], choice over E -> (y [T_local, D] in float32 at least, `ExchangeStatistics`)."""
    y = run_gathered(x, choice, run_rows, group)
    sent = group.copies * bytes_sent(group.shards, x.shape[0], choice.gates.shape[1], x.shape[1], x.dtype)
    zero = jnp.zeros((), jnp.float32)
    return y, ExchangeStatistics(zero, zero, jnp.asarray(sent, jnp.float32))


def run_gathered(x, choice, run_rows, group):
    """x [T_local, D] -> y [T_local, D]."""
    with jax.named_scope("exchange"):
        ids, gates = (jax.lax.all_gather(a, AXIS, tiled=True) for a in choice)
        ids = ids - jax.lax.axis_index(AXIS) * group.experts_local
        everything = _gather_tokens(x)
    y = run_group(everything, TokenChoice(ids, gates), run_rows, group.experts_local)
    with jax.named_scope("exchange"):
        return _scatter_sums(y, x.dtype)


def bytes_sent(shards, tokens, top_k, width, dtype, buffer_factor=0.0, rows=None) -> float:
    """See `moe_jax.dispatch.exchange.bytes_sent`."""
    element = jnp.dtype(dtype).itemsize + jnp.dtype(accumulator(dtype)).itemsize
    return float(shards * (shards - 1) * tokens * width * element)


# The two collectives are each other's gradient. Sums are taken in float32, what is only moved keeps its dtype.


@jax.custom_vjp
def _gather_tokens(x):
    return jax.lax.all_gather(x, AXIS, tiled=True)


@standard_promotion()
def _gather_tokens_backward(_, d_out):
    d_x = jax.lax.psum_scatter(d_out.astype(accumulator(d_out.dtype)), AXIS, tiled=True)
    return (d_x.astype(d_out.dtype),)


_gather_tokens.defvjp(lambda x: (_gather_tokens(x), None), _gather_tokens_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scatter_sums(y, dtype):
    """y [n T_local, D] -> [T_local, D]. `dtype`: that of the layer's output, in which the gradient is exact."""
    return jax.lax.psum_scatter(y, AXIS, tiled=True)


@standard_promotion()
def _scatter_sums_backward(dtype, _, d_y):
    return (jax.lax.all_gather(d_y.astype(dtype), AXIS, tiled=True).astype(d_y.dtype),)


_scatter_sums.defvjp(lambda y, dtype: (_scatter_sums(y, dtype), None), _scatter_sums_backward)
