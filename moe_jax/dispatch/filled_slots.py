"""Experts over slots that the router filled itself: `ExpertChoice` and `SlotMix`.

Plain products over [E, C, D]; on a mesh the experts of a slot stay where they are, and the compiler moves the tokens.
"""

from typing import Sequence

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.dispatch.capacity import slots_stack
from moe_jax.ops.precision import accumulator, batched_product
from moe_jax.ops.residual_stack import Weights
from moe_jax.types import ExpertChoice, SlotMix


def run_chosen(x: jax.Array, choice: ExpertChoice, sublayers: Sequence[Weights], **options) -> jax.Array:
    """Each expert over the tokens that it chose: x [T, D] -> [T, D] in the dtype of x; options: of `slots_ffn`.

    The outputs are added to their tokens in float32 at least. A token may be in any number of slots, so that this is a
    scatter-add, whose order, and so whose last bits, a GPU does not promise.
    """
    with jax.named_scope("sort"):
        rows = jnp.take(x, choice.token_ids, axis=0, mode="fill", fill_value=0)
        rows = compat.constrain(rows, ("expert",), ("data", "fsdp"), ())
    with jax.named_scope("experts"):
        rows = slots_stack(rows, sublayers, **options)
    with jax.named_scope("combine"):
        wide = accumulator(x.dtype)
        rows = rows.astype(wide) * choice.gates.astype(wide)[..., None]
        y = jnp.zeros(x.shape, wide).at[choice.token_ids].add(rows, mode="drop")
        return compat.constrain(y.astype(x.dtype), compat.BATCH_AXES, ())


def run_mixed(x: jax.Array, mix: SlotMix, sublayers: Sequence[Weights], sequences: int, **options) -> jax.Array:
    """Each expert over its mixtures of every sequence: x [T, D], T = B*S with B = `sequences` -> [T, D] in the dtype of x.

    options: of `slots_ffn`.
    """
    (experts, slots), width = mix.dispatch.shape[1:], x.shape[1]
    by_sequence = lambda a: a.reshape(sequences, -1, *a.shape[1:])
    # Padding may hold anything, and 0 * NaN would not be 0.
    used = jnp.any(mix.dispatch != 0, axis=(1, 2))
    x = jnp.where(used[:, None], x, 0)
    with jax.named_scope("sort"):
        rows = batched_product("BSEC,BSD->EBCD", by_sequence(mix.dispatch).astype(x.dtype), by_sequence(x))
        rows = rows.astype(x.dtype).reshape(experts, sequences * slots, width)
        rows = compat.constrain(rows, ("expert",), ("data", "fsdp"), ())
    with jax.named_scope("experts"):
        rows = slots_stack(rows, sublayers, **options).reshape(experts, sequences, slots, width)
    with jax.named_scope("combine"):
        y = batched_product("BSEC,EBCD->BSD", by_sequence(mix.combine).astype(x.dtype), rows)
        return compat.constrain(y.reshape(x.shape).astype(x.dtype), compat.BATCH_AXES, ())
