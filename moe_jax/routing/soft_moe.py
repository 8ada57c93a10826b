"""Soft MoE: an expert's slots are mixtures of a sequence's tokens, and a token is a mixture of the slots (arXiv:2308.00951)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.ops.precision import accumulator
from moe_jax.routing.contract import Router, usable_tokens
from moe_jax.routing.statistics import sums, token_statistics
from moe_jax.types import RouterInputs, SlotMix


class SoftMoE(nn.Module):
    """The router `soft_moe`: parameters `kernel` [D, E, C], whose columns are the slots, and the scalar `scale`.

    Logits are scale * x/|x| . kernel/|kernel|; `dispatch` is their softmax over the valid tokens of a sequence, `combine` that
    over the slots (equations 1 to 3 and section 2.3).
    """

    experts: int
    slots: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[SlotMix, dict, dict]:
        """x [T, D] -> (SlotMix, no losses, stats). Counts are those of the tokens' mass in the experts' outputs."""
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2)), ("embed", None, None))
        kernel = self.param("kernel", init, (x.shape[-1], self.experts, self.slots), self.param_dtype)
        scale = self.param("scale", nn.initializers.ones_init(), (), self.param_dtype)
        dtype = accumulator(x.dtype)
        valid, clean = usable_tokens(x, inputs)
        x, kernel = jnp.where(clean[:, None], x, 0).astype(dtype), kernel.astype(dtype)
        logits = jnp.einsum(
            "TD,DEC->TEC", _unit(x, -1), _unit(kernel, 0) * scale.astype(dtype), precision=jax.lax.Precision.HIGHEST
        )
        routed = clean & jnp.all(jnp.isfinite(logits), axis=(1, 2))
        logits = jnp.where(routed[:, None, None], logits, 0)
        mix = SlotMix(
            _softmax_over_tokens(logits, routed, inputs.sequences),
            jnp.where(routed[:, None, None], jax.nn.softmax(logits, axis=(1, 2)), 0),
        )
        mass = jnp.sum(mix.combine, axis=2)
        stats = sums({"counts": jnp.sum(mass, axis=0), **token_statistics(mass, routed, routed | ~valid)})
        return mix, {}, stats


def _unit(a, axis):
    return a * jax.lax.rsqrt(jnp.sum(a * a, axis=axis, keepdims=True) + 1e-12)


def _softmax_over_tokens(logits, routed, sequences):
    """Softmax [T, E, C] over the routed tokens of each sequence."""
    tokens = logits.shape[0]
    sequences = jnp.zeros(tokens, jnp.int32) if sequences is None else sequences
    row = jnp.where(routed, sequences, tokens)
    # The products of unit vectors are at most 1, but the scale is learned and may be large.
    top = jax.ops.segment_max(jax.lax.stop_gradient(logits), row, tokens + 1)[row]
    e = jnp.where(routed[:, None, None], jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = jax.ops.segment_sum(e, row, tokens + 1)[row]
    return jnp.where(routed[:, None, None], e / jnp.where(total > 0, total, 1), 0)


ROUTER = Router(build=lambda sizes, options: SoftMoE(sizes.experts, options.slots, parent=None))
