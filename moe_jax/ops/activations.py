"""The nonlinearities of feed-forward layers and experts, by the name they have in the config."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.custom_jvp
def _gelu(h):
    return jax.nn.gelu(h, approximate=False)


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    # h * Phi(h), differentiated by hand: the library's derivative of erf (jax 0.12.0) cannot be traced in a
    # shard_map.
    (h,), (d_h,) = primals, tangents
    density = jnp.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    distribution = 0.5 * jax.lax.erfc(-h / math.sqrt(2))
    return _gelu(h), d_h * (distribution + h * density)


_POINTWISE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": lambda h: jax.nn.gelu(h, approximate=True),
    "gelu": _gelu,
    "relu": jax.nn.relu,
}
# The function of the gate branch; the other branch stays linear.
_GATED: dict[str, Callable[[jax.Array], jax.Array]] = {"swiglu": jax.nn.silu}

ACTIVATIONS: tuple[str, ...] = (*_POINTWISE, *_GATED)
# E[activate(kind, h, g)^2] of independent standard normal h and g.
SECOND_MOMENT = {"gelu_tanh": 0.42519, "gelu": 0.42522, "relu": 0.5, "swiglu": 0.35578}


def is_gated(kind: str) -> bool:
    """Whether `kind` multiplies two projections of its input.

    Args:
      kind: one of `ACTIVATIONS`.

    Returns:
      True if `activate` needs a gate.

    Raises:
      ValueError: `kind` is unknown.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation={kind!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    return kind in _GATED


def activation_fn(kind: str) -> Callable[[jax.Array], jax.Array]:
    """The pointwise function of `kind`: of the hidden state, or of the gate if `kind` is gated.

    Args:
      kind: one of `ACTIVATIONS`. `gelu` is the exact form with erf, `gelu_tanh` its approximation (Hendrycks
        and Gimpel, arXiv:1606.08415); `swiglu` gates with silu (Shazeer, arXiv:2002.05202).

    Returns:
      A function of an array of any shape to one of the same shape and dtype.

    Raises:
      ValueError: `kind` is unknown.
    """
    return _GATED[kind] if is_gated(kind) else _POINTWISE[kind]


def activate(kind: str, h: jax.Array, g: jax.Array | None = None) -> jax.Array:
    """Applies an activation to the hidden state of a feed-forward layer.

    Args:
      kind: one of `ACTIVATIONS`.
      h: [..., F], the input projection.
      g: [..., F], the gate projection of a gated kind; None for the others.

    Returns:
      [..., F] in the dtype of `h`: `f(g) * h` for a gated kind, else `f(h)`.

    Raises:
      ValueError: `kind` is unknown, or `g` is missing or superfluous.
    """
    if is_gated(kind) != (g is not None):
        raise ValueError(f"activation={kind!r} {'needs a gate' if g is None else 'takes no gate'}")
    if g is None:
        return activation_fn(kind)(h)
    return jnp.multiply(activation_fn(kind)(g), h)
