"""Options of the router `adaptive`."""

from typing import TYPE_CHECKING, ClassVar

from moe_jax.config.leaf import ConfigError, field
from moe_jax.config.routers.options import RouterOptions, Traits, balance_field, router_options, z_field

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


@router_options
class AdaptiveConfig(RouterOptions):
    """Options of the router `adaptive`: the most probable expert, and the second where the two are close (arXiv:2310.07188)."""

    traits: ClassVar[Traits] = Traits(top_k=(2,))
    threshold: float = field(
        0.1,
        "A token takes two experts where the gap of its two best probabilities is at most this; below 0: never, 1: always. "
        "With target_k the threshold of the first step.",
        low=-1,
        high=1,
    )
    gap: str = field(
        "raw",
        "The gap of the probabilities p1 and p2: raw, p1 - p2; pair, (p1 - p2) / (p1 + p2); max, (p1 - p2) / p1. The more "
        "experts there are, the smaller is p1 - p2, and the more tokens take two.",
        choices=("raw", "pair", "max"),
        role="scoring",
    )
    target_k: float = field(
        0.0,
        "Experts per token, averaged over the model's layers, at which a controller holds the threshold; between 1 and 2, "
        "0: no controller.",
        low=0,
        high=2,
    )
    target_decay: float = field(
        0.5,
        "Of the controller's running mean of thresholds, each the one that a step's tokens asked for.",
        low=0,
        high=0.999999,
    )
    renormalise_pair: bool = field(
        False, "Divide the gates of a token with two experts by their sum; that of one expert stays raw.", role="scoring"
    )
    evaluation_k: int = field(
        0, "Experts of every token in evaluation and generation: 1 or 2; 0: by the threshold.", low=0, high=2, role="scoring"
    )
    evaluation_threshold: float = field(
        -1.0, "The threshold of evaluation and generation; -1: as training left it.", low=-1, high=1, role="scoring"
    )
    balance_over: str = field(
        "first_choices",
        "Whose experts the balance loss counts: first_choices, of all tokens; single, of the tokens with one expert alone, as "
        "in the paper: no loss while there are none.",
        choices=("first_choices", "single"),
    )
    balance_loss: float = balance_field(0.01)
    z_loss: float = z_field(0.0)

    def check(self, moe: "MoEConfig", path: str, tokens: int) -> None:
        own = f"{path}routers.adaptive."
        if moe.experts + moe.virtual_experts < 2:
            raise ConfigError(f"{path}experts", moe.experts, "router=adaptive chooses among two at least", "raise it")
        if self.target_k and not 1 < self.target_k < 2:
            fix = "use a number in between; for 1 or 2 itself threshold=-1 or 1 without a target"
            raise ConfigError(f"{own}target_k", self.target_k, "is not between 1 and 2", fix)
        if self.evaluation_k and self.evaluation_threshold >= 0:
            limit = f"{own}evaluation_k={self.evaluation_k} leaves nothing to a threshold"
            raise ConfigError(f"{own}evaluation_threshold", self.evaluation_threshold, limit, "use -1, or evaluation_k=0")
        if self.target_k and self.threshold < 0:
            limit = f"with {own}target_k={self.target_k:g} it is where the controller starts, 0 to 1"
            raise ConfigError(f"{own}threshold", self.threshold, limit, "raise it")

    def experts_per_token(self, moe: "MoEConfig", sequence_length: int) -> float:
        """As planned: the target, else two."""
        return self.target_k or 2.0

    def varies(self, moe: "MoEConfig") -> bool:
        return True

    def gate_sum(self, moe: "MoEConfig", shards: int) -> tuple[float, str]:
        return 1.0, "adaptive: the gates are raw probabilities, which do not sum to 1"

    def state_kind(self, moe: "MoEConfig") -> str:
        return "a threshold by target_k" if self.target_k else ""
