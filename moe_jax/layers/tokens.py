"""What layers with a router do with their input before they route it."""

import contextlib
import math
from collections.abc import Iterator

import flax
import jax
import jax.numpy as jnp

from moe_jax.types import RouterInputs

_BY_TOKEN = ("token_ids", "positions", "segment_ids", "valid", "sequences", "earlier_ids")


def flatten_tokens(x: jax.Array, inputs: RouterInputs | None, train: bool, what: str) -> tuple[jax.Array, RouterInputs, int]:
    """x [..., S, D] -> (tokens [T, D], `RouterInputs`, B); T = B*S.

    Without `inputs` only `train` is set. Without `inputs.sequences` the rows of x are the sequences. An x without tokens
    becomes one token of padding, so that what follows has no special case; `unflatten_tokens` takes it away.

    Args:
      x: at least [S, D].
      what: the layer's name, for messages.

    Raises:
      ValueError: x has fewer axes; an array of `inputs` does not have T entries.
    """
    if x.ndim < 2:
        raise ValueError(f"{what} x {list(x.shape)}: needs the axes [..., S, D]; add one for the tokens")
    inputs = RouterInputs(train=train) if inputs is None else inputs
    *rows, length, width = x.shape
    count = math.prod(rows)
    for name in _BY_TOKEN:
        array = getattr(inputs, name)
        axes = ", P" if name == "earlier_ids" else ""
        if array is not None and (jnp.shape(array)[:1] != (count * length,) or jnp.ndim(array) != 1 + bool(axes)):
            fix = f"flatten it to [{count * length}{axes}], one entry for each position"
            raise ValueError(f"{what} inputs.{name} {list(jnp.shape(array))}: x is {list(x.shape)}; {fix}")
    if inputs.sequences is None and rows:
        inputs = inputs._replace(sequences=jnp.repeat(jnp.arange(count, dtype=jnp.int32), length))
    x = x.reshape(count * length, width)
    if count * length:
        return x, inputs, count
    given = {name: getattr(inputs, name) for name in _BY_TOKEN if getattr(inputs, name) is not None}
    padded = {name: jnp.zeros((1, *jnp.shape(array)[1:]), array.dtype) for name, array in given.items()}
    return jnp.zeros((1, width), x.dtype), inputs._replace(**padded | {"valid": jnp.zeros(1, bool)}), 1


def unflatten_tokens(y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The layer's output [T, D] in the shape of its input."""
    return y[: math.prod(shape[:-1])].reshape(shape)


@contextlib.contextmanager
def needs_router_state(what: str) -> Iterator[None]:
    """Turns flax's error of a router that misses its state into one line that says where to get it.

    Raises:
      ValueError: the router misses its state.
    """
    try:
        yield
    except (flax.errors.ScopeCollectionNotFound, flax.errors.ScopeVariableNotFoundError) as error:
        fix = "apply it with the collection router_state that init returned, beside params"
        raise ValueError(f"{what}: {str(error).split(' (http')[0].rstrip('.')}; {fix}") from None
