"""The options of each router, with what the rest of the code needs to know of it: nobody else tests a router's name."""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from moe_jax.config.leaf import ConfigError, field

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


class Traits(NamedTuple):
    """What `validate` needs to know of a router before anything is traced.

    causal: whether in evaluation a token's assignment never depends on later tokens. causal_training: the same in
    training. top_k: the K it knows; empty: any. virtual: whether it can choose zero, copy and constant experts. capacity:
    whether `execution=capacity` can limit it. exchange: whether its tokens travel by `exchange` and run by `backend`.
    except_in: where the last two do not hold, for the messages.
    """

    causal: bool = True
    causal_training: bool = True
    top_k: tuple[int, ...] = ()
    virtual: bool = True
    capacity: bool = True
    exchange: bool = True
    except_in: str = ""


class RouterOptions:
    """What validation, FLOPs, upcycling and reports ask of a router, with the answers that suit most.

    `moe` is the layer's `moe_jax.config.MoEConfig`, whose `options` this is.
    """

    traits: ClassVar[Traits] = Traits()

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        """Refuses what cannot work with these options.

        Args:
          moe: the layer's options.
          path: dotted path of `moe`, such as "model.moe."; those of these options are `path`routers.NAME.
          tokens: T of a microbatch.

        Raises:
          ConfigError: with the field, its value, the limit and the fix.
        """

    def columns(self, moe: "MoEConfig") -> float:
        """How many products of a token [D] with a vector the router takes."""
        return moe.experts + moe.virtual_experts

    def experts_per_token(self, moe: "MoEConfig", sequence_length: int) -> float:
        """How many experts run for a token, on average: K, unless the router says otherwise."""
        return moe.top_k

    @property
    def earlier_tokens(self) -> int:
        """How many ids before a token's own the router reads."""
        return 0

    def state_kind(self, moe: "MoEConfig") -> str:
        """What the `router_state` of one run must have in common with another's that starts from it, in words."""
        return ""

    def beside(self, routers: "RoutersConfig") -> "RouterOptions":
        """These options with all that the router needs of the other routers' ones."""
        return self

    def varies(self, moe: "MoEConfig") -> bool:
        """Whether only the counts of a step tell how many experts ran, so that `experts_per_token` is no more than a plan."""
        return moe.virtual_experts > 0

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        """What the gates of a token sum to (1.0 where that is no fixed number), and why a layer whose experts are copies of one
        dense layer, each cut into `shards` experts, does not compute what that layer does; "": it does."""
        return 1.0, f"{moe.router}: the gates are raw scores, which do not sum to 1"


# Modules have their options as an attribute, and JAX hashes modules.
_options = dataclasses.dataclass(unsafe_hash=True)


def _balance(default: float):
    return field(default, "Weight of the Switch balance loss (minimum of the loss: 1).", low=0)


def _z(default: float):
    return field(default, "Weight of the router z-loss.", low=0)


def _jitter():
    return field(0.0, "In training the router sees its input times noise from 1 - jitter to 1 + jitter.", low=0, high=1)


