"""The balanced assignment of BASE layers (arXiv 2103.16716, sections 3.1 and 3.2): every expert gets equally many tokens.

An auction in which the experts have prices and the tokens do not: a token goes where score minus price is highest,
so the dual problem has E unknowns however many tokens there are. Two stages, both in fixed shapes:

1. Prices. The dual, min over p of sum_t max_e (scores[t, e] - p[e]) + (T/E) sum_e p[e], with the max softened by a
   temperature, by Newton steps in p while the temperature falls.
2. Exact counts. Each token at its best price is the best assignment of its own, nearly balanced, counts. Tokens
   then move from crowded to free experts along shortest paths of the residual graph over the E experts (Ahuja,
   Magnanti and Orlin, Network Flows, section 9.7), which keeps it so, until the counts are right.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import compat
from moe_jax.ops.counting import count_experts
from moe_jax.ops.precision import accumulator

# Relative to the spread, the mean |score| without the means of experts and of tokens.
LAST_TEMPERATURE = 1e-5
ALIKE = 1e-5  # tokens of one expert that differ by no more may move together
COOLING = 0.4
TRUST = 4.0  # longest step of a price, in temperatures; a longer wish keeps the temperature as it is
RIDGE = 1e-5  # relative to T_valid / E; without it the curvature is singular
MAX_PRICE_STEPS = 60


class Assignment(NamedTuple):
    """expert_ids: int32 [T], E for invalid tokens. rounds: int32, price steps and moves together. gap: an upper bound,
    from the final prices, on optimum - objective in units of the scores; no less than its own rounding error.
    """

    expert_ids: jax.Array
    rounds: jax.Array
    gap: jax.Array


def balanced_assignment(scores: jax.Array, valid: jax.Array | None = None) -> Assignment:
    """Maximises sum_t scores[t, a_t] with floor(T_valid / E) or ceil(T_valid / E) tokens on every expert.

    Which experts get one token more is part of the maximum. Let G = optimum - sum_t mean_e scores[t, e] be the gain over
    the mean balanced assignment; unlike |optimum| it does not change with a constant added to a row. The objective is
    the optimum up to rounding, or with near-duplicate tokens within 1e-5 G of it in all tests; `gap` bounds the loss of
    each call.

    It always ends: after at most `MAX_PRICE_STEPS` steps and T moves. Past 64 + 2E moves (few inputs need 64) what counts
    as alike doubles every 16, so that whole groups move, at a loss. Deterministic, and without gradient. Under vmap
    and in a shard_map each group or shard is balanced on its own.

    Args:
      scores: [T, E], T >= 1, of any scale; computed in float32 at least. NaN and infinities are replaced by the smallest
        finite score of the valid tokens, or 0.
      valid: bool [T] or None for all; the rest are not assigned.
    """
    experts = scores.shape[1]
    valid = jnp.ones(scores.shape[:1], bool) if valid is None else valid
    scores, valid = compat.vary_alike(lax.stop_gradient(scores), valid)
    s, size = _normalise(scores.astype(accumulator(scores.dtype)), valid)
    means, spread = _centre(s, valid)
    prices, steps = _price(s, valid, means, spread)
    ids, prices, extra, moves = _balance(s, valid, prices, ALIKE * spread)
    values = s - prices[:, None]
    chosen = jnp.take_along_axis(values, jnp.minimum(ids, experts - 1)[None], axis=0)[0]
    gap = jnp.sum(jnp.where(valid, jnp.max(values, axis=0) - chosen, 0))
    gap += jnp.sum(jnp.where(_dearest(prices, jnp.sum(extra)), prices, 0) - jnp.where(extra, prices, 0))
    return Assignment(ids, steps + moves, gap * size * 4)


def _normalise(scores, valid):
    """Scores [E, T], finite, at most 0 and at least -1, and the quarter of the factor taken out.

    The experts come first because most of the work runs along the tokens of one expert.
    """
    finite = jnp.isfinite(scores) & valid[:, None]
    lowest = jnp.min(jnp.where(finite, scores, jnp.inf))
    s = jnp.where(finite, scores, jnp.where(jnp.isfinite(lowest), lowest, 0)) / 4  # differences stay finite
    s = jnp.where(valid[:, None], s - jnp.max(s, axis=1, keepdims=True), 0).T
    size = jnp.max(-s)
    size = jnp.where(size > 0, size, 1)
    return s / size, size


def _centre(s, valid):
    """Each expert's mean score [E], and the mean |score| without the means of experts and of tokens."""
    some = jnp.maximum(jnp.sum(valid), 1).astype(s.dtype)
    means = jnp.sum(s, axis=1) / some
    v = s - means[:, None]
    return means, jnp.sum(jnp.where(valid, jnp.abs(v - jnp.mean(v, axis=0)), 0)) / (some * s.shape[0])


