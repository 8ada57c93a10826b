"""What the rest of the code needs to know of a router's options, so that nobody else tests a router's name."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from moe_jax.config.leaf import ConfigError, field

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig
    from moe_jax.config.routers import RoutersConfig


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
router_options = dataclasses.dataclass(unsafe_hash=True)


def balance_field(default: float):
    return field(default, "Weight of the Switch balance loss (minimum of the loss: 1).", low=0)


def z_field(default: float):
    return field(default, "Weight of the router z-loss.", low=0)


def jitter_field():
    return field(0.0, "In training the router sees its input times noise from 1 - jitter to 1 + jitter.", low=0, high=1)


def max_k_field():
    return field(0, "Most experts of a token; what is above is dropped and counted; 0: all.", low=0, role="scoring")


def check_max_k(max_k: int, moe: "MoEConfig", path: str) -> None:
    """Refuses a `max_k` of the router in use that is not from K to E; path: of `moe`."""
    if max_k and not moe.top_k <= max_k <= moe.experts:
        limit = f"not from {path}top_k={moe.top_k} to {path}experts={moe.experts}"
        raise ConfigError(f"{path}routers.{moe.router}.max_k", max_k, limit, "use 0 for all")
