"""From recorded choices to the figures of the page, layer by layer."""

from typing import NamedTuple

import numpy as np

from moe_jax.report.collect import Choices, Observed
from moe_jax.report.routing_facts import (
    Churn,
    Information,
    changed_labels,
    churn,
    co_activation,
    contingency,
    information,
    most_specific,
    pair_lift,
)
from moe_jax.train.routing_metrics import routing_metrics

MINIMUM = 5  # assignments of a piece to an expert, and tokens of a piece, before it is named


class Piece(NamedTuple):
    """A token id at an expert: `here` of its `tokens` have it."""

    token_id: int
    here: int
    tokens: int


class LayerAnalysis(NamedTuple):
    """One layer on the held-out tokens; N = E + V columns.

    shares: float64 [N], of the assignments. loads: float64 [N], the same of the experts' load, which of a dense matrix is the
    sum of its weights. set_size: experts of a token, mean. alone: share of tokens without any. sums: as `routing_metrics` names
    them. piece, source: what the token's piece, its source tell of the expert; source: None with one source. Only of detailed
    layers: pieces: for each column; source_shares: [sources, N]; pairs: [N, N] or None where no token has two experts. churn,
    changed: None without an older checkpoint.
    """

    shares: np.ndarray
    loads: np.ndarray
    set_size: float
    alone: float
    sums: dict[str, float]
    piece: Information
    source: Information | None
    pieces: list[list[Piece]] | None
    source_shares: np.ndarray | None
    pairs: np.ndarray | None
    churn: Churn | None
    changed: list[tuple[int, int, int]] | None


def spread(names: list[str], limit: int) -> list[str]:
    """At most `limit` of the names, evenly spaced, the first and the last among them."""
    if len(names) <= limit:
        return names
    return [names[i] for i in np.linspace(0, len(names) - 1, limit).round().astype(int)]


def analyse(observed: Observed, older: Observed | None, detailed: list[str], pieces: int) -> dict[str, LayerAnalysis]:
    """`LayerAnalysis` of every layer; one layer's matrices are in memory at a time.

    Args:
      observed: the checkpoint of the page.
      older: the same tokens under another one.
      detailed: layers with pieces, sources and pairs.
      pieces: at most so many for an expert.
    """
    return {
        name: _layer(observed, choices, older and older.layers[name], name in detailed, pieces)
        for name, choices in observed.layers.items()
    }


def _layer(observed: Observed, choices: Choices, older: Choices | None, detailed: bool, limit: int) -> LayerAnalysis:
    chosen, ids = choices.chosen(), observed.ids
    counts, sizes = chosen.sum(axis=0), chosen.sum(axis=1)
    several = len(observed.names) > 1
    virtual = np.asarray(choices.sums.get("virtual_counts", np.zeros(0)))
    loads = np.concatenate([choices.sums["counts"], virtual])
    pieces = source_shares = pairs = None
    if detailed:
        names, table = contingency(ids, chosen)
        tokens = np.unique(ids, return_counts=True)[1]  # in the order of `names`
        pieces = [
            [Piece(int(names[row]), int(table[row, column]), int(tokens[row])) for row in rows]
            for column, rows in enumerate(most_specific(table, limit, minimum=MINIMUM))
        ]
        if several:
            source_shares = _rows_as_shares(contingency(observed.sources, chosen)[1])
        if sizes.max(initial=0) > 1:
            pairs = pair_lift(co_activation(chosen))
    change = changed = None
    if older is not None:
        old = older.chosen()
        change = churn(chosen, choices.first, old, older.first)
        changed = changed_labels(ids, np.any(chosen != old, axis=1), 12, minimum=MINIMUM)
    named = routing_metrics({"": choices.sums})
    return LayerAnalysis(
        shares=counts / max(counts.sum(), 1),
        loads=loads / max(np.sum(choices.sums["counts"]), 1),
        set_size=float(sizes.mean()) if len(sizes) else 0.0,
        alone=float((sizes == 0).mean()) if len(sizes) else 0.0,
        sums={name.removeprefix("router//"): v for name, v in named.items() if name.startswith("router//")},
        piece=information(ids, chosen),
        source=information(observed.sources, chosen) if several else None,
        pieces=pieces,
        source_shares=source_shares,
        pairs=pairs,
        churn=change,
        changed=changed,
    )


def _rows_as_shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
