"""Generation with a key-value cache: one call over the prompts, one loop over all new tokens."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import compat
from moe_jax.config import ConfigError, ModelConfig
from moe_jax.models.stack import init_stack_cache
from moe_jax.models.unstack import is_unstacked, unstack

# Prompts, new tokens and rows are padded to powers of two from here on, so that few shapes are compiled.
SHORTEST = 16
# Below it the most probable token is all that float32 logits leave, and dividing by it would overflow.
SMALLEST_TEMPERATURE = 1e-30


@dataclasses.dataclass(frozen=True)
class _Static:
    """A model as a static argument: a module over a mutable config has no hash, so its text stands for it."""

    model: nn.Module = dataclasses.field(compare=False)
    text: str


def generate(
    model: nn.Module,
    variables: dict[str, Any],
    prompts: Sequence[np.ndarray],
    *,
    tokens: int,
    end_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    first: np.ndarray | None = None,
) -> np.ndarray:
    """Continues every prompt by the tokens that the model without a cache would give.

    What a row draws depends on `key`, its index and the position alone, not on the other rows or how many. While it runs, the
    parameters of the groups are held twice: stacked, and in the form of `models.unstack`.

    Args:
      model: such as `Decoder`.
      variables: its `params` and `router_state`.
      prompts: int [tokens] each, of any length from 1 on; `end_id`, which also starts a document, included.
      tokens: new tokens per row.
      end_id: id that ends a document; a row that has drawn it holds nothing else from there on. Generation
        ends when all rows have.
      temperature: the logits are divided by it; 0: the most probable token, without randomness.
      top_p: draw from the smallest set of tokens with at least this probability (arXiv:1904.09751), after
        the temperature; tokens as probable as the least probable of the set belong to it.
      key: typed PRNG key; needed where the temperature is above 0.
      first: bool [B, V], the tokens that may come first; None: any.

    Returns:
      int32 [B, tokens].

    Raises:
      ConfigError: learned positions do not reach that far.
      ValueError: no prompt, an empty prompt, a negative temperature or one without a key, or a `top_p` outside of (0, 1].
    """
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("generate wants at least one prompt, and each must hold at least one token")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} is negative: use 0 for the most probable tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is no probability above 0: use 1 for all tokens")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} needs a key")
    rows = len(prompts)
    batch, length = _rounded(rows, 1), _rounded(max(map(len, prompts)), SHORTEST)
    _check_positions(model.config, max(map(len, prompts)), tokens)
    ids, lengths = np.zeros((batch, length), np.int32), np.zeros(batch, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    allowed = np.ones((batch, 1), bool)
    if first is not None:
        allowed = np.concatenate([first, np.ones((batch - rows, first.shape[1]), bool)])
    if key is None:
        key = jax.random.key(0)
    static, new_tokens = _Static(model, repr(model)), _rounded(tokens, SHORTEST)
    variables = _unstack(static, variables, rows=batch)
    logits, cache = _prefill(static, variables, ids, lengths, slots=length + new_tokens)
    limits = np.int32(tokens), np.int32(end_id)
    greedy = temperature < SMALLEST_TEMPERATURE
    sampling = key, np.float32(1 if greedy else min(temperature, float(np.finfo(np.float32).max))), np.float32(top_p)
    new, _ = _continue(
        static,
        variables,
        logits,
        cache,
        lengths,
        limits,
        sampling,
        allowed,
        new_tokens=new_tokens,
        greedy=greedy,
        nucleus=top_p < 1,
    )
    return np.asarray(new)[:rows, :tokens]


def _rounded(size: int, least: int) -> int:
    """The power of two from `size` on, at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def _check_positions(config: ModelConfig, prompt: int, tokens: int) -> None:
    # The last new token is not read again.
    if config.positions == "learned" and prompt + tokens - 1 > config.max_positions:
        limit = f"a prompt of {prompt} tokens and {tokens} new ones need {prompt + tokens - 1} positions"
        fix = f"ask for at most {max(config.max_positions - prompt + 1, 0)} new tokens, or shorten the prompt"
        raise ConfigError("model.max_positions", config.max_positions, limit, fix)


