"""What every router gives to the rest of the code, and the steps that they share."""

from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.precision import accumulator
from moe_jax.types import Given, RouterInputs, TokenChoice

KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class Sizes(NamedTuple):
    """What a router is built for: E experts, K of them for a token, virtual experts beside them, ids in the vocabulary."""

    experts: int
    top_k: int
    virtual: int = 0
    vocab_size: int = 0


class Step(NamedTuple):
    """An optimizer step that was applied, as a router's `update` sees it.

    stats: the block's statistics, joined over the microbatches and devices of the step. total: the same, joined also over all
      blocks of this feed-forward layer, for a controller of the whole model. params: the parameters of the block's router after
      the step. number: int32 scalar, the steps applied so far, this one included; skipped steps do not count.
    steps: how many the run is to have, skipped ones included.
    """

    stats: dict[str, Any]
    total: dict[str, Any]
    params: dict[str, Any]
    number: jax.Array
    steps: int


class Router(NamedTuple):
    """What the rest of the code needs to know of a router; `routing/NAME.py` has one as `ROUTER`.

    A statistic joins over microbatches, devices and blocks by addition: it is a sum over tokens, a float32 array, or a
    `routing.statistics.Histogram` of fixed bins. A mean, an extreme or a quantile is read off those afterwards.

    build(sizes, options): the Linen module, without a parent; called with (x [T, D], RouterInputs),
      it returns (assignment, losses, stats).
    loss_weights(options): the weight of each loss that the module returns.
    update(state, step, sizes, options): the `router_state` of a block after one optimizer step that was applied, a `Step`.
    frozen(state): {name of a parameter of the router: bool scalar} from the `router_state` of a block. While the flag is
      True the parameter does not learn: it has no share of the norm, no update and no decay; its moments keep their values, and
      its average is the parameter itself.
    start(state, token_shares, sizes, options): the `router_state` of a layer before the first step; token_shares(): float64
      [V], the share of each id in the training text, which is read for it.
    by_token: whether the `router_state` has a table of token ids, which means nothing with another tokenizer.
    """

    build: Callable[[Sizes, Any], nn.Module]
    loss_weights: Callable[[Any], dict[str, float]] = lambda options: {}
    update: Callable[[dict, Step, Sizes, Any], dict] | None = None
    frozen: Callable[[dict], dict[str, jax.Array]] | None = None
    start: Callable[[dict, Callable[[], np.ndarray], Sizes, Any], dict] | None = None
    by_token: bool = False


class Scored(NamedTuple):
    """logits: [T, N], 0 for tokens that are not routed. routed: bool [T], real tokens with finite logits. finite: bool [T],
    false for real tokens that are not routed."""

    logits: jax.Array
    routed: jax.Array
    finite: jax.Array


def usable_tokens(x: jax.Array, inputs: RouterInputs) -> tuple[jax.Array, jax.Array]:
    """bool [T], [T]: the tokens that are not padding; those of them with finite hidden states x [T, D]."""
    valid = jnp.ones(x.shape[:1], bool) if inputs.valid is None else inputs.valid
    return valid, valid & jnp.all(jnp.isfinite(x), axis=-1)


def needed_token_ids(inputs: RouterInputs, who: str) -> jax.Array:
    """int32 [T], the token ids of `inputs`; `who` needs them, such as "the router hash".

    Raises:
      ValueError: they are missing.
    """
    if inputs.token_ids is None:
        raise ValueError(f"{who} needs token_ids in its RouterInputs")
    return inputs.token_ids


def score(x: jax.Array, kernel: jax.Array, inputs: RouterInputs, jitter: float = 0.0) -> Scored:
    """Logits x kernel of [T, D] hidden states and a [D, N] kernel, in float32 at least.

    Args:
      x: of any float dtype.
      kernel: as a parameter.
      inputs: with a key where there is jitter.
      jitter: in training each entry of x is multiplied by uniform noise from 1 - jitter to 1 + jitter (arXiv:2101.03961).
    """
    dtype = accumulator(x.dtype)
    # Masked before the product too: in the kernel's gradient 0 * NaN would be NaN.
    valid, clean = usable_tokens(x, inputs)
    x = jnp.where(clean[:, None], x, 0).astype(dtype)
    if jitter and inputs.train and inputs.key is not None:
        x = x * jax.random.uniform(inputs.key, x.shape, dtype, 1 - jitter, 1 + jitter)
    # By default the product would be of bfloat16 on a TPU, of TF32 on a GPU.
    logits = jnp.dot(x, kernel.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    routed = clean & jnp.all(jnp.isfinite(logits), axis=-1)
    return Scored(jnp.where(routed[:, None], logits, 0), routed, routed | ~valid)


def score_by_kernel(
    module: nn.Module, x: jax.Array, inputs: RouterInputs, columns: int, *, jitter: float = 0.0, init=KERNEL_INIT
) -> Scored:
    """`score` with `module`'s parameter `kernel` [D, N = columns], of the dtype `module.param_dtype`."""
    init = nn.with_logical_partitioning(init, ("embed", None))
    kernel = module.param("kernel", init, (x.shape[-1], columns), module.param_dtype)
    return score(x, kernel, inputs, jitter)


def token_choice(columns: jax.Array, gates: jax.Array, routed: jax.Array, experts: int) -> TokenChoice:
    """[T, K] columns of the E + V experts -> `TokenChoice`, with "no expert" where not `routed`, bool [T] or [T, K]."""
    ids = jnp.where(columns >= experts, columns + 1, columns).astype(jnp.int32)
    kept = routed.reshape(len(routed), -1)
    return TokenChoice(jnp.where(kept, ids, experts), jnp.where(kept, gates, 0))


def every_positive(
    scores: jax.Array, gates: jax.Array, routed: jax.Array, most: int
) -> tuple[TokenChoice, dict[str, jax.Array]]:
    """Each token's experts whose score is above 0, up to the `most` highest.

    Args:
      scores: [T, E], at most 0 for tokens that are not routed.
      gates: [T, E].
      routed: bool [T].
      most: columns of the choice; 0: E.

    Returns:
      the choice; statistics `overflow`, experts above 0 that were left out, and `unrouted`, routed tokens without one.
    """
    experts = scores.shape[1]
    ids = best(scores, min(most or experts, experts))
    taken = jnp.take_along_axis(scores, ids, axis=-1) > 0
    choice = token_choice(ids, jnp.take_along_axis(gates, ids, axis=-1), taken, experts)
    positive = scores > 0
    return choice, {
        "overflow": jnp.sum(positive) - jnp.sum(taken),
        "unrouted": jnp.sum(routed & ~jnp.any(positive, axis=-1)),
    }


def own_or_given(given: Given | None, own: jax.Array) -> jax.Array:
    """int32 [T, K]: the columns `own`, or the experts that are given where they are used."""
    return own if given is None else jnp.where(given.use, given.expert_ids, own)


def best(scores: jax.Array, k: int) -> jax.Array:
    """int32 [T, K]: the columns of the k highest scores of [T, N], without a gradient; the first of equal ones."""
    scores = jax.lax.stop_gradient(scores)
    if k == 1:  # on a CPU in a third of the time of a sort
        return jnp.argmax(scores, axis=-1, keepdims=True).astype(jnp.int32)
    return jax.lax.top_k(scores, k)[1].astype(jnp.int32)
