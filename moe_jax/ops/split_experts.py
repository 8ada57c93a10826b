"""The experts' feed-forward networks over few rows, with every expert's weights in arrays of their own.

XLA's CPU backend has no product with a matrix that it finds in a stacked array when it runs: it copies the matrix first, which for
few rows takes longer than the product. Here the program names every expert's matrices, and skips those without rows.
"""

from typing import Mapping

import jax
import jax.numpy as jnp

from moe_jax.ops.activations import activate, is_gated
from moe_jax.ops.counting import real_rows
from moe_jax.ops.precision import accumulator

# Rows of a product: more of them waste more where an expert has fewer, and fewer read the matrices more often.
MOST_ROWS = 64


def split_expert_ffn(
    x: jax.Array,
    weights: Mapping[str, tuple[jax.Array, ...]],
    group_sizes: jax.Array,
    *,
    activation: str,
    gates: jax.Array,
    order: jax.Array,
    inverse: jax.Array,
) -> jax.Array:
    """`expert_ffn` of weights that are not stacked; without gradients (JAX refuses them).

    Args:
      x: [T, D] tokens.
      weights: for each name of `expert_ffn` a tuple of E arrays: w_in [D, F], w_out [F, D] and so on; without a norm.
      group_sizes: int32 [E].
      activation: see `moe_jax.ops.activations.activate`.
      gates: [T*K], what each row's output is multiplied by.
      order, inverse: int32 [T*K] each, of `moe_jax.dispatch.permute.sort_by_expert`.

    Returns:
      [T, D] in float32 at least: the sum over a token's experts. The program grows with E.
    """
    (tokens, width), rows, wide = x.shape, order.shape[0], accumulator(x.dtype)
    block = block_rows(rows, len(weights["w_in"]))
    token = jnp.pad(order // (rows // tokens), (0, block - 1))
    gates = jnp.pad(gates.astype(wide), (0, block - 1))[:, None]
    starts = jnp.cumsum(group_sizes) - group_sizes
    y = jnp.zeros((rows + block - 1, width), wide)
    for e, size in enumerate(group_sizes):
        own = {name: of_experts[e] for name, of_experts in weights.items()}

        def body(n, y, own=own, start=starts[e]):
            take = lambda a: jax.lax.dynamic_slice_in_dim(a, start + n * block, block)
            # A single token's row is the same in each step. Behind the barrier it is not, and its product is not made beforehand.
            block_x, n = jax.lax.optimization_barrier((x[take(token)], n))
            out = _network(block_x, own, activation) * take(gates)
            # The last block reaches into rows of later experts, which write them after this one.
            return jax.lax.dynamic_update_slice_in_dim(y, out, start + n * block, 0)

        y = jax.lax.fori_loop(0, -(-size // block), body, y)
    y = jnp.where(real_rows(rows, group_sizes), y[:rows], 0)
    return y[inverse].reshape(tokens, -1, width).sum(axis=1)


def block_rows(rows: int, experts: int) -> int:
    """Rows of a product: the power of two from an expert's even share on, at most `MOST_ROWS` and all rows."""
    even = -(-rows // experts)
    return min(1 << (even - 1).bit_length(), MOST_ROWS, rows)


def _network(rows, w, activation):
    """[m, D] -> [m, D] in float32 at least."""
    wide = accumulator(rows.dtype)

    def project(h, branch):
        y = jnp.dot(h, w[f"w_{branch}"], preferred_element_type=wide)
        return y + w[f"b_{branch}"].astype(wide) if f"b_{branch}" in w else y

    hidden = (project(rows, branch).astype(rows.dtype) for branch in (("in", "gate") if is_gated(activation) else ("in",)))
    return project(activate(activation, *hidden), "out")
