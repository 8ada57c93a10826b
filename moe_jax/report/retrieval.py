"""The section of layers that retrieve one-neuron experts: how many of them are used, and how evenly."""

import math

import numpy as np

from moe_jax.config.blocks import RETRIEVING
from moe_jax.models.places import places
from moe_jax.report import pictures
from moe_jax.report.history import evaluations, series
from moe_jax.report.overview import Material
from moe_jax.report.page import number, paragraph, percent, picture, table, text
from moe_jax.report.pictures import Panel
from moe_jax.routing.product_keys import usage

TOP = 0.01  # of the experts, whose share of the gates the table has


def retrieval(m: Material) -> str:
    """Use of the pools on the held-out tokens, and in the evaluations during training."""
    peers = {place.name: place.ffn.peer for place in places(m.model, *RETRIEVING)}
    head = [
        "layer",
        "experts N",
        "used",
        "if all were even",
        "unevenness",
        "as many as even",
        "of the top 1 %",
        "entropy of gates",
    ]
    rows, shares = [], {}
    for name, sums in m.observed.retrieved.items():
        peer, mass, tokens = peers[name], sums["mass"], max(float(sums["tokens"]), 1.0)
        measures, count = usage(mass), len(mass)
        shares[name] = mass / max(mass.sum(), 1e-300)
        top = np.sort(shares[name])[::-1][: max(int(TOP * count), 1)].sum()
        # Of N equally likely experts, after so many independent draws.
        even = -math.expm1(tokens * peer.heads * peer.top_k * math.log1p(-1 / count)) if count > 1 else 1.0
        rows.append(
            (
                text(name),
                f"{count:,}",
                percent(measures["usage"]),
                percent(even),
                f"{number(measures['unevenness'])} nats",
                number(count * math.exp(-measures["unevenness"]), 0),
                percent(top),
                f"{number(sums['entropy_sum'] / tokens)} nats",
            )
        )
    limits = " or ".join(f"ln {k} = {math.log(k):.3f}" for k in sorted({peer.top_k for peer in peers.values()}))
    out = table(head, rows, kinds=".nnnnnnn") + paragraph(
        "used: experts that any of these tokens retrieves. if all were even: what independent draws, equally likely, "
        "would use of so few tokens. unevenness: divergence of the experts' shares of all gates from even ones; 0 "
        "is even, ln N one expert with all. as many as even: N exp(-unevenness). of the top 1 %: gates of the "
        f"experts with the most. entropy of gates: of a head's over its picks, at most {limits} nats. Gates of scores "
        "that may be negative count by their absolute value.",
        note=True,
    )
    out += picture(
        pictures.mass_by_rank(shares),
        "Shares of the gates of every expert, sorted, beside even ones",
        "Each expert's part of all gates on these tokens, in multiples of 1/N. A line that ends in a fall leaves the "
        "rest unused.",
    )
    return out + _over_time(m, list(shares))


def _over_time(m: Material, layers: list[str]) -> str:
    """Use in the evaluations, a mean over the layers, and the entropy in training."""
    figures = (("Experts used, validation", "share", "usage"), ("Unevenness, validation", "nats", "unevenness"))
    panels = [Panel(title, unit, evaluations(m.rows, f"router/{key}")) for title, unit, key in figures]
    entropy = {name: series(m.rows, f"router/{name}/gate_entropy") for name in layers}
    panels.append(Panel("Entropy of the gates, training", "nats", entropy))
    panels = [panel for panel in panels if any(len(one.steps) for one in panel.lines.values())]
    if not panels:
        return paragraph("The metrics have no rows of these layers.")
    note = "The evaluations during training see some batches of the validation text."
    note += " Their figures are means over the layers." if len(layers) > 1 else ""
    return picture(pictures.curves(panels), "Use of the experts and entropy of their gates over the steps", note)
