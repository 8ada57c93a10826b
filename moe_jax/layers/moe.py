"""The routed layer: a router writes the nonzeros, the experts run them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.config import ConfigError, ModelConfig, MoEConfig, PeerConfig
from moe_jax.config.arguments import check_arguments, limited_fields
from moe_jax.config.validate.common import check_exchange_buffer
from moe_jax.dispatch.capacity import limit_assignments
from moe_jax.layers.experts import Experts
from moe_jax.layers.ffn import FeedForward
from moe_jax.layers.tokens import flatten_tokens, needs_router_state, unflatten_tokens
from moe_jax.layers.virtual_experts import VirtualExperts
from moe_jax.ops.counting import slots_per_expert
from moe_jax.ops.precision import accumulator, standard_promotion
from moe_jax.routing.statistics import experts_by_row, matrix
from moe_jax.routing.top_k import TopK
from moe_jax.types import Aux, ExpertChoice, RouterInputs, SlotMix, TokenChoice

# Arguments with the type and limits of a field of the config.
FIELDS = {
    **limited_fields(MoEConfig, without=("router", "expert_width", "shared_experts", "allow_noncausal", "execution")),
    "capacity_factor": (MoEConfig, "eval_capacity"),  # whose 0 is dropless too
    "width": (ModelConfig, "ffn_width"),
    "activation": (ModelConfig, "activation"),
    "use_bias": (ModelConfig, "ffn_bias"),
    "norm": (ModelConfig, "norm"),
    "norm_epsilon": (ModelConfig, "norm_epsilon"),
    "shared_width": (PeerConfig, "shared_width"),
    "output_init": (ModelConfig, "residual_init"),
}


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer for any Linen model.

    It has reverse-mode gradients of any order: `jax.grad` of `jax.grad` too. Forward mode (`jax.jvp`, `jax.linearize`,
    `jax.jacfwd`, `jax.hessian`) is refused by JAX with a TypeError about custom_vjp; use `jax.jacrev(jax.grad(f))`
    for a Hessian.

    Attributes:
      experts: E.
      width: hidden width F of an expert.
      top_k: experts K per token.
      router: a module called with (x [T, D], RouterInputs) that returns (assignment, losses, stats), built for as many experts
        and virtual experts as the layer has; None: softmax top-k.
      activation: "gelu_tanh", "gelu", "relu" or "swiglu".
      use_bias: biases in the experts.
      zero_experts, copy_experts, constant_experts: numbers of virtual experts beside the E, see `VirtualExperts`; the
        router has a column for each expert of all kinds.
      shared_width: hidden width of a dense network beside the experts that sees every token; 0: none.
      shared_gate: whether the output of that network is multiplied by sigmoid(x . w), with a parameter w of this name.
      capacity_factor: at most C = ceil(factor * T * K / (E + V)) assignments per expert in training; 0: dropless. On one
        device the C slots of each expert run as equal groups.
      eval_capacity: the same in evaluation; 0: dropless.
      capacity_priority: whose assignments get a slot: "token", "choice", "gate" or "probs", see `limit_assignments`; only
        "token" is causal.
      renormalise_kept: whether the gates that a token keeps are scaled to the sum of all its gates, see `limit_assignments`.
      expert_sublayers: residual sublayers of which an expert is a stack; if there are several, each has a norm of its own
        before the projections. The gate multiplies once what the stack adds to a token.
      expert_norm: whether an expert of one sublayer has that norm too.
      norm, norm_epsilon: "rmsnorm" or "layernorm", and what is added to its variance.
      backend: of `grouped_matmul`; None: the platform's best.
      exchange: "auto", "gather", "all_to_all" or "ragged": how tokens reach the experts of other devices, see
        `moe_jax.dispatch.exchange`. With several shards of experts its own statistics are among those of `Aux`.
      exchange_buffer: room for rows in "all_to_all" and "ragged", relative to an even load; a call that needs more takes
        "gather". 0: room for everything that can come.
      dtype: compute dtype; None: that of x. The router computes in float32 at least.
      output_init: factor on the standard deviation with which starts what is added to the residual stream: `w_out` of the
        experts and of the network beside them, the vectors of constant experts.
    """

    experts: int
    width: int
    top_k: int = 2
    router: nn.Module | None = None
    activation: str = "gelu_tanh"
    use_bias: bool = False
    zero_experts: int = 0
    copy_experts: int = 0
    constant_experts: int = 0
    shared_width: int = 0
    shared_gate: bool = False
    capacity_factor: float = 0.0
    eval_capacity: float = 0.0
    capacity_priority: str = "token"
    renormalise_kept: bool = False
    expert_sublayers: int = 1
    expert_norm: bool = False
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-6
    backend: str | None = None
    exchange: str | None = None
    exchange_buffer: float = 2.0
    dtype: Any = None
    output_init: float = 1.0

    @nn.compact
    @standard_promotion()
    def __call__(self, x: jax.Array, inputs: RouterInputs | None = None, *, train: bool = False) -> tuple[jax.Array, Aux]:
        """x [..., S, D] -> (y [..., S, D], Aux). Padding and dropped tokens get nothing from the experts.

        `inputs` has an entry for each of the T leading positions of x, flattened; its `train` wins over the argument. Without
        `inputs.sequences` the sequences are the rows of x. A SlotMix is always combined by the rows of x.

        Raises:
          ValueError: in one line: an argument that the config's field refuses, or that does not fit the others, the router, its
            assignment or the mesh; a mesh of Explicit axes; a router without its state.
        """
        virtual = self.zero_experts + self.copy_experts + self.constant_experts
        self._check_arguments(virtual)
        compat.refuse_explicit_axes("MoE")
        tokens, inputs, sequences = flatten_tokens(x, inputs, train, "MoE")
        router = self.router
        if router is None:
            router = TopK(self.experts, self.top_k, virtual, name="router")
        with jax.named_scope("route"):
            with needs_router_state("MoE"):
                choice, losses, stats = router(tokens, inputs)
            self._check_router(choice, stats, virtual)
            rows = {}
            if isinstance(choice, TokenChoice):
                rows["experts"] = experts_by_row(choice.expert_ids, inputs.valid, self.experts, sequences)
            if inputs.record:
                stats = {**stats, "matrix": matrix(choice, tokens.shape[0], self.experts, virtual)}
            choice, slots, dropped = self._limit(choice, tokens.shape[0], virtual, inputs.train)
            stats = {**stats, "dropped": dropped.astype(jnp.float32)}
        run = Experts(
            self.experts,
            self.width,
            self.activation,
            self.use_bias,
            self.backend,
            exchange=self.exchange,
            exchange_buffer=self.exchange_buffer,
            output_init=self.output_init,
            sublayers=self.expert_sublayers,
            norm=self.norm if self.expert_norm or self.expert_sublayers > 1 else None,
            norm_epsilon=self.norm_epsilon,
            name="experts",
        )
        tokens = tokens.astype(self.dtype or x.dtype)
        y, sent = run(tokens, choice, slots, sequences)
        if virtual:
            others = VirtualExperts(
                self.experts,
                self.zero_experts,
                self.copy_experts,
                self.constant_experts,
                output_init=self.output_init,
                name="virtual",
            )
            y = (y + others(tokens, choice)).astype(y.dtype)
        if self.shared_width:
            y = y + self._shared(tokens)
        return unflatten_tokens(y, x.shape), Aux(losses, {**stats, **sent}, rows=rows)

    def _check_arguments(self, virtual):
        check_arguments("MoE", vars(self), FIELDS)
        options = getattr(self.router, "options", None)
        if dataclasses.is_dataclass(options):
            check_arguments(f"{type(self.router).__name__}.options", vars(options), limited_fields(type(options)))
        check_exchange_buffer("MoE exchange_buffer", self.exchange_buffer)
        if self.top_k > self.experts + virtual:
            limit = f"at most experts={self.experts + virtual}"
            raise ConfigError("MoE top_k", self.top_k, limit, "lower top_k or raise experts")
        if self.shared_gate and not self.shared_width:
            raise ConfigError("MoE shared_gate", True, "shared_width=0", "raise it, or switch the gate off")
        if self.renormalise_kept and not self.capacity_factor and not self.eval_capacity:
            limit = "nothing is dropped with capacity_factor=0 and eval_capacity=0"
            raise ConfigError("MoE renormalise_kept", True, limit, "use False, or a capacity")

    def _check_router(self, choice, stats, virtual):
        """Refuses an assignment that this layer would carry out otherwise than the router means it."""
        built_for = {"experts": self.experts, "virtual experts": virtual}
        if isinstance(choice, ExpertChoice):
            built_for["experts"] = choice.token_ids.shape[0]
        elif isinstance(choice, SlotMix):
            built_for["experts"] = choice.dispatch.shape[1]
        elif "counts" in stats:
            built_for["experts"] = stats["counts"].shape[0]
            built_for["virtual experts"] = stats["virtual_counts"].shape[0] if "virtual_counts" in stats else 0
        for (name, built), own in zip(built_for.items(), (self.experts, virtual), strict=True):
            if built != own:
                limit = f"its router was built for {built} {name}"
                argument = "experts" if name == "experts" else "zero_experts + copy_experts + constant_experts"
                raise ConfigError(f"MoE {argument}", own, limit, "give both the same number")
        if isinstance(choice, TokenChoice):
            limited = self.capacity_factor or self.eval_capacity
            if limited and choice.expert_ids.shape[1] < self.top_k:
                limit = f"its router chooses {choice.expert_ids.shape[1]}, and the capacity follows top_k"
                raise ConfigError("MoE top_k", self.top_k, limit, f"use {choice.expert_ids.shape[1]}")
            return
        kind = type(choice).__name__
        off = {"capacity_factor": 0, "eval_capacity": 0, "zero_experts": 0, "copy_experts": 0, "constant_experts": 0}
        off |= {"capacity_priority": "token", "exchange": "auto", "backend": "auto"}
        for name, value in off.items():
            if getattr(self, name) not in (value, None):
                limit = f"without effect on a router that returns {kind}, which has its own slots"
                raise ConfigError(f"MoE {name}", getattr(self, name), limit, f"use {value!r}")

    def _limit(self, choice, tokens, virtual, train):
        """(choice, slots or None, assignments dropped)."""
        factor = self.capacity_factor if train else self.eval_capacity
        if not factor or not isinstance(choice, TokenChoice):
            return choice, None, jnp.zeros((), jnp.float32)
        capacity = slots_per_expert(factor, tokens, self.top_k, self.experts + virtual)
        return limit_assignments(choice, self.experts, capacity, self.capacity_priority, self.renormalise_kept)

    def _shared(self, x):
        shared = FeedForward(
            self.shared_width, self.activation, self.use_bias, x.dtype, output_init=self.output_init, name="shared"
        )
        y = shared(x)
        if not self.shared_gate:
            return y
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", None))
        kernel = self.param("shared_gate", init, (x.shape[-1], 1), jnp.float32)
        wide = accumulator(x.dtype)
        gate = jax.nn.sigmoid(jnp.dot(x.astype(wide), kernel.astype(wide), precision=jax.lax.Precision.HIGHEST))
        return (y * gate).astype(y.dtype)
