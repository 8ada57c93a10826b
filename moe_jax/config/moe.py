"""The options of a routed layer."""

import dataclasses

from moe_jax.config.leaf import field
from moe_jax.config.routers import ROUTER_NAMES, RouterOptions, RoutersConfig


@dataclasses.dataclass
class MoEConfig:
    """A routed feed-forward layer."""

    experts: int = field(8, "Experts E in a routed layer.", low=1)
    top_k: int = field(2, "Experts K per token; an average where the router decides.", low=1, role="scoring")
    router: str = field("top_k", "Who writes the nonzeros.", choices=ROUTER_NAMES)
    expert_width: int = field(0, "Hidden width F of an expert; 0: model.ffn_width.", low=0)
    expert_sublayers: int = field(
        1,
        "Residual feed-forward sublayers of which an expert is a stack, each after a norm if there are several. The stack "
        "begins with what the layer gets: the residual stream itself where model.ffns has norm=False.",
        low=1,
    )
    expert_norm: bool = field(False, "A norm, of the model's kind, in an expert of one sublayer too.")
    zero_experts: int = field(0, "Experts beside the E that add nothing and cost nothing (MoE++).", low=0)
    copy_experts: int = field(0, "Experts beside the E that return their input (MoE++).", low=0)
    constant_experts: int = field(0, "Experts beside the E that mix their input with a learned vector (MoE++).", low=0)
    shared_experts: int = field(0, "Experts that see every token, as one network of their summed width.", low=0)
    shared_gate: bool = field(False, "Multiply the shared experts' output by a sigmoid gate.")
    allow_noncausal: bool = field(
        False, "Accept a router that looks at later tokens in evaluation of a causal model.", role="scoring"
    )
    execution: str = field(
        "dropless", "Run every assignment, or at most C per expert.", choices=("dropless", "capacity"), role="scoring"
    )
    capacity_factor: float = field(
        1.25, "C = ceil(factor * T * K / (E + V)) in training with execution=capacity; V: zero, copy and constant.", low=0.01
    )
    eval_capacity: float = field(0.0, "Capacity factor of evaluation and generation; 0: dropless.", low=0, role="scoring")
    capacity_priority: str = field(
        "token",
        "Who gets a slot: token (in order), choice (first choices first), gate (first choices first, by the tokens' "
        "highest gates), probs (highest gates first); only token is causal.",
        choices=("token", "choice", "gate", "probs"),
        role="scoring",
    )
    renormalise_kept: bool = field(
        False,
        "After drops, scale the gates that a token keeps to the sum that all its gates had (fairseq, DeepSpeed).",
        role="scoring",
    )
    exchange: str = field(
        "auto",
        "How tokens reach the experts of other shards; auto: gather, which no routing can overflow.",
        choices=("auto", "gather", "all_to_all", "ragged"),
        role="rounding",
    )
    exchange_buffer: float = field(
        2.0,
        "Room of all_to_all and ragged relative to an even load, else the call takes gather; 0: for all that can come.",
        low=0,
        role="rounding",
    )
    backend: str = field(
        "auto", "Grouped matmul.", choices=("auto", "blocks", "ragged_dot", "megablox", "tokamax", "loop"), role="rounding"
    )
    routers: RoutersConfig = dataclasses.field(default_factory=RoutersConfig)

    @property
    def options(self) -> RouterOptions:
        """The options of the router in use."""
        return getattr(self.routers, self.router).beside(self.routers)

    @property
    def virtual_experts(self) -> int:
        """V, how many zero, copy and constant experts there are."""
        return self.zero_experts + self.copy_experts + self.constant_experts
