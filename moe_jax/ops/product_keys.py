"""Exact top-k over the sums of two score vectors, without forming them: product-key search (Lample et al., arXiv:1907.05242)."""

import jax
import jax.numpy as jnp


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
    (best_1, i), (best_2, j) = jax.lax.top_k(scores_1, top_k), jax.lax.top_k(scores_2, top_k)
    pairs = [(slice(a, a + 1), slice(top_k // (a + 1))) for a in range(top_k)]
    sums = jnp.concatenate([best_1[..., a] + best_2[..., b] for a, b in pairs], axis=-1)
    ids = jnp.concatenate([i[..., a] * n + j[..., b] for a, b in pairs], axis=-1)
    scores, winners = jax.lax.top_k(sums, top_k)
    return scores, jnp.take_along_axis(ids, winners, axis=-1)
