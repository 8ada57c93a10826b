"""Experts that are stacks of residual feed-forward sublayers, whatever runs a sublayer.

The experts of BASE layers (arXiv:2103.16716, section 3.2) and StableMoE (arXiv:2204.08396, eq. 2), whose sublayers have a
norm before the projections.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from moe_jax.ops.precision import accumulator

Weights = Mapping[str, jax.Array]


def residual_stack(
    x: jax.Array, sublayers: Sequence[Weights], network: Callable[[jax.Array, Weights], jax.Array], axis: str | None = None
) -> jax.Array:
    """What a stack of sublayers adds to x: x_n - x_0, with x_0 = x and x_i = x_{i-1} + network(x_{i-1}, sublayers[i]).

    Args:
      x: [..., D].
      sublayers: what `network` is called with, one after the other.
      network: x, the weights of a sublayer -> [..., D].
      axis: mesh axis of a shard_map over which the results of `network` are parts of a sum. They are added up before the next
        sublayer, whose norm needs the whole; the result is a part of a sum again. None: they are whole.

    Returns:
      [..., D] in the dtype that `network` returns.
    """
    whole = None  # what the sublayers before this one add

    def after(added):
        return x if added is None else x + added.astype(x.dtype)

    for weights in sublayers[:-1]:
        part = network(after(whole), weights)
        if axis is not None:
            part = jax.lax.psum(part.astype(accumulator(part.dtype)), axis).astype(part.dtype)
        whole = part if whole is None else whole + part
    last = network(after(whole), sublayers[-1])
    if whole is None:
        return last
    if axis is not None:
        whole = jnp.where(jax.lax.axis_index(axis) == 0, whole, 0)
    return whole + last
