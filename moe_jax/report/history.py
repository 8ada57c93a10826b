"""The rows of metrics.jsonl as series over the steps."""

import re
from typing import Any, NamedTuple

import numpy as np

_LOAD = re.compile(r"router/([^/]+)/load")
_LAYER_SCALAR = re.compile(r"router/([^/]+)/([^/]+)")
_LOSS = re.compile(r"router/([^/]+_loss)")
_EVALUATION = re.compile(r"eval/([^/]+)/(.+)")
# What has a picture of its own.
_SHOWN = re.compile(r"load|load_max_over_mean|entropy|dropped|dead_experts|fluctuation_\d+")

Row = dict[str, Any]


class Series(NamedTuple):
    """steps: int [R]. values: float64 [R] or [R, E]; NaN where the run wrote null."""

    steps: np.ndarray
    values: np.ndarray


def series(rows: list[Row], name: str) -> Series:
    """The rows that have `name`, a number or a list of numbers."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    values = [np.asarray(value, np.float64) for _, value in points]  # None becomes NaN
    return Series(np.array([step for step, _ in points], np.int64), np.stack(values) if values else np.zeros(0))


def layer_names(rows: list[Row]) -> list[str]:
    """The routed layers that the rows know."""
    return sorted({match[1] for row in rows for name in row if (match := _LOAD.fullmatch(name))})


def evaluations(rows: list[Row], metric: str) -> dict[str, Series]:
    """By source, a metric of the evaluations during training."""
    names = {name: m[1] for row in rows for name in row if (m := _EVALUATION.fullmatch(name)) and m[2] == metric}
    return {source: series(rows, name) for name, source in sorted(names.items())}


def other_sums(rows: list[Row], layers: list[str]) -> dict[str, dict[str, Series]]:
    """{name: {layer: series}} of what routers sum beside the known figures, such as overflow, and of the routers' losses under
    the layer ""."""
    found: dict[str, dict[str, str]] = {}
    for key in sorted({name for row in rows for name in row}):
        if (match := _LAYER_SCALAR.fullmatch(key)) and match[1] in layers and not _SHOWN.fullmatch(match[2]):
            found.setdefault(match[2], {})[match[1]] = key
        elif match := _LOSS.fullmatch(key):
            found.setdefault(match[1], {})[""] = key
    return {name: {layer: series(rows, key) for layer, key in keys.items()} for name, keys in found.items()}


def thinned(one: Series, limit: int) -> Series:
    """At most `limit` rows: means over equal runs of rows, at their last steps."""
    if len(one.steps) <= limit:
        return one
    ends = np.arange(1, limit + 1) * len(one.steps) // limit
    starts = np.concatenate([[0], ends[:-1]])
    sums = np.add.reduceat(np.nan_to_num(one.values), starts, axis=0)
    counts = np.add.reduceat(np.isfinite(one.values).astype(np.int64), starts, axis=0)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return Series(one.steps[ends - 1], means)
