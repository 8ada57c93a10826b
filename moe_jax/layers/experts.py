"""The experts' weights."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.config.validate.common import must_divide
from moe_jax.dispatch.capacity import Slots, run_slots
from moe_jax.dispatch.exchange import run_local, run_sharded
from moe_jax.dispatch.filled_slots import run_chosen, run_mixed
from moe_jax.dispatch.permute import Order, add_up_rows, gather_rows
from moe_jax.layers.initializers import scaled
from moe_jax.ops.activations import is_gated
from moe_jax.ops.expert_ffn import expert_ffn, expert_stack
from moe_jax.ops.grouped_matmul import BACKENDS, resolve_backend
from moe_jax.ops.residual_stack import Weights
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


class Sublayer(nn.Module):
    """The weights of one feed-forward sublayer of E experts, see `Experts`."""

    experts: int
    width: int
    activation: str
    use_bias: bool
    norm: str | None
    param_dtype: Any
    output_init: float

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array]:
        """By name, for tokens of D = `width`."""
        return sublayer_weights(self, width)


def sublayer_weights(module: nn.Module, width: int) -> dict[str, jax.Array]:
    """The parameters of a `Sublayer`, or of `Experts` of one, as those of `module`."""
    branches = ("in", "out", "gate") if is_gated(module.activation) else ("in", "out")
    # The order decides which parameter is initialised from which key.
    names = [f"{kind}_{branch}" for kind in ("wb" if module.use_bias else "w") for branch in branches]
    names += {None: [], "rmsnorm": ["norm_scale"], "layernorm": ["norm_scale", "norm_bias"]}[module.norm]
    sizes = {"experts": module.experts, "embed": width, "mlp": module.width, None: width}

    def weight(name):
        stored = module.get_variable("params", name)
        if isinstance(stored, tuple):
            return stored
        axes = WEIGHT_AXES[name]
        init = EXPERT_INIT if len(axes) == 3 else nn.initializers.zeros_init()
        init = scaled(init, module.output_init) if name == "w_out" else init
        init = nn.initializers.ones_init() if name == "norm_scale" else init
        shape = tuple(sizes[axis] for axis in axes)
        return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.param_dtype)

    return {name: weight(name) for name in names}


class Experts(nn.Module):
    """E feed-forward networks of width F, or stacks of such, and the sum of their gated outputs.

    Parameters: w_in [E, D, F], w_out [E, F, D], for a gated activation w_gate [E, D, F]; with `use_bias` b_in
    [E, F], b_gate [E, F], b_out [E, D]; with a `norm` before the projections norm_scale [E, D] and, of layernorm, norm_bias
    [E, D]. Those of more than one of the `sublayers` are in sublayer_0, sublayer_1, ... Each may be a tuple of its E parts
    instead, for decoding on one device: `split_expert_ffn` then runs up to `MOST_TOKENS` tokens.

    A stack adds to a token what `moe_jax.ops.residual_stack` says, times the gate, which multiplies it once. `exchange` and
    `exchange_buffer` are those of `moe_jax.dispatch.exchange.run_sharded`; `output_init` is a factor on the standard deviation
    with which w_out starts.
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
    sublayers: int = 1
    norm: str | None = None
    norm_epsilon: float = 1e-6

    def _weights(self, width: int) -> tuple[dict[str, jax.Array], ...]:
        """Of each sublayer, for tokens of D = `width`."""
        if self.sublayers == 1:
            return (sublayer_weights(self, width),)
        own = (self.experts, self.width, self.activation, self.use_bias, self.norm, self.param_dtype, self.output_init)
        return tuple(Sublayer(*own, name=f"sublayer_{i}")(width) for i in range(self.sublayers))

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
        sublayers = self._weights(x.shape[-1])
        if self.is_initializing():
            return jnp.zeros_like(x), {}
        sublayers = jax.tree.map(lambda w: w.astype(x.dtype), sublayers)
        network = {"activation": self.activation, "norm_epsilon": self.norm_epsilon}
        if isinstance(sublayers[0]["w_in"], tuple):
            if isinstance(choice, TokenChoice) and x.shape[0] <= MOST_TOKENS:
                with jax.named_scope("experts"):
                    return split_expert_ffn(x, *choice, sublayers, **network).astype(x.dtype), {}
            sublayers = tuple({name: jnp.stack(of_experts) for name, of_experts in weights.items()} for weights in sublayers)

        if isinstance(choice, ExpertChoice):
            return run_chosen(x, choice, sublayers, **network), {}
        if isinstance(choice, SlotMix):
            return run_mixed(x, choice, sublayers, sequences, **network), {}

        mesh, options = compat.current_mesh(), {**network, "backend": self.backend}
        if mesh is None or mesh.size == 1 or compat.inside_shard_map(mesh):
            if slots is not None:
                return run_slots(x, choice.gates, slots, sublayers, **network), {}
            return run_local(x, choice, sublayers, functools.partial(run_rows, **options)), {}
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
            sublayers,
            {name: mesh_spec(mesh, axes) for name, axes in WEIGHT_AXES.items()},
            functools.partial(run_rows, axis="tensor" if "tensor" in mesh.shape else None, **options),
            exchange=self.exchange,
            buffer_factor=self.exchange_buffer,
            check=BACKENDS[resolve_backend(self.backend)].typed,
        )


def run_rows(
    x: jax.Array, sublayers: Sequence[Weights], order: Order, gates: jax.Array | None, axis: str | None = None, **options
) -> jax.Array:
    """One shard's rows through their experts and back to the tokens; see `moe_jax.dispatch.exchange.common.RunExperts`.

    Args:
      x: [T, D].
      sublayers: the weights of each.
      order: of the M = T*K rows.
      gates: [M] or None.
      axis: mesh axis that splits F, inside a shard_map.
      **options: of `moe_jax.ops.expert_ffn.expert_ffn`.
    """
    if len(sublayers) == 1:
        return expert_ffn(x, sublayers[0], order.group_sizes, gates=gates, order=order.order, inverse=order.inverse, **options)
    added = expert_stack(gather_rows(x, order), sublayers, order.group_sizes, axis=axis, **options)
    return add_up_rows(added, gates, order, x.shape[0])
