"""The section of a run that recorded its routing: how long tokens still change their experts."""

import numpy as np

from moe_jax.report import pictures
from moe_jax.report.history import Series
from moe_jax.report.overview import Material
from moe_jax.report.page import number, paragraph, percent, picture, table, text
from moe_jax.report.pictures import Panel
from moe_jax.report.routing_facts import information
from moe_jax.train.routing_history import SHARES_OF_TRAINING, RoutingHistory, fluctuation, last_changes

# The shuffles that correct for chance take most of the time; one is enough of so many tokens.
_SHUFFLES = 1


def settling(m: Material) -> str:
    """Shares of the recorded tokens that change between records and after them, and what their pieces tell, over the steps."""
    history, steps = m.routing, m.run.config.train.steps
    layers = [name for name in m.analyses if name in history.layers]
    shares = fluctuation(history, steps)
    after = [f"after {share} %" for share in SHARES_OF_TRAINING]
    rows = [(text(n), *(percent(share) for share in shares[n].values()), number(_switch(history, n), 0)) for n in layers]
    out = table(["layer", *after, "the same from step"], rows, kinds="." + "n" * (len(after) + 1)) + paragraph(
        f"Of {len(history.ids):,} held-out tokens, always the same, those whose experts last changed after so much "
        f"of the run's {steps:,} steps; recorded {len(history.steps)} times, as training would route them without noise. the "
        "same from step: of the first record after which none changed any more.",
        note=True,
    )
    panels = [
        Panel("Tokens that will change again", "share of tokens", {name: _to_change(history, name) for name in layers}),
        Panel("Tokens changed since the last record", "share of tokens", {name: _changed(history, name) for name in layers}),
        Panel(
            "What the piece tells of the expert",
            "share, corrected",
            {name: _cohesion(history, name) for name in m.detailed if name in layers},
        ),
    ]
    return out + picture(
        pictures.curves(panels),
        "Shares of tokens that will change their experts, that changed them, and cohesion, over the steps",
        "A routing that is frozen shows as an edge, after which nothing changes. The share that the piece tells is that of the "
        "section on pieces.",
    )


def _switch(history: RoutingHistory, layer: str) -> int:
    """The first recorded step after which no token's experts change."""
    return int(history.steps[last_changes(history.layers[layer]).max() + 1])


def _to_change(history: RoutingHistory, layer: str) -> Series:
    last = last_changes(history.layers[layer])
    return Series(history.steps, np.array([np.mean(last >= i) for i in range(len(history.steps))]))


def _changed(history: RoutingHistory, layer: str) -> Series:
    packed = history.layers[layer]
    return Series(history.steps[1:], np.any(packed[1:] != packed[:-1], axis=2).mean(axis=1))


def _cohesion(history: RoutingHistory, layer: str) -> Series:
    shares = [information(history.ids, history.chosen(layer, i), repeats=_SHUFFLES).share for i in range(len(history.steps))]
    return Series(history.steps, np.array(shares))
