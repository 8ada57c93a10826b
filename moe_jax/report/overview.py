"""What the page is made from, and its first section: the run, its losses, its layers."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.config import FFNConfig, ModelConfig
from moe_jax.config.blocks import BUILT_IN, RETRIEVING, distinct_layers, expert_width
from moe_jax.models.places import places
from moe_jax.report.analysis import LayerAnalysis
from moe_jax.report.collect import Observed, column_names
from moe_jax.report.history import Row, evaluations, series
from moe_jax.report.page import number, paragraph, percent, table, text
from moe_jax.train.restore import LoadedRun
from moe_jax.train.routing_history import RoutingHistory


class Material(NamedTuple):
    """What the page is made from.

    rows: of metrics.jsonl. analyses: by layer, in order of depth; {} of a dense model. detailed: the layers with pieces and
    passages. older: what the choices are compared with, in words; "": nothing, and `no_older` says why. routing: what the run
    recorded while it went on.
    """

    run: LoadedRun
    rows: list[Row]
    observed: Observed
    analyses: dict[str, LayerAnalysis]
    detailed: list[str]
    older: str
    no_older: str
    routing: RoutingHistory | None = None

    @property
    def model(self) -> ModelConfig:
        return self.run.config.model

    @property
    def columns(self) -> dict[str, list[str]]:
        """Names of the experts of each routed layer, the virtual ones last."""
        return column_names(self.model)

    def alike(self, layers: Iterable[str]) -> list[list[str]]:
        """`layers`, those with the same experts together."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in layers:
            groups.setdefault(tuple(self.columns[name]), []).append(name)
        return list(groups.values())

    def experts(self, layer: str) -> int:
        """E of a routed layer."""
        return next(place.ffn.moe.experts for place in places(self.model) if place.name == layer)


def lead(m: Material, workdir: str, split: str) -> str:
    """What the page shows, below its title."""
    per_source = ", ".join(f"{text(name)} {int((m.observed.sources == i).sum()):,}" for i, name in enumerate(m.observed.names))
    rows, length = m.observed.batch
    return paragraph(
        f"Run <code>{text(workdir)}</code>, checkpoint of step {m.run.step:,}. Choices were recorded on held-out text"
        f"{f' (the {split} split)' if split else ''}, in whole batches of {rows} x {length} tokens spread evenly "
        f"over it. Tokens: {per_source}.",
        note=True,
    )


def summary(m: Material) -> str:
    """The tables up front."""
    out = table(["", ""], [(f"<b>{text(k)}</b>", v) for k, v in _run_facts(m)])
    out += "<h3>Losses</h3>\n" + _losses(m)
    if not m.analyses:
        none = "This model has no routed layers" + ("." if m.observed.retrieved else ": there is nothing to say of routers.")
        return out + paragraph(none)
    out += "<h3>Routed layers on the held-out tokens</h3>\n"
    head = [
        "layer",
        "max/mean load",
        "entropy",
        "dead experts",
        "experts a token",
        "without expert",
        "I(expert; piece)",
        "share, corrected",
    ]
    rows = [
        (
            text(name),
            number(f.sums["load_max_over_mean"], 2),
            f"{number(f.sums['entropy'])} nats",
            f"{f.sums['dead_experts']} of {m.experts(name)}",
            number(f.set_size, 2),
            percent(f.alone),
            bits(f.piece.bits),
            percent(f.piece.share, 0),
        )
        for name, f in m.analyses.items()
    ]
    out += table(head, rows, kinds=".nnnnnnn")
    limits = " or ".join(f"ln {n} = {math.log(n):.3f}" for n in sorted({len(names) for names in m.columns.values()}))
    out += paragraph(
        "max/mean load: 1 is balanced, E is everything to one expert. entropy: of the router's distribution over "
        f"experts, mean over tokens, at most {limits} nats. I(expert; piece): what a token's piece tells of "
        'its expert, and the share of what it could tell, corrected for chance; see <a href="#pieces">token pieces</a>.',
        note=True,
    )
    if m.observed.dense:
        out += paragraph(
            f"The router's matrix is dense{_of_some(m)}: a token is a mixture of all experts' outputs. Below, the "
            "expert with the largest weight counts as its choice; loads are sums of the weights.",
            note=True,
        )
    return out


