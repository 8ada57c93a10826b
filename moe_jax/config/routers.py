"""The options of routed layers, and of each router, with what a router can and cannot do."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from moe_jax.config.leaf import field


class Traits(NamedTuple):
    """What `validate` needs to know of a router before anything is traced.

    causal: whether in evaluation a token's assignment never depends on later tokens. causal_training: the same in
    training. top_k: the K it knows; empty: any. virtual: whether it can choose zero, copy and constant experts. capacity:
    whether `execution=capacity` can limit it. exchange: whether its tokens travel by `exchange` and run by `backend`.
    """

    causal: bool = True
    causal_training: bool = True
    top_k: tuple[int, ...] = ()
    virtual: bool = True
    capacity: bool = True
    exchange: bool = True


# Modules have their options as an attribute, and JAX hashes modules.
_options = dataclasses.dataclass(unsafe_hash=True)


def _balance(default: float):
    return field(default, "Weight of the Switch balance loss (minimum of the loss: 1).", low=0)


def _z(default: float):
    return field(default, "Weight of the router z-loss.", low=0)


def _jitter():
    return field(0.0, "In training the router sees its input times noise from 1 - jitter to 1 + jitter.", low=0, high=1)


@_options
class TopKConfig:
    """Options of the router `top_k`: the K best by score."""

    traits: ClassVar[Traits] = Traits()
    score: str = field("softmax", "Score of an expert from its logit.", choices=("softmax", "sigmoid", "sqrt_softplus"))
    order: str = field(
        "score_first",
        "score_first: scores of all experts, then the choice; top_k_first: softmax over the chosen logits.",
        choices=("score_first", "top_k_first"),
        role="scoring",
    )
    renormalise: str = field(
        "auto",
        "Divide the chosen scores by their sum; auto: for K above 1, else the router would get no gradient.",
        choices=("auto", "always", "never"),
        role="scoring",
    )
    scale: float = field(1.0, "Multiplies the gates.", low=1e-6, role="scoring")
    groups: int = field(1, "Equal groups of experts; the choice is limited to the best of them (DeepSeek-V3).", low=1)
    kept_groups: int = field(1, "Groups that a token may choose from.", low=1, role="scoring")
    jitter: float = _jitter()
    bias_rate: float = field(
        0.0,
        "Step of the selection bias that balances without a loss (arXiv:2408.15664); 0: no bias.",
        low=0,
    )
    zero_sum_bias: bool = field(False, "Subtract the mean from the selection bias after each step.")
    balance_loss: float = _balance(0.01)
    sequence_loss: float = field(0.0, "Weight of the balance loss of each sequence by itself.", low=0)
    z_loss: float = _z(0.001)


@_options
class SwitchConfig:
    """Options of the router `switch`: the most probable expert, its probability as the gate."""

    traits: ClassVar[Traits] = Traits(top_k=(1,))
    jitter: float = _jitter()
    balance_loss: float = _balance(0.01)
    z_loss: float = _z(0.0)


_POLICIES = ("all", "threshold", "random")


@_options
class GShardConfig:
    """Options of the router `gshard`: the two most probable experts, the second not always."""

    traits: ClassVar[Traits] = Traits(top_k=(2,))
    second_expert: str = field(
        "random",
        "Second expert in training: all; threshold: where its gate is above `threshold`; random: with probability gate / threshold.",
        choices=_POLICIES,
    )
    eval_second_expert: str = field(
        "all", "The same in evaluation; random draws nothing there.", choices=_POLICIES[:2], role="scoring"
    )
    threshold: float = field(
        0.5, "Gate, of a pair that sums to 1, from which on `random` always keeps it.", low=1e-6, high=1, role="scoring"
    )
    balance_loss: float = _balance(0.01)
    z_loss: float = _z(0.0)


@_options
class BaseConfig:
    """Options of the router `base`: balanced assignment in training, the best expert in evaluation."""

    traits: ClassVar[Traits] = Traits(causal_training=False, top_k=(1,), virtual=False, capacity=False)
    groups: int = field(
        1, "Equal parts of a microbatch balanced each by itself, such as one per shard; 1: all tokens together.", low=1
    )


@_options
class HashConfig:
    """Options of the router `hash`: the expert is a table's entry for the token id."""

    traits: ClassVar[Traits] = Traits(top_k=(1,), virtual=False)
    table: str = field(
        "balanced",
        "balanced: ids in order of their count in the training text, each to the least loaded expert; random.",
        choices=("balanced", "random"),
    )
    seed: int = field(0, "Of the random table, and of ties in the balanced one.", low=0, high=2**31 - 1)


