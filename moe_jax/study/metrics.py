"""The numbers of a run that tables, curves and pictures show: what each is, how it is read, and how it is printed."""

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.train.routing_history import SHARES_OF_TRAINING

Scores = dict[str, dict[str, Any]]  # source -> what `train.evaluation.evaluate` gives of its whole validation text
Rows = list[dict[str, Any]]  # the training rows of metrics.jsonl

LAST_PART = 0.75  # of training: routing is averaged over the steps after it
LOAD = "load_max_over_mean"


class Metric(NamedTuple):
    """A number of a run.

    Attributes:
      title: of a column.
      axis: of a picture, with the unit.
      form: its format, once it is multiplied by `scale`; `unit` follows it.
      read: (scores, training rows) -> the number, or None where a run has none.
      minus_baseline: in place of `read`: the metric of which this is the difference to the baseline's run of the same seed.
      per_token: whether it compares only runs whose text is the same tokens.
      interval: whether a row of the tables has its interval over the seeds, or the mean alone.
    """

    title: str
    axis: str
    form: str
    read: Callable[[Scores, Rows], float | None] | None = None
    scale: float = 1
    unit: str = ""
    minus_baseline: str = ""
    per_token: bool = False
    interval: bool = False


def overall(sources: Scores) -> tuple[float | None, float | None]:
    """(nats per token, bits per byte) over the text of all sources together."""
    if any(source["loss"] is None for source in sources.values()):
        return None, None
    nats = math.fsum(source["loss"] * source["tokens"] for source in sources.values())
    tokens, size = (sum(source[key] for source in sources.values()) for key in ("tokens", "bytes"))
    return nats / tokens, nats / math.log(2) / max(size, 1)


def over_sources(sources: Scores, key: str) -> float | None:
    """A score's mean over the sources by their tokens, which need not be that of all text together; None where one has none."""
    values = [(source.get(key), source["tokens"]) for source in sources.values()]
    if any(value is None for value, _ in values):
        return None
    return math.fsum(value * tokens for value, tokens in values) / sum(tokens for _, tokens in values)


def last_rows(rows: Rows) -> Rows:
    """The rows of the last quarter of training that have routing; [] without routers."""
    last = rows[-1]["step"] if rows else 0
    return [row for row in rows if row["step"] > LAST_PART * last and f"router/{LOAD}" in row]


def late_mean(rows: Rows, name: str) -> float | None:
    """The mean of a column over the last quarter of training."""
    values = [row[name] for row in last_rows(rows) if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def worst_layer(rows: Rows) -> tuple[str | None, float | None]:
    """(the layer whose load is highest over the last quarter of training, its load)."""
    last = last_rows(rows)
    names = [name for name in last[-1] if name.count("/") == 2 and name.endswith(f"/{LOAD}")] if last else []
    layers = {name.split("/")[1]: late_mean(rows, name) for name in names}
    worst = max(layers, key=layers.get, default=None)
    return worst, layers.get(worst)


def _score(name: str) -> Callable[[Scores, Rows], float | None]:
    return lambda sources, rows: over_sources(sources, f"router/{name}")


def _late(name: str) -> Callable[[Scores, Rows], float | None]:
    return lambda sources, rows: late_mean(rows, f"router/{name}")


def _skipped(sources: Scores, rows: Rows) -> int | None:
    return rows[-1]["skipped"] if rows else None


def _counted_flops(sources: Scores, rows: Rows) -> float | None:
    values = [row["flops_per_token"] for row in rows if row.get("flops_per_token") is not None]
    return statistics.fmean(values) if values else None


def _last_value(rows: Rows, name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


_LOSS, _BITS = "loss (nats per token)", "bits per byte"
METRICS = {
    # Of the whole validation text.
    "loss": Metric("loss", _LOSS, ".4f", lambda sources, rows: overall(sources)[0], per_token=True),
    "bits_per_byte": Metric(_BITS, _BITS, ".4f", lambda sources, rows: overall(sources)[1]),
    "usage": Metric("experts used", "experts used (%)", ".1f", _score("usage"), scale=100, unit=" %", interval=True),
    "unevenness": Metric("unevenness, nats", "unevenness (nats)", ".3f", _score("unevenness"), interval=True),
    "difference": Metric(
        "loss minus the baseline's",
        "loss minus the baseline's (nats per token)",
        ".4f",
        minus_baseline="loss",
        per_token=True,
        interval=True,
    ),
    "bits_difference": Metric(
        f"{_BITS} minus the baseline's", f"{_BITS} minus the baseline's", ".4f", minus_baseline="bits_per_byte", interval=True
    ),
    "evaluated_experts": Metric(
        "experts a token, evaluated", "experts that ran for a token, in evaluation", ".2f", _score("experts_per_token")
    ),
    # Of the last quarter of training.
    "load": Metric("load max/mean", "tokens of the fullest expert / mean of all", ".2f", _late(LOAD)),
    "load_worst": Metric("worst layer", "load of the worst layer", ".2f", lambda sources, rows: worst_layer(rows)[1]),
    "dead_experts": Metric("dead experts", "dead experts, all layers", ".1f", _late("dead_experts")),
    "dropped": Metric("dropped", "dropped (%)", ".2f", _late("dropped"), scale=100, unit=" %"),
    "entropy": Metric("entropy, nats", "entropy of the router (nats)", ".2f", _late("entropy")),
    "experts_per_token": Metric("experts a token", "experts that ran for a token", ".2f", _late("experts_per_token")),
    # Of the whole of it.
    **{
        f"fluctuation_{share}": Metric(
            f"changed after {share} %",
            f"tokens whose expert changed after {share} % of training (%)",
            ".1f",
            lambda sources, rows, share=share: _last_value(rows, f"router/fluctuation_{share}"),
            scale=100,
            unit=" %",
        )
        for share in SHARES_OF_TRAINING
    },
    "flops_per_token": Metric(
        "MFLOP a token", "training FLOPs of a token, by the experts that ran (MFLOP)", ".2f", _counted_flops, scale=1e-6
    ),
    "skipped": Metric("skipped steps", "skipped steps", ".1f", _skipped),
}