def _logits(model: nn.Module, x: jax.Array, table: jax.Array) -> jax.Array:
    """x [B, D], table [V, D] -> [B, V], float32 at least; the product of `models.losses`."""
    dtype = jnp.dtype(model.config.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum("BD,VD->BV", x.astype(dtype), table.astype(dtype), preferred_element_type=wide)


@functools.partial(jax.jit, static_argnums=0, static_argnames="rows")
def _unstack(static: _Static, variables, *, rows: int):
    return unstack(static.model.config, variables, rows)


@functools.partial(jax.jit, static_argnums=0, static_argnames="slots")
def _prefill(static: _Static, variables, ids, lengths, *, slots: int):
    """Runs right-padded prompts ids [B, S]: the logits [B, V] after each one's last token, and the cache."""
    model, (batch, length) = static.model, ids.shape
    ids = compat.constrain(ids, compat.BATCH_AXES, ())
    index = jnp.arange(length)
    # Padding keeps the last token's position: past the end of a learned table it would be NaN.
    positions = jnp.minimum(index, jnp.maximum(lengths[:, None] - 1, 0))
    segments = (index < lengths[:, None]).astype(jnp.int32)
    cache = init_stack_cache(model.config, batch, slots, is_unstacked(variables))
    out = model.apply(variables, ids, positions, segments, cache=cache)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return _logits(model, jnp.take_along_axis(out.x, last, axis=1)[:, 0], out.table), out.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3, static_argnames=("new_tokens", "greedy", "nucleus"))
def _continue(
    static: _Static,
    variables,
    logits,
    cache,
    lengths,
    limits,
    sampling,
    allowed,
    *,
    new_tokens,
    greedy,
    nucleus,
):
    """(int32 [B, new_tokens], the cache in the place of the one given). limits: how many are wanted, and `end_id`. Rows of
    length 0 are padding."""
    model, (tokens, end_id) = static.model, limits
    draw = functools.partial(sample, greedy=greedy, nucleus=nucleus)
    token = draw(jnp.where(allowed, logits, -jnp.inf), lengths, *sampling)
    token = jnp.where(lengths > 0, token, end_id)
    new = jnp.full((lengths.shape[0], new_tokens), end_id, jnp.int32).at[:, 0].set(token)

    def unfinished(carry):
        i, token, _, _ = carry
        return (i < tokens) & jnp.any(token != end_id)

    def body(carry):
        i, token, cache, new = carry
        going = token != end_id
        inputs = jnp.where(going, token, 0), lengths + i - 1, going.astype(jnp.int32)
        out = model.apply(variables, *(a[:, None] for a in inputs), cache=cache)
        drawn = draw(_logits(model, out.x[:, 0], out.table), lengths + i, *sampling)
        token = jnp.where(going, drawn, end_id)
        return i + 1, token, out.cache, new.at[:, i].set(token)

    cache, new = jax.lax.while_loop(unfinished, body, (jnp.int32(1), token, cache, new))[2:]
    return compat.constrain(new, (), ()), cache  # the tokens whole in every process


def sample(
    logits: jax.Array,
    positions: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    greedy: bool,
    nucleus: bool,
) -> jax.Array:
    """One token per row: logits [B, V] and the new tokens' positions, int32 [B] -> int32 [B].

    Row b draws from `fold_in(fold_in(key, b), positions[b])`. `greedy` and `nucleus` (whether `top_p` counts)
    are static; see `generate` for the others.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if nucleus:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        inside = (before < top_p).at[:, 0].set(True)  # the first one whatever top_p rounds to
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)

    def draw(row, position, logits):
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), position), logits)

    return jax.vmap(draw)(jnp.arange(logits.shape[0]), positions, logits).astype(jnp.int32)
