"""What the statistics of a step's routers say."""

from typing import Any

import numpy as np

from moe_jax.routing.product_keys import usage
from moe_jax.routing.statistics import Histogram

TOKENS = "_tokens"
# Finer ones are there for a quantile, and each would be some kilobytes in every row.
MOST_BINS = 100


def routing_metrics(stats: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a step's routing sums say, by layer and over all layers.

    Args:
      stats: for each routed layer its sums over the step: `counts` [E], assignments per expert as the router
        chose them, before any drop; `dropped` assignments; `entropy_sum` of the router's distribution in
        nats; `tokens`, the valid ones. Other scalars are passed through as they are.

    Returns:
      For each layer, under router/<layer>/: `load_max_over_mean` (1: balanced, E: one expert has all), `entropy` (nats per
      token), `dropped` (share of the assignments), `dead_experts` (experts without a token), `load` (list of E shares),
      `virtual_share` (where there are zero, copy or constant experts, their share of the assignments), what a router names
      X_tokens as X, a share of the tokens, a router's own histogram of at most 100 bins (list of their shares) and the other
      sums. A layer that retrieves one-neuron experts has no counts; it has `gate_entropy` (nats) of a head's gates and, in
      evaluation, `usage` and `unevenness` (`routing.product_keys.usage`). Under router/: means over the layers that have them
      of shares, entropy, load_max_over_mean, gate_entropy, usage and unevenness, and totals of dead_experts and the other sums.
      A layer without assignments counts as balanced, with all experts dead. Empty without layers.
    """
    if not stats:
        return {}
    row, columns = {}, {}
    for layer, sums in sorted(stats.items()):
        for name, value in _layer_metrics(sums).items():
            row[f"router/{layer}/{name}"] = value
            columns.setdefault(name, []).append(value)
    shares = {name.removesuffix(TOKENS) for sums in stats.values() for name in sums if name.endswith(TOKENS)}
    means = (*shares, "load_max_over_mean", "entropy", "dropped", "virtual_share", "gate_entropy", "usage", "unevenness")
    totals = {
        f"router/{name}": sum(values) / len(values) if name in means else sum(values)
        for name, values in columns.items()
        if not isinstance(values[0], list)
    }
    return {**totals, **row}


def _layer_metrics(sums: dict[str, Any]) -> dict[str, Any]:
    if "counts" not in sums:
        return _retrieval_metrics(sums)
    counts = np.asarray(sums["counts"], np.float64)
    total = float(counts.sum())
    tokens = max(float(sums["tokens"]), 1.0)
    shares = {name: value for name, value in sums.items() if name.endswith(TOKENS)}
    known = (*shares, "counts", "dropped", "entropy_sum", "tokens")
    virtual = float(np.sum(sums.get("virtual_counts", 0.0)))
    return {
        **({"virtual_share": virtual / max(total + virtual, 1.0)} if "virtual_counts" in sums else {}),
        "load_max_over_mean": float(counts.max()) * len(counts) / total if total else 1.0,
        "entropy": float(sums["entropy_sum"]) / tokens,
        "dropped": float(sums["dropped"]) / max(total, 1.0),
        "dead_experts": int((counts == 0).sum()),
        **{name.removesuffix(TOKENS): float(value) / tokens for name, value in shares.items()},
        "load": (counts / max(total, 1.0)).tolist(),
        **{name: _plain_statistic(value) for name, value in sums.items() if name not in known and _can_be_shown(value)},
    }


def describe_frozen(stats: dict[str, dict[str, Any]]) -> str:
    """What the first step with a frozen routing says of it, from its sums by layer, those of all microbatches together."""
    row, counts = (
        routing_metrics(stats),
        [np.asarray(sums["counts"], np.float64) for sums in stats.values() if "counts" in sums],
    )
    over = sum(np.maximum(one - np.ceil(2 * one.sum() / one.size), 0).sum() for one in counts)
    parts = [
        f"the fullest expert has {row['router/load_max_over_mean']:.2f} times the mean load",
        f"a capacity factor of 2 would drop about {over / max(sum(one.sum() for one in counts), 1):.1%}",
    ]
    if "router/agreement" in row:
        parts.insert(0, f"the light router agrees with the backbone on {row['router/agreement']:.1%} of the tokens")
    return "the routing is frozen: " + "; ".join(parts)


def _can_be_shown(value: Any) -> bool:
    """Whether a router's own statistic has a figure of its own: a scalar, or one histogram of not too many bins."""
    return value.counts.ndim == 1 and value.counts.size <= MOST_BINS if isinstance(value, Histogram) else np.ndim(value) == 0


def _plain_statistic(value: Any) -> Any:
    """A scalar, or the shares of a histogram's bins."""
    if isinstance(value, Histogram):
        counts = np.asarray(value.counts, np.float64)
        return (counts / max(counts.sum(), 1.0)).tolist()
    return float(value)


def _retrieval_metrics(sums: dict[str, Any]) -> dict[str, float]:
    row = {
        "gate_entropy": float(sums["entropy_sum"]) / max(float(sums["tokens"]), 1.0),
        "nonfinite": float(sums["nonfinite"]),
    }
    return row | (usage(np.asarray(sums["mass"])) if "mass" in sums else {})
