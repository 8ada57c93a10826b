"""The experts' weights."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.config.validate.common import must_divide
from moe_jax.dispatch.capacity import Slots, run_slots
from moe_jax.dispatch.exchange import run_local, run_sharded
from moe_jax.dispatch.filled_slots import run_chosen, run_mixed
from moe_jax.layers.initializers import scaled
from moe_jax.ops.activations import is_gated
from moe_jax.ops.expert_ffn import expert_ffn
from moe_jax.ops.grouped_matmul import BACKENDS, resolve_backend
from moe_jax.ops.split_experts import MOST_TOKENS, split_expert_ffn
from moe_jax.sharding import mesh_axis, mesh_spec
from moe_jax.types import Assignment, ExpertChoice, SlotMix, TokenChoice

# Logical axes of what an expert may have, its norm too; `moe_jax.sharding` says which mesh axes they are split over.
WEIGHT_AXES = {
    "w_in": ("experts", "embed", "mlp"),
    "w_gate": ("experts", "embed", "mlp"),
    "w_out": ("experts", "mlp", "embed"),
    "b_in": ("experts", "mlp"),
    "b_gate": ("experts", "mlp"),
    "b_out": ("experts", None),
    "norm_scale": ("experts", None),
    "norm_bias": ("experts", None),
}

# Fan-in of one expert, not of all E together.
EXPERT_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=(0,))


class Experts(nn.Module):
    """E feed-forward networks of width F and the sum of their gated outputs.

    Parameters: w_in [E, D, F], w_out [E, F, D], for a gated activation w_gate [E, D, F]; with `use_bias` b_in
    [E, F], b_gate [E, F], b_out [E, D]. Each may be a tuple of its E parts instead, for decoding on one device:
    `split_expert_ffn` then runs up to `MOST_TOKENS` tokens. `exchange` and `exchange_buffer` are those of
    `moe_jax.dispatch.exchange.run_sharded`; `output_init` is a factor on the standard deviation with which w_out starts.
    """

    experts: int
    width: int
    activation: str = "gelu_tanh"
    use_bias: bool = False
    backend: str | None = None
    param_dtype: Any = jnp.float32
    exchange: str | None = None
    exchange_buffer: float = 2.0
    output_init: float = 1.0

    def _weights(self, width: int) -> dict[str, jax.Array]:
        """By name, for tokens of D = `width`."""
        branches = ("in", "out", "gate") if is_gated(self.activation) else ("in", "out")
        # The order decides which parameter is initialised from which key.
        names = [f"{kind}_{branch}" for kind in ("wb" if self.use_bias else "w") for branch in branches]
        sizes = {"experts": self.experts, "embed": width, "mlp": self.width, None: width}

        def weight(name):
            stored = self.get_variable("params", name)
            if isinstance(stored, tuple):
                return stored
            axes = WEIGHT_AXES[name]
            init = EXPERT_INIT if len(axes) == 3 else nn.initializers.zeros_init()
            init = scaled(init, self.output_init) if name == "w_out" else init
            shape = tuple(sizes[axis] for axis in axes)
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)

        return {name: weight(name) for name in names}

    @nn.compact
    def __call__(
        self, x: jax.Array, choice: Assignment, slots: Slots | None = None, sequences: int = 1
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x [T, D], choice over E experts -> (y [T, D], stats), computed in the dtype of x.

        A `SlotMix` has `sequences` sequences of equal length. A `TokenChoice` runs in a shard_map where
        `jax.set_mesh` has a mesh of more than one device: the work is split over the axes data, fsdp, expert and
        tensor, and repeated along any other. On one device, given the `slots` that the choice was limited to, the
        experts run as equal groups of C rows. The statistics are those of the exchange, if the axis expert has
        more than one shard; else none.
        """
        weights = self._weights(x.shape[-1])
        if self.is_initializing():
            return jnp.zeros_like(x), {}
        weights = {name: jax.tree.map(lambda w: w.astype(x.dtype), weight) for name, weight in weights.items()}
        if isinstance(weights["w_in"], tuple):
            if isinstance(choice, TokenChoice) and x.shape[0] <= MOST_TOKENS:
                with jax.named_scope("experts"):
                    return split_expert_ffn(x, *choice, weights, activation=self.activation).astype(x.dtype), {}
            weights = {name: jnp.stack(of_experts) for name, of_experts in weights.items()}

        if isinstance(choice, ExpertChoice):
            return run_chosen(x, choice, weights, activation=self.activation), {}
        if isinstance(choice, SlotMix):
            return run_mixed(x, choice, weights, sequences, activation=self.activation), {}

        def run_experts(x, weights, order, gates):
            return expert_ffn(
                x,
                weights,
                order.group_sizes,
                activation=self.activation,
                gates=gates,
                order=order.order,
                inverse=order.inverse,
                backend=self.backend,
            )

        mesh = compat.current_mesh()
        if mesh is None or mesh.size == 1 or compat.inside_shard_map(mesh):
            if slots is not None:
                return run_slots(x, choice.gates, slots, weights, activation=self.activation), {}
            return run_local(x, choice, weights, run_experts), {}
        for argument, axis, size in (
            ("experts", "experts", self.experts),
            ("width", "mlp", self.width),
            ("x.shape[-1]", "embed", x.shape[-1]),
        ):
            must_divide(f"mesh axis {mesh_axis(axis)}", compat.axis_size(mesh, mesh_axis(axis)), f"MoE {argument}", size)
        return run_sharded(
            mesh,
            x,
            choice,
            weights,
            {name: mesh_spec(mesh, WEIGHT_AXES[name]) for name in weights},
            run_experts,
            exchange=self.exchange,
            buffer_factor=self.exchange_buffer,
            check=BACKENDS[resolve_backend(self.backend)].typed,
        )
