"""The routed layer: a router writes the nonzeros, the experts run them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.dispatch.capacity import limit_assignments, slots_per_expert
from moe_jax.layers.experts import Experts
from moe_jax.routing.softmax_top_k import SoftmaxTopK
from moe_jax.types import Aux, RouterInputs


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer for any Linen model.

    Attributes:
      experts: E.
      width: hidden width F of an expert.
      top_k: experts K per token.
      router: a module called with (x [T, D], RouterInputs) that returns (TokenChoice, losses, stats); None:
        softmax top-k.
      activation: "gelu_tanh", "gelu", "relu" or "swiglu".
      use_bias: biases in the experts.
      capacity_factor: at most C = ceil(factor * T * K / E) assignments per expert in training; 0: dropless.
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
    capacity_factor: float = 0.0
    eval_capacity: float = 0.0
    capacity_priority: str = "token"
    backend: str | None = None
    exchange: str | None = None
    exchange_buffer: float = 2.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: RouterInputs | None = None, *, train: bool = False
    ) -> tuple[jax.Array, Aux]:
        """x [..., D] -> (y [..., D], Aux). Padding and dropped tokens get 0.

        `inputs` has an entry for each of the T leading positions of x, flattened; its `train` wins over the
        argument.

        Raises:
          ValueError: top_k above experts; a mesh of Explicit axes.
        """
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k}: at most experts={self.experts}")
        mesh = compat.current_mesh()
        if mesh is not None and compat.AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f"MoE under a mesh of Explicit axes {mesh.axis_names}: make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,) * n, or wrap the call in jax.sharding.auto_axes"
            )
        inputs = RouterInputs(train=train) if inputs is None else inputs
        tokens = x.reshape(-1, x.shape[-1])
        router = SoftmaxTopK(self.experts, self.top_k, name="router") if self.router is None else self.router
        with jax.named_scope("route"):
            choice, losses, stats = router(tokens, inputs)
            factor = self.capacity_factor if inputs.train else self.eval_capacity
            slots, dropped = None, jnp.zeros((), jnp.float32)
            if factor:
                capacity = slots_per_expert(factor, tokens.shape[0], self.top_k, self.experts)
                choice, slots, dropped = limit_assignments(
                    choice, self.experts, capacity, self.capacity_priority
                )
            stats = {**stats, "dropped": dropped.astype(jnp.float32)}
        run = Experts(
            self.experts, self.width, self.activation, self.use_bias, self.backend,
            exchange=self.exchange, exchange_buffer=self.exchange_buffer, name="experts",
        )  # fmt: skip
        y, sent = run(tokens.astype(self.dtype or x.dtype), choice, slots)
        return y.reshape(x.shape), Aux(losses, {**stats, **sent})
