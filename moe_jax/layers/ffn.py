"""The dense feed-forward layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.initializers import scaled
from moe_jax.ops import activations

# Variance 1/fan_in, truncated at two standard deviations. Also the initializer of the attention projections.
MATRIX_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class FeedForward(nn.Module):
    """Two projections with a nonlinearity between them, or three with a gate.

    Parameters: `w_in` [D, F], `w_out` [F, D], with a gated activation `w_gate` [D, F]; with `use_bias` also
    `b_in` [F], `b_gate` [F], `b_out` [D].

    Attributes:
      hidden: hidden width F.
      activation: one of `moe_jax.ops.activations.ACTIVATIONS`.
      use_bias: adds a bias to every projection.
      dtype: compute dtype; the result has it.
      param_dtype: dtype of the parameters.
      output_init: factor on the standard deviation with which `w_out` starts.
    """

    hidden: int
    activation: str = "gelu_tanh"
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    output_init: float = 1.0

    def _parameter(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        init = MATRIX_INIT if len(shape) > 1 else nn.initializers.zeros_init()
        init = scaled(init, self.output_init) if name == "w_out" else init
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype).astype(self.dtype)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
          x: [..., D] of any float dtype.

        Returns:
          [..., D] of `dtype`.

        Raises:
          ValueError: `activation` is unknown.
        """
        shape, width, gated = x.shape, x.shape[-1], activations.is_gated(self.activation)
        # With one axis of tokens XLA's products and their gradients take half the time on a CPU.
        x = x.reshape(-1, width).astype(self.dtype)

        def project(branch: str) -> jax.Array:
            h = x @ self._parameter(f"w_{branch}", (width, self.hidden), ("embed", "mlp"))
            return h + self._parameter(f"b_{branch}", (self.hidden,), ("mlp",)) if self.use_bias else h

        h = activations.activate(self.activation, project("in"), project("gate") if gated else None)
        y = h @ self._parameter("w_out", (self.hidden, width), ("mlp", "embed"))
        y = y + self._parameter("b_out", (width,), ("embed",)) if self.use_bias else y
        return y.reshape(shape)
