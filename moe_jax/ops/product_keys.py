"""Product-key search: exact top-k over sums of two score vectors, without forming them (Lample et al., arXiv:1907.05242)."""

import functools

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.column_top_k import column_top_k, fits
from moe_jax.ops.precision import standard_promotion

# Of both halves' scores that lie in memory at once.
BLOCK_BYTES = {"cpu": 2**23, "other": 2**28}


def product_search(queries: jax.Array, keys: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The K best of n*n experts for every query. An expert's score: the halves of the query times its two keys, summed.

    Scores [T, H, n] are made for a block of tokens at a time and never kept: the backward pass needs K of them, whose places
    the ids tell. Has a reverse-mode gradient alone.

    Args:
      queries: [T, H, 2, half], float32 at least.
      keys: [2, n, half] for all heads, or [H, 2, n, half]; of the same dtype.
      top_k: K, at most n.

    Returns:
      (scores [T, H, K] in descending order, ids int32 [T, H, K]), see `product_top_k`, which also says what it raises.
    """
    (tokens, heads, _, half), n = queries.shape, keys.shape[-2]
    axes = compat.varying_axes(queries, keys)
    queries, keys = compat.vary(queries, axes), compat.vary(keys, axes)
    blocks = _block_count(tokens, 2 * heads * n * queries.dtype.itemsize)
    search = lambda queries, keys: _search(queries, keys, top_k, blocks)
    if keys.ndim == 4:
        return jax.vmap(search, (1, 0), 1)(queries, keys)
    scores, ids = search(queries.reshape(-1, 2, half), keys)
    return scores.reshape(tokens, heads, top_k), ids.reshape(tokens, heads, top_k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _search(queries, keys, top_k, blocks):
    """queries [T, 2, half], keys [2, n, half] -> (scores [T, K], ids [T, K])."""
    if fits(keys.shape[1], top_k, queries.dtype):
        search = lambda queries: _search_columns(queries, keys, top_k)
    else:
        search = lambda queries: product_top_k(*(_dot(queries[:, half], keys[half].T) for half in (0, 1)), top_k)
    if blocks == 1:
        return search(queries)
    return tuple(_join(a, len(queries)) for a in jax.lax.map(search, _split(queries, blocks)))


def _search_columns(queries, keys, top_k):
    """`product_top_k` of one block, with the scores of all queries side by side."""
    n = keys.shape[1]
    places = jnp.arange(n, dtype=jnp.int32)[:, None]
    best = [column_top_k(_dot(keys[half], queries[:, half].T), places, top_k) for half in (0, 1)]
    scores, ids = column_top_k(*_pairs(*best, n, 0), top_k)
    return scores.T, ids.T


def _search_forward(queries, keys, top_k, blocks):
    best = _search(queries, keys, top_k, blocks)
    return best, (queries, keys, best[1])


@standard_promotion()
def _search_backward(top_k, blocks, residuals, cotangents):
    queries, keys, ids = residuals
    n = keys.shape[1]

    def block(queries, ids, d_scores):
        def of_half(half, ids):
            # Compared and added, not scattered: in one order everywhere, and XLA does all K in one pass.
            terms = [jnp.where(jnp.arange(n) == ids[:, k, None], d_scores[:, k, None], 0) for k in range(top_k)]
            d_half = functools.reduce(jnp.add, terms)
            return _dot(d_half, keys[half]), _dot(d_half.T, queries[:, half])

        (d_query_1, d_keys_1), (d_query_2, d_keys_2) = of_half(0, ids // n), of_half(1, ids % n)
        return jnp.stack([d_query_1, d_query_2], axis=1), jnp.stack([d_keys_1, d_keys_2])

    parts = queries, ids, cotangents[0]
    if blocks == 1:
        return block(*parts)

    def add_block(d_keys, part):
        d_queries, more = block(*part)
        return d_keys + more, d_queries

    zeros = compat.vary(jnp.zeros_like(keys), compat.varying_axes(*parts))
    d_keys, d_queries = jax.lax.scan(add_block, zeros, tuple(_split(a, blocks) for a in parts))
    return _join(d_queries, len(queries)), d_keys


_search.defvjp(_search_forward, _search_backward)


def _dot(a, b):
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _block_count(tokens, token_bytes):
    """How many blocks of T tokens; on several devices one that divides a device's tokens, if there is one near."""
    mesh = compat.current_mesh()
    shards = 1 if compat.inside_shard_map(mesh) else compat.axis_size(mesh, *compat.BATCH_AXES)
    local = -(-tokens // shards)
    needed = max(-(-local * token_bytes // compat.for_platform(BLOCK_BYTES)), 1)
    if shards == 1:
        return needed
    # Blocks that divide no device's tokens would be searched by every device, for all of them.
    return next((count for count in range(needed, 4 * needed) if local % count == 0), needed)


def _split(array, blocks):
    """[T, ...] -> [blocks, size, ...]; tokens of a block lie `blocks` apart, so that each device has a part of every block."""
    fill = [(0, -array.shape[0] % blocks)] + [(0, 0)] * (array.ndim - 1)
    array = jnp.pad(array, fill)
    return jnp.moveaxis(array.reshape(-1, blocks, *array.shape[1:]), 1, 0)


def _join(array, tokens):
    return jnp.moveaxis(array, 0, 1).reshape(-1, *array.shape[2:])[:tokens]


def product_top_k(scores_1: jax.Array, scores_2: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of all n*n sums scores_1[i] + scores_2[j], by two searches over n and one over the pairs that can win.

    With both halves' winners in descending order, pair (a, b) is beaten or equalled by (a+1)(b+1) - 1 others, so it can be
    among the k best only if (a+1)(b+1) <= k: 50 of 256 pairs for k=16 (PEER, arXiv:2407.04153, section 2.1, forms all k*k).

    Args:
      scores_1, scores_2: [..., n] of one float dtype.
      top_k: k, at most n.

    Returns:
      scores [..., k] in descending order, and ids int32 [..., k] = i * n + j. Which of several sums that are equal, as
      rounded, is left open.

    Raises:
      ValueError: k is above n, or n*n ids do not fit into int32.
    """
    n = scores_1.shape[-1]
    if top_k > n:
        raise ValueError(f"top_k={top_k}: at most the {n} keys of a half")
    if n * n > 2**31:
        raise ValueError(f"{n} keys in a half: {n * n} ids do not fit into int32; use at most 46340")
    # The barrier keeps the slices below away from the searches: merged into them, XLA sorts all n scores instead,
    # which takes 13 times as long on a CPU.
    halves = jax.lax.top_k(scores_1, top_k), jax.lax.top_k(scores_2, top_k)
    (best_1, i), (best_2, j) = jax.lax.optimization_barrier(halves)
    sums, ids = _pairs((best_1, i), (best_2, j), n, -1)
    scores, winners = jax.lax.top_k(sums, top_k)
    return scores, jnp.take_along_axis(ids, winners, axis=-1)


def _pairs(best_1, best_2, n, axis):
    """(sums, ids) of the pairs that can win, along `axis`, from (scores, ids) of each half's winners in descending order."""
    (scores_1, i), (scores_2, j) = best_1, best_2
    top_k = scores_1.shape[axis]
    part = lambda array, start, stop: jax.lax.slice_in_dim(array, start, stop, axis=axis)
    pairs = [(a, top_k // (a + 1)) for a in range(top_k)]
    sums = [part(scores_1, a, a + 1) + part(scores_2, 0, until) for a, until in pairs]
    ids = [part(i, a, a + 1) * n + part(j, 0, until) for a, until in pairs]
    return jnp.concatenate(sums, axis), jnp.concatenate(ids, axis)
