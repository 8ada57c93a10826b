"""A router from outside the package, imported as a plugin, that differs from the others in many ways.

It has three columns an expert, gates that do not sum to 1, a statistic that is a histogram, and a state that needs a
parameter and the count of applied steps.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import register_router
from moe_jax.config import ConfigError, RouterOptions, Traits, field
from moe_jax.routing import Router, Sizes, Step
from moe_jax.routing.contract import best, score_by_kernel, token_choice
from moe_jax.routing.statistics import choice_statistics, histogram
from moe_jax.types import RouterInputs, TokenChoice

BINS = 32


@dataclasses.dataclass(unsafe_hash=True)
class OddConfig(RouterOptions):
    """Options of the router `odd`."""

    traits: ClassVar[Traits] = Traits(top_k=(1, 2), virtual=False)
    rate: float = field(0.5, "Share of the median in the state that a step replaces.", low=0, high=1)

    def check(self, moe, path: str, tokens: int) -> None:
        if moe.experts % 2:
            raise ConfigError(f"{path}experts", moe.experts, "odd, but the router odd wants pairs", "use an even number")

    def columns(self, moe) -> float:
        return 3 * moe.experts

    def varies(self, moe) -> bool:
        return True

    def gate_sum(self, moe, shards: int) -> tuple[float, str]:
        return 1.0, "odd: the gates are halves of sigmoids"


class Odd(nn.Module):
    """Parameter `kernel` [D, 3E]; an expert's score is its best column.

    State: `median` of the best scores, `norm` of the kernel, `applied`. A token whose best score is below the median
    in the state gets its first expert alone.
    """

    experts: int
    top_k: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs):
        state = {
            name: self.variable("router_state", name, jnp.zeros, (), dtype).value
            for name, dtype in (("median", jnp.float32), ("norm", jnp.float32), ("applied", jnp.int32))
        }
        logits, routed, finite = score_by_kernel(self, x, inputs, 3 * self.experts)
        scores = jax.nn.sigmoid(jnp.max(logits.reshape(-1, self.experts, 3), axis=-1))
        ids = best(scores, self.top_k)
        gates = jnp.take_along_axis(scores, ids, axis=-1) / 2
        top = jnp.max(scores, axis=-1)
        choice = token_choice(ids, gates, routed, self.experts)
        keep = (jnp.arange(self.top_k) == 0) | (top >= state["median"])[:, None]
        choice = TokenChoice(jnp.where(keep, choice.expert_ids, self.experts), jnp.where(keep, choice.gates, 0))
        stats = choice_statistics(choice.expert_ids, scores, routed, finite, self.experts)
        stats["best"] = histogram(top, routed, 0.0, 1.0, BINS)
        return choice, {"spread": jnp.sum(jnp.where(routed, top, 0)) / jnp.maximum(jnp.sum(routed), 1)}, stats


def update(state: dict, step: Step, sizes: Sizes, options: OddConfig) -> dict:
    median = step.total["best"].quantile(0.5)
    mixed = options.rate * median + (1 - options.rate) * state["median"]
    return {
        "median": jnp.where(state["applied"] == 0, median, mixed),
        "norm": jnp.sqrt(jnp.sum(jnp.square(step.params["kernel"]))),
        "applied": step.number,
    }


ROUTER = Router(
    build=lambda sizes, options: Odd(sizes.experts, sizes.top_k, parent=None),
    loss_weights=lambda options: {"spread": 0.01},
    update=update,
)
register_router("odd", OddConfig, ROUTER)
