"""Options of the router `top_k`."""

from typing import TYPE_CHECKING

from moe_jax.config.leaf import ConfigError, field
from moe_jax.config.routers.options import RouterOptions, balance_field, jitter_field, router_options, z_field

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig


@router_options
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
    jitter: float = jitter_field()
    bias_rate: float = field(
        0.0,
        "Step of the selection bias that balances without a loss (arXiv:2408.15664); 0: no bias.",
        low=0,
    )
    bias_rule: str = field(
        "sign",
        "sign: the selection bias moves by bias_rate towards experts below the mean load; quantile: by the share bias_rate of "
        "the way to where each expert would have had its even share of the step's tokens.",
        choices=("sign", "quantile"),
    )
    zero_sum_bias: bool = field(False, "Subtract the mean from the selection bias after each step.")
    balance_loss: float = balance_field(0.01)
    sequence_loss: float = field(0.0, "Weight of the balance loss of each sequence by itself.", low=0)
    z_loss: float = z_field(0.001)

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
        if self.bias_rule == "quantile":
            self._check_quantile(own, moe.top_k, columns)
        if self.zero_sum_bias and not self.bias_rate:
            raise ConfigError(own + "zero_sum_bias", True, f"{own}bias_rate=0", "raise it, or switch this off")

    def _check_quantile(self, own: str, top_k: int, columns: int) -> None:
        limit, fix = "", ""
        if not 0 < self.bias_rate <= 1:
            limit, fix = f"{own}bias_rate={self.bias_rate:g} is no share of the way, above 0 and at most 1", "use 0.1"
        elif self.score == "sqrt_softplus":
            limit, fix = f"its bins are those of scores from 0 to 1, not of {own}score=sqrt_softplus", "use sigmoid"
        elif self.groups > 1:
            limit, fix = f"does not know the limits of {own}groups={self.groups}", "use groups=1"
        elif top_k >= columns:
            limit, fix = f"with top_k={top_k} of {columns} experts there is none to choose", "lower top_k"
        if limit:
            raise ConfigError(f"{own}bias_rule", self.bias_rule, limit, f"{fix}, or bias_rule=sign")
