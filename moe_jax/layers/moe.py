"""The routed layer: a router writes the nonzeros, the experts run them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.dispatch.capacity import limit_assignments
from moe_jax.layers.experts import Experts
from moe_jax.layers.ffn import FeedForward
from moe_jax.layers.virtual_experts import VirtualExperts
from moe_jax.ops.counting import slots_per_expert
from moe_jax.ops.precision import accumulator
from moe_jax.routing.statistics import matrix
from moe_jax.routing.top_k import TopK
from moe_jax.types import Aux, RouterInputs, TokenChoice


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer for any Linen model.

    Attributes:
      experts: E.
      width: hidden width F of an expert.
      top_k: experts K per token.
      router: a module called with (x [T, D], RouterInputs) that returns (assignment, losses, stats); None:
        softmax top-k.
      activation: "gelu_tanh", "gelu", "relu" or "swiglu".
      use_bias: biases in the experts.
      zero_experts, copy_experts, constant_experts: virtual experts beside the E, see `VirtualExperts`; the router's
        columns are E + their number.
      shared_width: hidden width of a dense network beside the experts that sees every token; 0: none.
      shared_gate: multiplies its output by sigmoid(x . shared_gate).
      capacity_factor: at most C = ceil(factor * T * K / (E + V)) assignments per expert in training; 0: dropless.
      eval_capacity: the same in evaluation; 0: dropless.
      capacity_priority: "token", "choice" or "gate", see `limit_assignments`; only "token" is causal. On one
        device the C slots of each expert run as equal groups.
      backend: of `grouped_matmul`; None: the platform's best.
      exchange: "auto", "gather", "all_to_all" or "ragged": how tokens reach the experts of other devices, see
        `moe_jax.dispatch.exchange`. More than one shard of experts adds its counts to the statistics.
      exchange_buffer: room of the last two, relative to an even load; where it is short the call takes
        "gather". 0: for everything that can come.
      dtype: compute dtype; None: that of x. The router computes in float32 at least.
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
    backend: str | None = None
    exchange: str | None = None
    exchange_buffer: float = 2.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs | None = None, *, train: bool = False) -> tuple[jax.Array, Aux]:
        """x [..., S, D] -> (y [..., S, D], Aux). Padding and dropped tokens get nothing from the experts.

        `inputs` has an entry for each of the T leading positions of x, flattened; its `train` wins over the
        argument.

        Raises:
          ValueError: top_k above the number of experts; a mesh of Explicit axes; virtual experts where the router's
            assignment is no TokenChoice.
        """
        virtual = self.zero_experts + self.copy_experts + self.constant_experts
        if self.top_k > self.experts + virtual:
            raise ValueError(f"top_k={self.top_k}: at most experts={self.experts + virtual}")
        compat.refuse_explicit_axes("MoE")
        inputs = RouterInputs(train=train) if inputs is None else inputs
        tokens = x.reshape(-1, x.shape[-1])
        router = self.router
        if router is None:
            router = TopK(self.experts, self.top_k, virtual, name="router")
        with jax.named_scope("route"):
            choice, losses, stats = router(tokens, inputs)
            if virtual and not isinstance(choice, TokenChoice):
                raise ValueError(f"{virtual} zero, copy and constant experts: only a TokenChoice can have them")
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
            name="experts",
        )
        tokens = tokens.astype(self.dtype or x.dtype)
        sequences = tokens.shape[0] // x.shape[-2] if x.ndim > 2 else 1
        y, sent = run(tokens, choice, slots, sequences)
        if virtual:
            others = VirtualExperts(self.experts, self.zero_experts, self.copy_experts, self.constant_experts, name="virtual")
            y = (y + others(tokens, choice)).astype(y.dtype)
        if self.shared_width:
            y = y + self._shared(tokens)
        return y.reshape(x.shape), Aux(losses, {**stats, **sent})

    def _limit(self, choice, tokens, virtual, train):
        """(choice, slots or None, assignments dropped)."""
        factor = self.capacity_factor if train else self.eval_capacity
        if not factor or not isinstance(choice, TokenChoice):
            return choice, None, jnp.zeros((), jnp.float32)
        capacity = slots_per_expert(factor, tokens, self.top_k, self.experts + virtual)
        return limit_assignments(choice, self.experts, capacity, self.capacity_priority)

    def _shared(self, x):
        y = FeedForward(self.shared_width, self.activation, self.use_bias, x.dtype, name="shared")(x)
        if not self.shared_gate:
            return y
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", None))
        kernel = self.param("shared_gate", init, (x.shape[-1], 1), jnp.float32)
        wide = accumulator(x.dtype)
        gate = jax.nn.sigmoid(jnp.dot(x.astype(wide), kernel.astype(wide), precision=jax.lax.Precision.HIGHEST))
        return (y * gate).astype(y.dtype)
