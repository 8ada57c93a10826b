"""Arms of a study in order of a quantity, such as the number of experts."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.config.study import Curve
from moe_jax.study.metrics import METRICS
from moe_jax.study.statistics import Interval, t_interval

Runs = dict[tuple[str, int], dict[str, Any]]


def same_tokens(run: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two finished runs were scored on the same tokens; the text is the same, their tokenizers may not be."""
    tokens = lambda one: {name: source["digest"] for name, source in one["sources"].items()}
    return tokens(run) == tokens(other)


def paired(
    runs: Runs,
    seeds: Sequence[int],
    arm: str,
    other: str,
    value: Callable[[dict[str, Any]], float | None],
    per_token: bool,
) -> Interval | None:
    """The interval of `value` of an arm minus that of another, over the seeds that both have finished.

    per_token: such a value compares only where the tokens are the same.
    """
    pairs = [(runs[arm, seed], runs[other, seed]) for seed in seeds]
    both = [(a, b) for a, b in pairs if a["state"] == b["state"] == "done" and (same_tokens(a, b) or not per_token)]
    values = [(value(a), value(b)) for a, b in both]
    return t_interval([a - b for a, b in values if a is not None and b is not None])


def slope(
    runs: Runs,
    seeds: Sequence[int],
    xs: dict[str, float],
    value: Callable[[dict[str, Any]], float | None],
    per_token: bool,
) -> Interval | None:
    """The interval of the slope of `value` over the arms' x, least squares seed by seed; None with fewer than two x.

    xs: arm -> x. Seeds count that have finished every arm.
    """
    if len(set(xs.values())) < 2:
        return None
    slopes = []
    for seed in seeds:
        done = [runs[arm, seed] for arm in xs]
        if any(run["state"] != "done" for run in done) or per_token and not all(same_tokens(run, done[0]) for run in done):
            continue
        values = [value(run) for run in done]
        if None not in values:
            slopes.append(statistics.linear_regression(list(xs.values()), values).slope)
    return t_interval(slopes)


def _measured(arms: dict[str, float], runs: Runs, seeds: Sequence[int], metric: str) -> dict[str, float]:
    """{arm: the mean of `metric` over its finished runs}, of the arms that have it."""
    found = {arm: [runs[arm, seed].get(metric) for seed in seeds if runs[arm, seed]["state"] == "done"] for arm in arms}
    known = {arm: [value for value in values if value is not None] for arm, values in found.items()}
    return {arm: statistics.fmean(values) for arm, values in known.items() if values}


def collect_curve(curve: Curve, runs: Runs, seeds: Sequence[int]) -> dict[str, Any]:
    """The points of a curve.

    Returns:
      name, title, x, log, metrics; lines: for each its label, by metric the interval of the `slope` over x, a doubling of it
      where x is logarithmic, and points, in order of x: x, arm, and by metric the intervals `value` over the seeds, `step` of
      the paired difference to the point before, `across` of that to the first line's point at the same x. None where there is
      no such point, or no such number.
    """
    lines, first = [], {}
    for label, arms in curve.lines.items():
        points, before = [], None
        if curve.x_metric:
            arms = _measured(arms, runs, seeds, curve.x_metric)
        for arm, x in sorted(arms.items(), key=lambda item: item[1]):
            point = {"x": x, "arm": arm, "value": {}, "step": {}, "across": {}}
            for metric in curve.metrics:
                get = lambda run: run.get(metric)
                done = [get(runs[arm, seed]) for seed in seeds if runs[arm, seed]["state"] == "done"]
                point["value"][metric] = t_interval([value for value in done if value is not None])
                per_token = METRICS[metric].per_token
                difference = lambda other: other and paired(runs, seeds, arm, other, get, per_token)
                point["step"][metric] = difference(before)
                point["across"][metric] = difference(first.get(x) if lines else None)
            points.append(point)
            before = arm
        first = first or {point["x"]: point["arm"] for point in points}
        xs = {arm: math.log2(x) if curve.log else x for arm, x in arms.items()}
        slopes = {m: slope(runs, seeds, xs, lambda run: run.get(m), METRICS[m].per_token) for m in curve.metrics}
        lines.append({"label": label, "points": points, "slope": slopes})
    return {
        "name": curve.name,
        "title": curve.title,
        "x": curve.x,
        "log": curve.log,
        "metrics": list(curve.metrics),
        "lines": lines,
    }
