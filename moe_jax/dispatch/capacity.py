"""At most C assignments per expert, run in C slots each, without arrays of shape [T, E, C].

One stable sort ranks the assignments within their experts; the first C of each expert get a slot. Slots are
filled and emptied by gathers, in both directions of differentiation.
"""

from typing import Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.dispatch.permute import Order, combine_rows, gather_rows
from moe_jax.ops.activations import activate, is_gated
from moe_jax.ops.counting import count_experts
from moe_jax.ops.norms import norm_before
from moe_jax.ops.precision import accumulator
from moe_jax.ops.residual_stack import Weights, residual_stack
from moe_jax.types import TokenChoice

# Who gets a slot first. With all but the first a later token can take the slot of an earlier one.
PRIORITIES = ("token", "choice", "gate", "probs")


class Slots(NamedTuple):
    """Which assignment (t, k), numbered t*K + k, sits in which slot (e, c), numbered e*C + c.

    assignment: int32 [E, C], the assignment in each slot; T*K: empty. slot: int32 [T, K], the slot of each
    assignment; E*C: none.
    """

    assignment: jax.Array
    slot: jax.Array


def limit_assignments(
    choice: TokenChoice, experts: int, capacity: int, priority: str = "token", renormalise: bool = False
) -> tuple[TokenChoice, Slots, jax.Array]:
    """Keeps C assignments of every expert.

    Args:
      choice: ids and gates [T, K].
      experts: E.
      capacity: C.
      priority: who stays; ties are in token order.
        "token": earlier tokens first (Switch, arXiv:2101.03961). It is the only causal one.
        "choice": all first choices before any second choice, each in token order (GShard, arXiv:2006.16668).
        "gate": all first choices before any second choice, each in the order of the tokens' highest gates (batch-prioritised
          routing of V-MoE, arXiv:2106.05974, section 4.1, and google-research/vmoe).
        "probs": the highest gates, whichever choice they are (the drop policy of this name in Megatron-LM and DeepSpeed).
      renormalise: whether the gates that a token keeps are multiplied by one factor, so that they sum to what all
        its gates summed to. Where that sum was 1, fairseq and DeepSpeed do the same after dropping. With one gate a
        token nothing changes, and no gate loses its gradient. False: the gates of what stays are unchanged.

    Returns:
      The choice, with "no expert" and a gate of 0 for the rest; the slots of what stays, in the order of
      priority; the int32 number of assignments dropped.

    Raises:
      ValueError: an unknown priority.
    """
    if priority not in PRIORITIES:
        raise ValueError(f"capacity_priority={priority!r}: one of {', '.join(PRIORITIES)}")
    ids, (tokens, k) = choice.expert_ids, choice.expert_ids.shape
    real = ((ids >= 0) & (ids < experts)).reshape(-1)
    flat = jnp.where(real, ids.reshape(-1), experts)
    column, gates = jnp.tile(jnp.arange(k, dtype=jnp.int32), tokens), jax.lax.stop_gradient(choice.gates)
    keys = {
        "token": (),
        "choice": (column,),
        "gate": (column, -jnp.repeat(jnp.max(gates, axis=1), k)),
        "probs": (-gates.reshape(-1),),
    }[priority]
    order = _argsort(flat, *keys)
    inverse = compat.argsort(order)
    sizes = count_experts(ids, experts)
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes

    column = jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.minimum(starts[:, None] + column, tokens * k - 1)
    assignment = jnp.where(column < sizes[:, None], order[row], tokens * k)
    rank = inverse - starts[jnp.minimum(flat, experts - 1)]
    kept = real & (rank < capacity)
    slot = jnp.where(kept, flat * capacity + rank, experts * capacity)

    kept_ids = jnp.where(kept | ~real, ids.reshape(-1), experts).reshape(ids.shape)
    gates = jnp.where(kept_ids == experts, 0, choice.gates)
    if renormalise:
        before, after = (jnp.sum(a, axis=1, keepdims=True) for a in (jnp.where(ids == experts, 0, choice.gates), gates))
        # The gradient divides by the square, which must not underflow.
        gates = gates * (before / jnp.maximum(after, jnp.finfo(gates.dtype).tiny ** 0.5))
    dropped = jnp.sum(real & ~kept, dtype=jnp.int32)
    return TokenChoice(kept_ids, gates), Slots(assignment, slot.reshape(ids.shape)), dropped


def run_slots(
    x: jax.Array,
    gates: jax.Array,
    slots: Slots,
    sublayers: Sequence[Weights],
    *,
    activation: str,
    norm_epsilon: float = 1e-5,
) -> jax.Array:
    """The experts over their slots on one device: fill, equal groups, combine.

    Args:
      x: [T, D].
      gates: [T, K]; the sum over a token's experts is accumulated in float32 at least.
      slots: from `limit_assignments`.
      sublayers, activation, norm_epsilon: as in `moe_jax.ops.expert_ffn.expert_stack`.

    Returns:
      [T, D] in the dtype of x; 0 for a token without a slot.
    """
    (experts, capacity), sizes = slots.assignment.shape, jnp.sum(slots.assignment < gates.size, axis=1)
    order = Order(slots.assignment.reshape(-1), slots.slot.reshape(-1), sizes)
    with jax.named_scope("sort"):
        rows = gather_rows(x, order).reshape(experts, capacity, -1)
    with jax.named_scope("experts"):
        rows = slots_stack(rows, sublayers, activation=activation, norm_epsilon=norm_epsilon)
    with jax.named_scope("combine"):
        return combine_rows(rows.reshape(experts * capacity, -1), gates, order, x.dtype)


def slots_stack(rows: jax.Array, sublayers: Sequence[Weights], **options) -> jax.Array:
    """What each row's expert adds to it: [E, C, D] -> [E, C, D]. sublayers as in `expert_stack`; options: of `slots_ffn`."""
    return residual_stack(rows, sublayers, lambda rows, weights: slots_ffn(rows, weights, **options))


def slots_ffn(rows: jax.Array, weights: Mapping[str, jax.Array], *, activation: str, norm_epsilon: float = 1e-5) -> jax.Array:
    """Equal groups of rows, each through its expert: [E, C, D] -> [E, C, D]. Arguments as in `expert_ffn`."""
    weights = {name: weight.astype(rows.dtype) for name, weight in weights.items()}
    vectors = {name: weight[:, None] for name, weight in weights.items() if name.startswith("norm_")}
    rows = norm_before(rows, vectors, norm_epsilon)

    def project(x, name, axes="ECD,EDF->ECF"):
        y = jnp.einsum(axes, x, weights["w_" + name])
        if "b_" + name not in weights:
            return y
        # The bias's gradient is a sum over slots: in bfloat16 it would stop growing at 256 of them.
        bias = weights["b_" + name].astype(accumulator(y.dtype))[:, None]
        return y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)

    gate = project(rows, "gate") if is_gated(activation) else None
    return project(activate(activation, project(rows, "in"), gate), "out", "ECF,EFD->ECD")


def _argsort(*keys):
    """Stable argsort of [M] by the first key, then the next, int32; see `compat.argsort`."""
    keys = compat.vary_alike(*keys)
    index = jnp.arange(keys[0].shape[0], dtype=jnp.int32)
    return jax.lax.sort((*keys, index), num_keys=len(keys), is_stable=True)[-1]
