"""Tables of token and position vectors."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def row_ids(token_ids: jax.Array) -> jax.Array:
    """The table row that each row of a `row_sinks` gradient belongs to: token_ids [B, S] flattened to [T]."""
    return token_ids.reshape(-1)


class TokenEmbedding(nn.Module):
    """A table of V vectors, looked up by token id.

    Parameter: `embedding` [V, D].

    With `row_gradients` the gradient of a lookup can be had by rows, without an array [V, D]: put zeros
    [T, D] at this module's place in the collection `row_sinks`, under the name `embedding`, and differentiate
    with respect to them. Row t is then the gradient of table row `row_ids(token_ids)[t]`; ids occur more than
    once, and the sum over equal ids is the dense gradient. Without the sink the lookup is the ordinary one.

    Attributes:
      vocab_size: rows V.
      width: width D.
      init_std: standard deviation of the normal initialisation.
      row_gradients: allows gradients by rows; the lookup then has no gradient for the table while a sink is
        given.
      dtype: compute dtype; the vectors have it.
      param_dtype: dtype of the table.
    """

    vocab_size: int
    width: int
    init_std: float = 0.02
    row_gradients: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.width), self.param_dtype)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """Looks up token_ids, int [B, S].

        Returns:
          [B, S, D] of `dtype`. An id outside of 0..V-1 gives NaN, rather than another token's vector.

        Raises:
          ValueError: the sink's shape is not [T, D].
        """
        if not (self.row_gradients and self.has_variable("row_sinks", "embedding")):
            # The gradient of this gather, a scatter-add, takes 0.2 ms at T = V = 4096, D = 192 on 2 cores; of
            # a product with one-hot vectors, 170 ms.
            return jnp.take(self.embedding, token_ids, axis=0).astype(self.dtype)
        sink = self.get_variable("row_sinks", "embedding")
        if sink.shape != (token_ids.size, self.width):
            raise ValueError(f"row_sinks/embedding has shape {sink.shape}; it must be {(token_ids.size, self.width)}")
        rows = jnp.take(jax.lax.stop_gradient(self.embedding), token_ids, axis=0).astype(self.dtype)
        return rows + sink.reshape(rows.shape).astype(self.dtype)


class LearnedPositions(nn.Module):
    """A table of position vectors.

    Parameter: `embedding` [offset + max_positions, D].

    Attributes:
      max_positions: positions that can be looked up.
      width: width D.
      offset: first row in use (OPT: 2).
      init_std: standard deviation of the normal initialisation.
      dtype: compute dtype; the vectors have it.
      param_dtype: dtype of the table.
    """

    max_positions: int
    width: int
    offset: int = 0
    init_std: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, positions: jax.Array) -> jax.Array:
        """Looks up positions, int [B, S]; returns [B, S, D] of `dtype`, NaN from `max_positions` on."""
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ("positions", "embed"))
        shape = (self.offset + self.max_positions, self.width)
        table = self.param("embedding", init, shape, self.param_dtype)
        return jnp.take(table, positions + self.offset, axis=0).astype(self.dtype)
