"""The k largest of every column, all columns at once: for CPUs, where XLA's top-k takes one row after the other.

A column's value and its id are one int64, so that a comparison is one instruction. Rows come in groups of four, sorted
beforehand. To merge one into the k best so far takes 8 minima and maxima for each of the k, over all columns: the k-th largest
of two descending lists c and x is the largest of min(c[k-j], x[j]) over j, with infinity before the first.
"""

import jax
import jax.numpy as jnp

from moe_jax import compat

LEAST, MOST = -(2**63), 2**63 - 1
GROUP = 4
# Comparisons that sort a group in descending order.
SORT = ((0, 1), (2, 3), (0, 2), (1, 3), (1, 2))
# Of values times k. Above, one row after the other takes less time.
LIMIT = 2**14


def fits(values: int, top_k: int, dtype) -> bool:
    """Whether `column_top_k` is the faster search on the platform that the program is for; it takes float32 alone."""
    return compat.target_platform() == "cpu" and dtype == jnp.float32 and values * top_k <= LIMIT


def column_top_k(values: jax.Array, ids: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each column, without a gradient.

    Args:
      values: float32 [n, B].
      ids: int32 [n, B] or [n, 1], at least 0, different within a column.
      top_k: k, at most n.

    Returns:
      (values [k, B] in descending order, their ids int32 [k, B]); of equal values the one with the smaller id is first. NaNs
      count as larger or smaller than all numbers, by their sign, and -0 as smaller than 0.
    """
    with jax.enable_x64(True):
        words = _pack(values, ids)
        words = jnp.pad(words, ((0, -words.shape[0] % GROUP), (0, 0)), constant_values=LEAST)
        groups = words.shape[0] // GROUP
        # A group's rows lie `groups` apart: an array for each place, which the loop reads by its first axis.
        group = [words[i * groups : (i + 1) * groups] for i in range(GROUP)]
        for i, j in SORT:
            group[i], group[j] = jnp.maximum(group[i], group[j]), jnp.minimum(group[i], group[j])

        def merge(g, best):  # [GROUP + k, B], the first GROUP rows infinite
            new = best[GROUP:]
            for j, rows in enumerate(group, 1):
                row = jax.lax.dynamic_slice_in_dim(rows, g, 1)
                new = jnp.maximum(new, jnp.minimum(best[GROUP - j : GROUP - j + top_k], row))
            return jnp.concatenate([best[:GROUP], new])

        rows = jnp.where(jnp.arange(GROUP + top_k) < GROUP, MOST, LEAST)[:, None]
        best = compat.vary(jnp.broadcast_to(rows, (GROUP + top_k, words.shape[1])), compat.varying_axes(words))
        return _unpack(jax.lax.fori_loop(jnp.int32(0), jnp.int32(groups), merge, best)[GROUP:])


def _pack(values, ids):
    """One int64 with the order of (value, -id)."""
    return _flip(jax.lax.bitcast_convert_type(values, jnp.int32)).astype(jnp.int64) << 32 | (2**31 - 1 - ids).astype(jnp.int64)


def _unpack(words):
    values = jax.lax.bitcast_convert_type(_flip((words >> 32).astype(jnp.int32)), jnp.float32)
    return values, (2**31 - 1 - (words & (2**32 - 1))).astype(jnp.int32)


def _flip(bits):
    """Between the bits of a float32 and an int32 of the same order; its own inverse."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)