@_options
class ExpertChoiceConfig:
    """Options of the router `expert_choice`: every expert takes its C best tokens, K a token on average."""

    evaluation: str = field(
        "experts",
        "Who chooses in evaluation: experts, as in training; tokens: each its K best experts by the same scores, which is causal.",
        choices=("experts", "tokens"),
        role="scoring",
    )
    z_loss: float = _z(0.0)

    @property
    def traits(self) -> Traits:
        """What it can do depends on who chooses."""
        causal = self.evaluation == "tokens"
        return Traits(causal=causal, causal_training=False, virtual=False, capacity=False, exchange=False)


@_options
class ReMoEConfig:
    """Options of the router `remoe`: ReLU gates, as many experts as are above 0, K on average by a controller."""

    traits: ClassVar[Traits] = Traits(virtual=False)
    max_k: int = field(0, "Most experts of a token; what is above is dropped and counted; 0: all.", low=0, role="scoring")
    start_weight: float = field(1e-8, "Weight of the sparsity loss at the start.", low=1e-20, high=1e6)
    rate: float = field(1.2, "The weight is multiplied or divided by this after each step.", low=1.000001)
    z_loss: float = _z(0.0)


@_options
class SoftMoEConfig:
    """Options of the router `soft_moe`: slots are mixtures of a sequence's tokens."""

    traits: ClassVar[Traits] = Traits(
        causal=False, causal_training=False, top_k=(1,), virtual=False, capacity=False, exchange=False
    )
    slots: int = field(1, "Slots C of an expert for each sequence.", low=1)


@dataclasses.dataclass
class RoutersConfig:
    """The routers: a field is the name of a file in `moe_jax/routing`, with its options. Only those of `router` count."""

    top_k: TopKConfig = dataclasses.field(default_factory=TopKConfig)
    switch: SwitchConfig = dataclasses.field(default_factory=SwitchConfig)
    gshard: GShardConfig = dataclasses.field(default_factory=GShardConfig)
    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    hash: HashConfig = dataclasses.field(default_factory=HashConfig)
    expert_choice: ExpertChoiceConfig = dataclasses.field(default_factory=ExpertChoiceConfig)
    remoe: ReMoEConfig = dataclasses.field(default_factory=ReMoEConfig)
    soft_moe: SoftMoEConfig = dataclasses.field(default_factory=SoftMoEConfig)


ROUTER_NAMES = tuple(entry.name for entry in dataclasses.fields(RoutersConfig))


@dataclasses.dataclass
class MoEConfig:
    """Every routed feed-forward layer of the model."""

    experts: int = field(8, "Experts E in a routed layer.", low=1)
    top_k: int = field(2, "Experts K per token; an average where the router decides.", low=1, role="scoring")
    router: str = field("top_k", "Who writes the nonzeros.", choices=ROUTER_NAMES)
    expert_width: int = field(0, "Hidden width F of an expert; 0: model.ffn_width.", low=0)
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
        "Who gets a slot: token (in order), choice (first choices first), gate (highest first); only token is causal.",
        choices=("token", "choice", "gate"),
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
    def options(self) -> Any:
        """The options of the router in use."""
        return getattr(self.routers, self.router)

    @property
    def virtual_experts(self) -> int:
        """V, how many zero, copy and constant experts there are."""
        return self.zero_experts + self.copy_experts + self.constant_experts
