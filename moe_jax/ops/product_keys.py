"""Exact top-k over the sums of two score vectors, without forming them: product-key search (Lample et al., arXiv:1907.05242)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


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
    (best_1, i), (best_2, j) = top_k_of(scores_1, top_k), top_k_of(scores_2, top_k)
    a, b = _candidates(top_k)
    sums = best_1[..., a] + best_2[..., b]
    scores, winners = jax.lax.top_k(sums, top_k)
    ids = i[..., a] * n + j[..., b]
    return scores, jnp.take_along_axis(ids, winners, axis=-1)


def top_k_of(scores: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of [..., n]: values and int32 indices [..., k], descending."""
    return jax.lax.top_k(scores, top_k)


@functools.cache
def _candidates(top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (a, b) of the halves' winners whose sum can be among the k best, by a and then b."""
    a, b = np.indices((top_k, top_k)).reshape(2, -1)
    kept = (a + 1) * (b + 1) <= top_k
    return a[kept], b[kept]