@_options
class TopKConfig(RouterOptions):
    """Options of the router `top_k`: the K best by score."""

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

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        shares = self.renormalise == "always" or (self.renormalise == "auto" and moe.top_k > 1) or self.order == "top_k_first"
        if not shares and not (self.score == "softmax" and moe.top_k == moe.experts):
            return super().gate_sum(moe, shards)
        group = (moe.experts + moe.virtual_experts) // self.groups
        cut = group % shards and shards % group
        return self.scale, f"top_k: groups={self.groups} cuts through the shards of a dense layer" if cut else ""

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        own, columns = f"{path}routers.top_k.", moe.experts + moe.virtual_experts
        if moe.top_k == 1 and (self.renormalise == "always" or self.order == "top_k_first"):
            always = self.renormalise == "always"
            name, value = ("renormalise", self.renormalise) if always else ("order", self.order)
            limit = f"with {path}top_k=1 every gate is 1 and the router gets no gradient"
            raise ConfigError(own + name, value, limit, "use auto" if always else "use score_first")
        if self.order == "top_k_first" and self.score != "softmax":
            limit = f"the softmax over the chosen, not {own}score={self.score}"
            raise ConfigError(own + "order", self.order, limit, "use score_first")
        if columns % self.groups:
            raise ConfigError(own + "groups", self.groups, f"does not divide the {columns} experts", "use a divisor")
        if self.kept_groups > self.groups:
            raise ConfigError(own + "kept_groups", self.kept_groups, f"more than {own}groups={self.groups}", "lower it")
        if moe.top_k > columns // self.groups * self.kept_groups:
            limit = f"fewer than {path}top_k={moe.top_k} experts in {self.kept_groups} of {self.groups} groups"
            raise ConfigError(own + "kept_groups", self.kept_groups, limit, "raise it")
        if self.zero_sum_bias and not self.bias_rate:
            raise ConfigError(own + "zero_sum_bias", True, f"{own}bias_rate=0", "raise it, or switch this off")


@_options
class SwitchConfig(RouterOptions):
    """Options of the router `switch`: the most probable expert, its probability as the gate."""

    traits: ClassVar[Traits] = Traits(top_k=(1,))
    jitter: float = _jitter()
    balance_loss: float = _balance(0.01)
    z_loss: float = _z(0.0)


_POLICIES = ("all", "threshold", "random")


