"""Experts without matrices, beside those of a routed layer (MoE++, arXiv:2410.07348, section 3.1)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.initializers import scaled
from moe_jax.ops.precision import accumulator
from moe_jax.types import TokenChoice


class VirtualExperts(nn.Module):
    """Zero experts, then copy experts, then constant ones: ids E+1, E+2, ... of a `TokenChoice`.

    A zero expert returns 0, a copy expert its input, a constant expert a x + b v with (a, b) = softmax(x mix). Parameters, with
    constant experts: `constant` [constants, D], v, and `mix` [constants, D, 2]. `output_init` is a factor on the standard
    deviation with which v starts.
    """

    experts: int
    zeros: int = 0
    copies: int = 0
    constants: int = 0
    param_dtype: Any = jnp.float32
    output_init: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, choice: TokenChoice) -> jax.Array:
        """x [T, D] -> what these experts add, [T, D] in float32 at least."""
        wide = accumulator(x.dtype)
        first = self.experts + 1 + self.zeros

        def gate(start, count):  # [T, count]
            ids = choice.expert_ids[:, :, None] - start
            return jnp.sum(jnp.where(ids == jnp.arange(count), choice.gates[:, :, None], 0), axis=1).astype(wide)

        # Tokens that are routed nowhere may hold anything, and 0 * NaN would not be 0.
        x = jnp.where(jnp.any(choice.expert_ids >= first, axis=1, keepdims=True), x, 0).astype(wide)
        share = jnp.sum(gate(first, self.copies), axis=1)
        y = 0.0
        if self.constants:
            v = self._parameter("constant", scaled(nn.initializers.normal(0.02), self.output_init), x.shape[1]).astype(wide)
            mix = self._parameter("mix", nn.initializers.lecun_normal(batch_axis=0), x.shape[1], 2).astype(wide)
            gates = gate(first + self.copies, self.constants)
            logits = jnp.einsum("TD,VDM->TVM", x, mix, precision=jax.lax.Precision.HIGHEST)
            parts = jax.nn.softmax(logits, axis=-1) * gates[..., None]
            share = share + jnp.sum(parts[..., 0], axis=1)
            y = jnp.dot(parts[..., 1], v, precision=jax.lax.Precision.HIGHEST)
        return y + share[:, None] * x

    def _parameter(self, name, init, *shape):
        names = (None, "embed", None)[: 1 + len(shape)]
        return self.param(name, nn.with_logical_partitioning(init, names), (self.constants, *shape), self.param_dtype)
