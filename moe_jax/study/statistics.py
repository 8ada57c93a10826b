"""Paired differences with t-intervals and tests, what they resolve, and when a curve reaches a value."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import scipy.stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean with the t-interval around it; `low` and `high` are None where fewer than two values leave it open."""

    mean: float
    low: float | None
    high: float | None
    n: int


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """The mean of independent values, such as paired differences of seeds, with its two-sided Student interval.

    mean -+ t(n - 1) * s / sqrt(n), s the standard deviation with n - 1. None without values.
    """
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    if all(value == values[0] for value in values):
        return Interval(values[0], values[0], values[0], n)  # no rounding in the mean
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1)) * _standard_error(values, mean)
    return Interval(mean, mean - half, mean + half, n)


def _standard_error(values: Sequence[float], mean: float) -> float:
    n = len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) / math.sqrt(n)


def noise_band(intervals: Sequence[Interval]) -> float | None:
    """The largest mean difference that A/A pairs, which differ in nothing but noise, leave possible; None without one."""
    ends = [max(abs(i.low), abs(i.high)) for i in intervals if i.low is not None]
    return max(ends, default=None)


def p_value(values: Sequence[float], margin: float | None = None) -> float | None:
    """Of the paired t-test on differences of seeds; None for fewer than two.

    margin: of the hypothesis that the mean is `margin` or more, counted for both tails: below 0.05 where the upper end of the
      95 % interval is below the margin. None: that the mean is 0, below 0.05 where the interval leaves 0 out.
    """
    n = len(values)
    if n < 2:
        return None
    if all(value == values[0] for value in values):  # without a deviation the test has no statistic
        return float(values[0] >= margin if margin is not None else values[0] == 0)
    # scipy's own test warns of values that are nearly equal, as differences of similar runs are.
    mean = math.fsum(values) / n
    away = abs(mean) if margin is None else margin - mean
    return min(2 * float(scipy.stats.t.sf(away / _standard_error(values, mean), n - 1)), 1.0)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (1979): below a level for as many hypotheses as can be rejected with that level for the family.

    In order of size, the largest so far of (m - i) * p_i, i from 0, at most 1. None, of what could not be tested, stays
    None and counts in m, so that a missing run does not make the others significant.
    """
    adjusted, largest = [None] * len(p_values), 0.0
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min((len(p_values) - rank) * p, 1.0))
        adjusted[i] = largest
    return adjusted


def verdict(
    difference: Interval | None,
    band: float | None,
    p: float | None = None,
    margin: float | None = None,
    p_margin: float | None = None,
) -> str:
    """What a paired difference says.

    Args:
      difference: with its interval.
      band: of A/A noise: a mean inside it is not resolved.
      p: of its test, adjusted for the family; None: its interval against 0 decides.
      margin: named beforehand; None: none. Below it the arm is at least as good as its baseline.
      p_margin: of the test against the margin, adjusted too.
    """
    if difference is None:
        return "no pair"
    level = 1 - CONFIDENCE
    good = f"at least as good (margin {margin:g})" if margin is not None and p_margin is not None and p_margin < level else ""
    if band is not None and abs(difference.mean) <= band:
        return good or "within A/A noise"
    if difference.low is None:
        return "not resolved (one seed)"
    resolved = p < level if p is not None else difference.low > 0 or difference.high < 0
    if resolved:
        return f"resolved, {good}" if good and difference.mean > 0 else "resolved"
    return good or "not resolved"


def first_reached(steps: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """The step at which a curve first falls to `target`, on the line between the points around it.

    The first point's own step where that is already below; None where no point is. Points that are not finite
    are not joined.
    """
    before = None
    for step, value in zip(steps, values):
        if value is None or not math.isfinite(value):
            before = None
            continue
        if value <= target:
            if before is None or value == before[1]:
                return float(step)
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = step, value
    return None