def _price(s, valid, prices, spread):
    """Prices [E] at which nearly every expert is wanted by T_valid / E tokens, and the number of Newton steps.

    They start at the mean scores, the solution at infinite temperature.
    """
    experts = s.shape[0]
    tokens = jnp.sum(valid).astype(s.dtype)
    share, some = tokens / experts, jnp.maximum(tokens, 1)

    def hot(state):
        _, temperature, crowd, steps = state
        # A quarter token too many per expert is less work to move than to price.
        return (temperature > LAST_TEMPERATURE * spread) & (crowd > experts / 4) & (steps < MAX_PRICE_STEPS)

    def step(state):
        prices, temperature, _, steps = state
        v = s - prices[:, None]
        best = jnp.max(v, axis=0)
        q = jnp.where(valid, jnp.exp((v - best) / temperature), 0)
        q = q / jnp.maximum(jnp.sum(q, axis=0), 1)
        wanted = jnp.sum(q, axis=1)
        slope = wanted - share
        curvature = jnp.diag(wanted) - jnp.matmul(q, q.T, precision=lax.Precision.HIGHEST)
        curvature += RIDGE * some / experts * jnp.eye(experts, dtype=s.dtype)
        move = jax.scipy.linalg.solve(curvature, slope, assume_a="pos")
        move -= jnp.mean(move)
        length = jnp.max(jnp.abs(move))
        shorter = jnp.minimum(1, TRUST / jnp.maximum(length, 1))
        move = jnp.where(jnp.isfinite(length), move * shorter, slope / some)
        crowd = jnp.sum(jnp.maximum(jnp.sum((v == best) & valid, axis=1) - share, 0))
        cooler = jnp.where(length <= TRUST, COOLING * temperature, temperature)
        return prices + move * temperature, cooler, crowd, steps + 1

    start = compat.vary_alike(prices, spread, jnp.full_like(spread, jnp.inf), jnp.int32(0))
    prices, _, _, steps = lax.while_loop(hot, step, start)
    return prices, steps


def _dearest(prices, count):
    """bool [E]: the `count` highest of prices [E], the first of equals."""
    order = jnp.arange(prices.shape[0])
    above = (prices > prices[:, None]) | ((prices == prices[:, None]) & (order < order[:, None]))
    return jnp.sum(above, axis=1) < count


def _balance(s, valid, prices, alike):
    """Ids [T] of exact counts, their prices [E], which experts have one token more [E], and the number of moves.

    The right to one token more is what an edge of cost 0 between two experts hands over. Reduced costs, of the prices,
    are not negative but for rounding and for tokens taken as alike.
    """
    experts = s.shape[0]
    order = jnp.arange(experts, dtype=jnp.int32)
    tokens = jnp.sum(valid, dtype=jnp.int32)
    ids = jnp.where(valid, jnp.argmax(s - prices[:, None], axis=0), experts).astype(jnp.int32)
    extra = _dearest(prices, tokens % experts)

    def leave(i, ids):  # the least that a token of expert i loses by going to each of the others, [E]
        return jnp.min(jnp.where(ids == i, s[i] - s, jnp.inf), axis=1)

    def excess(ids, extra):
        return count_experts(ids, experts) - tokens // experts - extra

    def move(state):
        ids, extra, prices, loss, moves = state
        over = excess(ids, extra)
        margin = alike * 2 ** (jnp.maximum(moves - 64 - 2 * experts, 0) / 16).astype(s.dtype)
        swap = ~extra[:, None] & extra & (loss >= 0)
        edges = jnp.maximum(jnp.where(swap, 0, loss) + prices - prices[:, None], 0)
        distance, parent = _shortest(edges, over > 0)
        end = jnp.argmin(jnp.where(over < 0, distance, jnp.inf)).astype(jnp.int32)
        prices = prices - jnp.minimum(distance, distance[end])

        def candidates(i, j, ids, loss):
            return (ids == i) & (s[i] - s[j] <= loss[i, j] + margin) & ~swap[i, j]

        def inside(walk):  # from the path's end to its start, its own parent
            return parent[walk[0]] != walk[0]

        def narrow(walk):
            j, room = walk
            i = parent[j]
            here = jnp.sum(candidates(i, j, ids, loss), dtype=jnp.int32)
            return i, jnp.minimum(room, jnp.where(swap[i, j], 1, here))

        start, room = lax.while_loop(inside, narrow, (end, -over[end]))
        room = jnp.minimum(room, over[start])

        def carry(walk):
            j, ids, extra, loss = walk
            i = parent[j]
            going = candidates(i, j, ids, loss)
            ids = jnp.where(going & (jnp.cumsum(going) <= room), j, ids)
            extra = jnp.where(swap[i, j], (extra | (order == i)) & (order != j), extra)
            return i, ids, extra, loss.at[j].set(leave(j, ids))

        _, ids, extra, loss = lax.while_loop(inside, carry, (end, ids, extra, loss))
        return ids, extra, prices, loss.at[start].set(leave(start, ids)), moves + 1

    loss = lax.map(lambda i: leave(i, ids), order)
    state = compat.vary_alike(ids, extra, prices, loss, jnp.int32(0))
    ids, extra, prices, _, moves = lax.while_loop(lambda c: jnp.any(excess(c[0], c[1]) > 0), move, state)
    return ids, prices, extra, moves


def _shortest(edges, sources):
    """Distances [E] from the nearest of `sources` bool [E] over edges [E, E] >= 0, and parents int32 [E] (Bellman-Ford).

    A source is its own parent. Parents form no cycle, even where edges are 0: they change on a strict gain only.
    """
    experts = edges.shape[0]

    def relax(state):
        distance, parent, _, left = state
        through = distance[:, None] + edges
        better = jnp.min(through, axis=0) < distance
        parent = jnp.where(better, jnp.argmin(through, axis=0).astype(jnp.int32), parent)
        return jnp.minimum(distance, jnp.min(through, axis=0)), parent, jnp.any(better), left - 1

    distance = jnp.where(sources, 0, jnp.inf).astype(edges.dtype)
    start = (distance, jnp.arange(experts, dtype=jnp.int32), jnp.array(True), jnp.int32(experts))
    distance, parent, *_ = lax.while_loop(lambda c: c[2] & (c[3] > 0), relax, compat.vary_alike(*start))
    return distance, parent
