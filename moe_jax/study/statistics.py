"""Paired differences with t-intervals, what they resolve, and when a curve reaches a value."""

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
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def noise_band(intervals: Sequence[Interval]) -> float | None:
    """The largest mean difference that A/A pairs, which differ in nothing but noise, leave possible; None without one."""
    ends = [max(abs(i.low), abs(i.high)) for i in intervals if i.low is not None]
    return max(ends, default=None)


def verdict(difference: Interval | None, band: float | None) -> str:
    """What a paired difference says: its mean against the A/A band first, then its interval against 0."""
    if difference is None:
        return "no pair"
    if band is not None and abs(difference.mean) <= band:
        return "within A/A noise"
    if difference.low is None:
        return "not resolved (one seed)"
    return "resolved" if difference.low > 0 or difference.high < 0 else "not resolved"


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
