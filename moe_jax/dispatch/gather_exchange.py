"""Expert parallelism by all-gather and reduce-scatter over the mesh axis `expert`.

Every shard sees the tokens of its whole expert group, runs the rows of its own experts, and the partial sums
are scattered back. Shapes are static, nothing can overflow, and each shard's work follows the rows that its
experts received.
"""

from typing import Callable, Mapping

import jax

from moe_jax import compat
from moe_jax.compat import BATCH_AXES
from moe_jax.dispatch.permute import combine_rows, gather_rows, sort_by_expert
from moe_jax.types import TokenChoice

# Where each expert weight is split: E over `expert`, D over `fsdp`, F over `tensor`.
WEIGHT_SPECS = {
    "w_in": ("expert", "fsdp", "tensor"),
    "w_gate": ("expert", "fsdp", "tensor"),
    "w_out": ("expert", "tensor", "fsdp"),
    "b_in": ("expert", "tensor"),
    "b_gate": ("expert", "tensor"),
    "b_out": ("expert", None),
}

# (rows [M, D], weights, group_sizes [E_local]) -> [M, D]
RunExperts = Callable[[jax.Array, Mapping[str, jax.Array], jax.Array], jax.Array]


def run_local(x: jax.Array, choice: TokenChoice, weights, run_experts: RunExperts) -> jax.Array:
    """The whole layer on one device: sort, gather, experts, combine. x [T, D] -> [T, D]."""
    experts = weights["w_in"].shape[0]
    with jax.named_scope("sort"):
        order = sort_by_expert(choice.expert_ids, experts)
        rows = gather_rows(x, order)
    with jax.named_scope("experts"):
        rows = run_experts(rows, weights, order.group_sizes)
    with jax.named_scope("combine"):
        return combine_rows(rows, choice.gates, order)


def run_sharded(mesh, x: jax.Array, choice: TokenChoice, weights, run_experts: RunExperts) -> jax.Array:
    """`run_local` over `mesh`: x [T, D] -> [T, D], both split over (data, fsdp, expert) when T divides.

    Args:
      mesh: with some of the axes data, fsdp, expert, tensor. E, D and F of `weights` must divide as
        `WEIGHT_SPECS` says.
      x, choice: global arrays.
      weights: as in `expert_ffn`.
      run_experts: runs one shard's rows; partial sums over F are allowed, they are added over `tensor`.
    """
    names = tuple(name for name in BATCH_AXES if name in mesh.shape)
    split = x.shape[0] % compat.axis_size(mesh, *names) == 0
    rows_spec = compat.PartitionSpec(names if split else None)
    weight_specs = {name: _spec(mesh, WEIGHT_SPECS[name]) for name in weights}
    # An axis of size 1 takes the same way: its collectives cost nothing and settle the replication types.
    expert_parallel = "expert" in mesh.shape

    def shard(x, ids, gates, weights):
        weights = {name: _gather_width(mesh, name, w, varying=split) for name, w in weights.items()}
        if expert_parallel:
            with jax.named_scope("exchange"):
                if split:
                    x, ids, gates = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, ids, gates))
                ids = ids - jax.lax.axis_index("expert") * weights["w_in"].shape[0]
        y = run_local(x, TokenChoice(ids, gates), weights, run_experts)
        with jax.named_scope("exchange"):
            if expert_parallel:
                if split:
                    y = jax.lax.psum_scatter(y, "expert", tiled=True)
                else:
                    y = jax.lax.psum(y, "expert")
            return jax.lax.psum(y, "tensor") if "tensor" in mesh.shape else y

    run = compat.shard_map(shard, mesh, (rows_spec, rows_spec, rows_spec, weight_specs), rows_spec)
    return run(x, choice.expert_ids, choice.gates, weights)


def _spec(mesh, axes):
    return compat.PartitionSpec(*(axis if axis in mesh.shape else None for axis in axes))


def _gather_width(mesh, name, weight, varying):
    """Collects the parts of D from the shards of `fsdp`; a bias of the output counts once over `tensor`."""
    if "fsdp" in mesh.shape and "fsdp" in WEIGHT_SPECS[name]:
        axis = WEIGHT_SPECS[name].index("fsdp")
        to = "varying" if varying else "invarying"
        weight = jax.lax.all_gather(weight, "fsdp", axis=axis, tiled=True, to=to)
    if name == "b_out" and "tensor" in mesh.shape:
        weight = weight * (jax.lax.axis_index("tensor") == 0)
    return weight
