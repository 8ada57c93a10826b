"""The ids of the tokens before each one in its document, within a call and across the calls of a cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenWindow(NamedTuple):
    """The last P real tokens of each row, the newest last. token_ids, segment_ids: int32 [B, P]; segment 0: none."""

    token_ids: jax.Array
    segment_ids: jax.Array


def init_window(batch: int, count: int) -> TokenWindow:
    """Of rows without a token; B = `batch`, P = `count`."""
    empty = jnp.zeros((batch, count), jnp.int32)
    return TokenWindow(empty, empty)


def earlier_tokens(
    token_ids: jax.Array, segment_ids: jax.Array, count: int, window: TokenWindow | None = None
) -> tuple[jax.Array, TokenWindow]:
    """The ids before each token.

    Args:
      token_ids, segment_ids: int32 [B, S]; segment 0 is padding, which may not stand between the tokens of a document.
      count: P.
      window: what the last call returned; None: nothing stands before the rows.

    Returns:
      int32 [B, S, P], the nearest first, -1 where the document has none, and the window for the next call.
    """
    length, before = token_ids.shape[1], init_window(token_ids.shape[0], count) if window is None else window
    ids, segments = (jnp.concatenate(pair, axis=1) for pair in zip(before, (token_ids, segment_ids), strict=True))
    earlier = []
    for distance in range(1, count + 1):
        place = slice(count - distance, count - distance + length)
        same = (segments[:, place] == segment_ids) & (segment_ids > 0)
        earlier.append(jnp.where(same, ids[:, place], -1))
    # The real ones in their order, at the end.
    newest = jnp.argsort(segments > 0, axis=1, stable=True)[:, -count:]
    window = TokenWindow(*(jnp.take_along_axis(a, newest, axis=1).astype(jnp.int32) for a in (ids, segments)))
    return jnp.stack(earlier, axis=-1).astype(jnp.int32), window
