"""The cache of keys and values for decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, in M slots a row. Rows may hold different numbers of tokens.

    Attributes:
      k: [B, M, G, W], after rotation.
      v: [B, M, G, W].
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
    kv = jnp.zeros((batch, length, kv_heads, head_width), dtype)
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
    slots = cache.k.shape[1]
    real = segment_ids > 0
    slot = cache.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    slot = jnp.where(real, slot, slots)
    # Mapped over rows: the batch stays a batch dimension of the scatter, so the partitioner keeps it sharded.
    write = jax.vmap(lambda old, index, new: old.at[index].set(new.astype(old.dtype), mode="drop"))
    new = KVCache(
        write(cache.k, slot, k),
        write(cache.v, slot, v),
        write(cache.segment_ids, slot, segment_ids),
        cache.length + jnp.sum(real, axis=1, dtype=jnp.int32),
    )
    return new, slot
