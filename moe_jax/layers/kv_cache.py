"""The cache of keys and values for decoding."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import compat


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, in M slots a row. Rows may hold different numbers of tokens.

    Attributes:
      k: [B, G, M, W], after rotation.
      v: [B, G, M, W].
      segment_ids: int32 [B, M], 0 where the slot is empty.
      length: int32 [B], slots in use, the first ones. More than M: tokens did not fit and are missing.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    length: jax.Array


def init_cache(batch: int, length: int, kv_heads: int, head_width: int, dtype: Any = jnp.float32) -> KVCache:
    """An empty cache of one layer.

    Args:
      batch: rows B.
      length: slots M: the longest prompt plus the new tokens.
      kv_heads: key and value heads G.
      head_width: width W of a head.
      dtype: dtype of keys and values.

    Returns:
      A `KVCache`; every leaf starts with B, so that rows can be gathered (beam search).
    """
    # Heads before slots: as `cached_attention` multiplies them. Else all of the cache would be moved for each token.
    kv = jnp.zeros((batch, kv_heads, length, head_width), dtype)
    return KVCache(kv, kv, jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch,), jnp.int32))


def update_cache(cache: KVCache, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> tuple[KVCache, jax.Array]:
    """Appends the real tokens of each row; padding takes no slot, wherever it stands.

    Args:
      cache: the cache, M slots.
      k: [B, S, G, W].
      v: [B, S, G, W].
      segment_ids: int [B, S], 0 for padding.

    Returns:
      The new cache, and int32 [B, S], the slot of every token: M or more for padding and for tokens that did
      not fit.
    """
    slots = cache.segment_ids.shape[1]
    real = segment_ids > 0
    slot = cache.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    slot = jnp.where(real, slot, slots)
    write = functools.partial(_write, slot)
    new = KVCache(
        write(cache.k, k.swapaxes(1, 2)),
        write(cache.v, v.swapaxes(1, 2)),
        write(cache.segment_ids[..., None], segment_ids[..., None])[..., 0],
        cache.length + jnp.sum(real, axis=1, dtype=jnp.int32),
    )
    return new, slot


def _write(slot, old, new):
    """old [B, ..., M, X] with new [B, ..., S, X] in the slots [B, S]; nothing where a slot is M or more."""
    slots, new = old.shape[-2], new.astype(old.dtype)
    if slot.size > 1 or compat.target_platform() != "cpu":
        # Mapped over rows: the batch stays a batch dimension of the scatter, so the partitioner keeps it sharded.
        return jax.vmap(lambda old, index, new: old.at[..., index, :].set(new, mode="drop"))(old, slot, new)
    # A CPU's compiler takes a scatter of one update apart, and fuses it into all that reads the result: each copies `old`.
    put = lambda old: jax.lax.dynamic_update_slice_in_dim(old, new, slot[0, 0], axis=-2)
    return jax.lax.cond(slot[0, 0] < slots, put, lambda old: old, old)