@_options
class GShardConfig(RouterOptions):
    """Options of the router `gshard`: the two most probable experts, the second not always."""

    traits: ClassVar[Traits] = Traits(top_k=(2,))
    second_expert: str = field(
        "random",
        "Second expert in training: all; threshold: where its gate is above `threshold`; random: with probability "
        "gate / threshold.",
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

    def varies(self, moe: "MoEConfig") -> bool:
        return self.second_expert != "all" or super().varies(moe)

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        if (self.second_expert, self.eval_second_expert) == ("all", "all"):
            return 1.0, ""
        return 1.0, "gshard: where the second expert does not run, the gate of the first stays below 1"


@_options
class BaseConfig(RouterOptions):
    """Options of the router `base`: balanced assignment in training, the best expert in evaluation."""

    traits: ClassVar[Traits] = Traits(causal_training=False, top_k=(1,), virtual=False, capacity=False)
    groups: int = field(
        1, "Equal parts of a microbatch balanced each by itself, such as one per shard; 1: all tokens together.", low=1
    )

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        if tokens % self.groups:
            limit = f"does not divide the {tokens} tokens of a microbatch"
            raise ConfigError(f"{path}routers.base.groups", self.groups, limit, "use a divisor")

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "base: the gate is a sigmoid"


@_options
class HashConfig(RouterOptions):
    """Options of the router `hash`: the expert is a table's entry for the token id."""

    traits: ClassVar[Traits] = Traits(top_k=(1,), virtual=False)
    table: str = field(
        "balanced",
        "balanced: ids in order of their count in the training text, each to the least loaded expert; random.",
        choices=("balanced", "random"),
    )
    seed: int = field(0, "Of the random table, and of ties in the balanced one.", low=0, high=2**31 - 1)

    def columns(self, moe: "MoEConfig") -> float:
        return 0

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, ""


@_options
class StableConfig(RouterOptions):
    """Options of the router `stable`: StableMoE, a balanced routing that is learned, distilled and frozen."""

    backbone: str = field(
        "affinity",
        "Who routes in stage 1: affinity, StableMoE's own; or a router whose gate follows from the token and the expert "
        "(base, switch, top_k), with its options.",
        choices=("affinity", "base", "switch", "top_k"),
    )
    stage_1: float = field(
        0.1,
        "Share of train.steps in which the routing is learned and distilled; then it is frozen. 1: never frozen.",
        low=1e-6,
        high=1,
    )
    light_router: str = field(
        "embedding",
        "What the light router reads: embedding, the token's id; window, the last light_window ids of its document; "
        "balanced, for comparison: no router but a table balanced over the training text, as hash has it, without a stage 1.",
        choices=("embedding", "window", "balanced"),
    )
    light_window: int = field(5, "Ids that the light router window reads, the token's own included.", low=2)
    light_width: int = field(50, "Width W of the light router's word vectors.", low=1)
    evaluation: str = field(
        "light",
        "Whose expert evaluation takes in stage 1: light, the distilled router's; backbone, the backbone's.",
        choices=("light", "backbone"),
        role="scoring",
    )
    balance_loss: float = field(
        0.3, "Weight of the balance loss of the backbone affinity in stage 1 (equation 8, by token).", low=0
    )
    distillation_loss: float = field(1.0, "Weight of the light router's cross-entropy in stage 1 (equation 10).", low=0)

    @property
    def traits(self) -> Traits:
        """Those of the backbone, without virtual experts; once frozen, any of them can be limited."""
        known = {"base": BaseConfig, "switch": SwitchConfig, "top_k": TopKConfig}.get(self.backbone)
        of_backbone = known.traits if known else Traits(top_k=(1,))
        return of_backbone._replace(virtual=False, capacity=True)

    @property
    def earlier_tokens(self) -> int:
        return self.light_window - 1 if self.light_router == "window" else 0

    @property
    def of_backbone(self) -> RouterOptions:
        """The options of the backbone: these themselves of `affinity`; of others see `beside`."""
        return self

    def beside(self, routers: "RoutersConfig") -> "StableConfig":
        if self.backbone == "affinity":
            return self
        return _StableBeside(**vars(self), of_backbone=getattr(routers, self.backbone))

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        if self.light_router == "balanced" and moe.top_k > 1:
            limit = f"the table {path}routers.stable.light_router=balanced has one expert for an id"
            raise ConfigError(f"{path}top_k", moe.top_k, limit, "use 1")
        if self.backbone != "affinity":
            self.of_backbone.check(moe, path, tokens)

    def stage_1_steps(self, steps: int) -> int | None:
        """How many of `steps` are stage 1, at least one; None: all, and the routing is never frozen."""
        return None if self.stage_1 == 1 else max(math.ceil(self.stage_1 * steps - 1e-6), 1)

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        if self.backbone == "affinity":
            return 1.0, "stable: the gate is a sigmoid"
        total, why = self.of_backbone.gate_sum(moe, shards)
        return total, why or ("stable: the light router does not keep the shards of a layer together" if shards > 1 else "")

    def state_kind(self, moe: "MoEConfig") -> str:
        return f"backbone={self.backbone}, light_router={self.light_router}, top_k={moe.top_k}"


@_options
class _StableBeside(StableConfig):
    """`StableConfig` with the options of its backbone."""

    of_backbone: RouterOptions = RouterOptions()


@_options
class ExpertChoiceConfig(RouterOptions):
    """Options of the router `expert_choice`: every expert takes its C best tokens, K a token on average."""

    evaluation: str = field(
        "experts",
        "Who chooses in evaluation: experts, as in training; tokens: each its K best experts by the same scores, "
        "which is causal.",
        choices=("experts", "tokens"),
        role="scoring",
    )
    z_loss: float = _z(0.0)

    @property
    def traits(self) -> Traits:
        """What it can do depends on who chooses."""
        causal = self.evaluation == "tokens"
        where = " in training; evaluation by tokens is dropless with the default exchange" if causal else ""
        return Traits(causal=causal, causal_training=False, virtual=False, capacity=False, exchange=False, except_in=where)


@_options
class ReMoEConfig(RouterOptions):
    """Options of the router `remoe`: ReLU gates, as many experts as are above 0, K on average by a controller."""

    traits: ClassVar[Traits] = Traits(virtual=False)
    max_k: int = field(0, "Most experts of a token; what is above is dropped and counted; 0: all.", low=0, role="scoring")
    start_weight: float = field(1e-8, "Weight of the sparsity loss at the start.", low=1e-20, high=1e6)
    rate: float = field(1.2, "The weight is multiplied or divided by this after each step.", low=1.000001)
    z_loss: float = _z(0.0)

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        low, high = moe.top_k, moe.experts
        if self.max_k and not low <= self.max_k <= high:
            limit = f"not from {path}top_k={low} to {path}experts={high}"
            raise ConfigError(f"{path}routers.remoe.max_k", self.max_k, limit, "use 0 for all")

    def varies(self, moe: "MoEConfig") -> bool:
        return True

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "remoe: the gates are those of a ReLU"


@_options
class SoftMoEConfig(RouterOptions):
    """Options of the router `soft_moe`: slots are mixtures of a sequence's tokens."""

    traits: ClassVar[Traits] = Traits(
        causal=False, causal_training=False, top_k=(1,), virtual=False, capacity=False, exchange=False
    )
    slots: int = field(1, "Slots C of an expert for each sequence.", low=1)

    def columns(self, moe: "MoEConfig") -> float:
        """Of the logits, and of the two products that mix tokens into the slots and back."""
        return 3 * moe.experts * self.slots

    def experts_per_token(self, moe: "MoEConfig", sequence_length: int) -> float:
        """A sequence fills the slots, however long it is."""
        return moe.experts * self.slots / sequence_length

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "soft_moe: experts see mixtures of tokens"


@dataclasses.dataclass(repr=False, eq=False)
class RoutersConfig:
    """The routers: a field is the name of a file in `moe_jax/routing`, with its options.

    Only those of `router` count. `register_options` adds a field, also to configs that are there already.
    """

    top_k: TopKConfig = dataclasses.field(default_factory=TopKConfig)
    switch: SwitchConfig = dataclasses.field(default_factory=SwitchConfig)
    gshard: GShardConfig = dataclasses.field(default_factory=GShardConfig)
    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    hash: HashConfig = dataclasses.field(default_factory=HashConfig)
    stable: StableConfig = dataclasses.field(default_factory=StableConfig)
    expert_choice: ExpertChoiceConfig = dataclasses.field(default_factory=ExpertChoiceConfig)
    remoe: ReMoEConfig = dataclasses.field(default_factory=ReMoEConfig)
    soft_moe: SoftMoEConfig = dataclasses.field(default_factory=SoftMoEConfig)

    def __getattr__(self, name: str) -> RouterOptions:
        leaf = type(self).__dataclass_fields__.get(name)
        if leaf is None:
            raise AttributeError(f"no router {name!r}")
        setattr(self, name, leaf.default_factory())
        return getattr(self, name)

    def __repr__(self) -> str:
        options = (f"{entry.name}={getattr(self, entry.name)!r}" for entry in dataclasses.fields(self))
        return f"RoutersConfig({', '.join(options)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoutersConfig) and repr(self) == repr(other)


# The choices of `model.moe.router`.
ROUTER_NAMES = [entry.name for entry in dataclasses.fields(RoutersConfig)]


def register_options(name: str, options: type[RouterOptions]) -> None:
    """Adds a router's options to the table; see `moe_jax.register_router`.

    Args:
      name: of the router, in `model.moe.router` and `model.moe.routers`.
      options: a dataclass under `RouterOptions` whose fields are made by `moe_jax.config.field` and all have defaults.

    Raises:
      ValueError: the name is taken by other options or is no identifier, or `options` is something else.
    """
    if not name.isidentifier() or not (dataclasses.is_dataclass(options) and issubclass(options, RouterOptions)):
        raise ValueError(f"register_router({name!r}, {options!r}): a name and a dataclass under RouterOptions are wanted")
    known = RoutersConfig.__dataclass_fields__
    if name in known and known[name].type is not options:
        raise ValueError(f"register_router: the name {name!r} is taken by {known[name].type.__name__}; use another")
    if name not in known:
        made = dataclasses.make_dataclass("_Row", [(name, options, dataclasses.field(default_factory=options))])
        known[name] = made.__dataclass_fields__[name]
        ROUTER_NAMES.append(name)