def _of_some(m: Material) -> str:
    return "" if len(m.observed.dense) == len(m.analyses) else f" in {text(', '.join(sorted(m.observed.dense)))}"


def bits(value: float) -> str:
    """Information for a table."""
    return f"{value:.3f} bits"


def _run_facts(m: Material) -> list[tuple[str, str]]:
    c = m.model
    leaves = jax.tree.leaves_with_path(m.run.variables["params"])
    sizes = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.size) for path, leaf in leaves]
    total, experts = sum(n for _, n in sizes), sum(n for path, n in sizes if "/experts" in path)
    skipped = series(m.rows, "skipped")
    blocks = f"{c.layers} blocks, repeating {text(c.pattern)}" + (f"; inserts {text(c.inserts)}" if c.inserts else "")
    facts = [
        ("parameters", f"{total:,}" + (f", of experts {experts:,}" if experts else "")),
        ("blocks", blocks),
    ]
    for ffn in distinct_layers(c, "routed", *RETRIEVING):
        names = [place.name for place in places(c) if place.ffn == ffn]
        facts += _layer_facts(m, ffn, names, "" if ffn.name in BUILT_IN else f"{ffn.name}: ")
    facts.append(("width, vocabulary", f"D = {c.width}, V = {m.run.tokenizer.vocab_size:,}"))
    last = max((row["step"] for row in m.rows), default=0)
    steps = f"{last:,} of {m.run.config.train.steps:,}"
    if len(skipped.values) and np.isfinite(skipped.values).any():
        steps += f"; {int(np.nanmax(skipped.values)):,} skipped for a loss or gradient that was not finite"
    return [*facts, ("steps", steps)]


def _layer_facts(m: Material, ffn: FFNConfig, names: list[str], prefix: str) -> list[tuple[str, str]]:
    """The rows of a feed-forward layer, whose blocks are `names`."""
    if ffn.kind != "routed":
        p, chosen = ffn.peer, "" if ffn.peer.searches else ", by the token id alone"
        facts = f"N = {p.experts:,} experts in a pool; H = {p.heads} heads, K = {p.top_k} of each{chosen}"
        return [(f"{prefix}retrieval", facts)]
    moe, columns = ffn.moe, m.columns[names[0]]
    virtual = f", and {', '.join(columns[moe.experts :])}" if moe.virtual_experts else ""
    execution = moe.execution + (f", factor {moe.capacity_factor:g}" if moe.execution == "capacity" else "")
    shared = f"; {moe.shared_experts} shared" if moe.shared_experts else ""
    return [
        (f"{prefix}router", f"<code>{text(moe.router)}</code>, {text(execution)}"),
        (f"{prefix}experts", f"E = {moe.experts} of width {expert_width(m.model, ffn)}{virtual}{shared}"),
        (f"{prefix}experts a token", f"K = {moe.top_k}"),
        (f"{prefix}routed layers", f"{len(names)}: {text(', '.join(names))}" if prefix else str(len(names))),
    ]


def _losses(m: Material) -> str:
    rows = []
    losses = series(m.rows, "loss")
    if len(losses.steps):
        rows.append((f"training, step {losses.steps[-1]:,}", number(losses.values[-1]), "", ""))
    by_byte = evaluations(m.rows, "bits_per_byte")
    for source, one in evaluations(m.rows, "loss").items():
        name = f"validation {text(source)}, step {one.steps[-1]:,}"
        rows.append(
            (
                name,
                number(one.values[-1]),
                number(by_byte[source].values[-1]) if source in by_byte else "",
                "",
            )
        )
    for source, score in m.observed.scores.items():
        name = f"held out {text(source)}, step {m.run.step:,}, these tokens"
        rows.append((name, number(score["loss"]), number(score["bits_per_byte"]), number(int(score["tokens"]))))
    return table(["", "nats a token", "bits a byte", "tokens"], rows, kinds=".nnn")
