"""The sections of the page, from the rows of the metrics and the recorded choices."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.report import pictures
from moe_jax.report.analysis import MINIMUM, LayerFacts
from moe_jax.report.collect import Observed, column_names, routed_layers
from moe_jax.report.history import Row, evaluations, layer_names, other_sums, series
from moe_jax.report.page import number, paragraph, percent, picture, table, text
from moe_jax.report.passages import passages_html
from moe_jax.report.pictures import Panel
from moe_jax.train.restore import LoadedRun

_ROWS_OF_PIECES = 400  # experts with a row in the tables of pieces, before they are thinned


class Material(NamedTuple):
    """What the page is made from.

    rows: of metrics.jsonl. facts: by layer, in order of depth; {} of a dense model. detailed: the layers with pieces and
    passages. older: what the choices are compared with, in words; "": nothing, and `no_older` says why.
    """

    run: LoadedRun
    rows: list[Row]
    observed: Observed
    facts: dict[str, LayerFacts]
    detailed: list[str]
    older: str
    no_older: str

    @property
    def model(self) -> ModelConfig:
        return self.run.config.model

    @property
    def columns(self) -> list[str]:
        """Names of the experts, the virtual ones last."""
        return column_names(self.model)


def lead(m: Material, workdir: str, split: str) -> str:
    """What the page shows, below its title."""
    per_source = ", ".join(
        f"{text(name)} {int((m.observed.sources == i).sum()):,}" for i, name in enumerate(m.observed.names)
    )
    rows, length = m.observed.batch
    return paragraph(
        f"Run <code>{text(workdir)}</code>, checkpoint of step {m.run.step:,}. Choices were recorded on held-out text"
        f"{f' (the {split} split)' if split else ''}, in whole batches of {rows} x {length} tokens spread evenly over it. Tokens: "
        f"{per_source}.",
        note=True,
    )


def summary(m: Material) -> str:
    """The tables up front."""
    out = table(["", ""], [(f"<b>{text(k)}</b>", v) for k, v in _run_facts(m)])
    out += "<h3>Losses</h3>\n" + _losses(m)
    if not m.facts:
        return out + paragraph("This model has no routed layers: there is nothing to say of routers.")
    out += "<h3>Routed layers on the held-out tokens</h3>\n"
    head = ["layer", "max/mean load", "entropy", "dead experts", "experts a token", "without expert", "I(expert; piece)", "share, corrected"]
    rows = [
        (
            text(name), number(f.sums["load_max_over_mean"], 2), f"{number(f.sums['entropy'])} nats",
            f"{f.sums['dead_experts']} of {m.model.moe.experts}", number(f.set_size, 2), percent(f.alone),
            _bits(f.piece.bits), percent(f.piece.share, 0),
        )
        for name, f in m.facts.items()
    ]  # fmt: skip
    out += table(head, rows, kinds=".nnnnnnn")
    out += paragraph(
        "max/mean load: 1 is balanced, E is everything to one expert. entropy: of the router's distribution over experts, mean over "
        f"tokens, at most ln {len(m.columns)} = {math.log(len(m.columns)):.3f} nats. I(expert; piece): what a token's piece tells of "
        'its expert, and the share of what it could tell, corrected for chance; see <a href="#pieces">token pieces</a>.',
        note=True,
    )
    if m.observed.dense:
        out += paragraph(
            "This router's matrix is dense: a token is a mixture of all experts' outputs. Below, the expert with the largest "
            "weight counts as its choice; loads are sums of the weights.",
            note=True,
        )
    return out


def _bits(value: float) -> str:
    return f"{value:.3f} bits"


def _run_facts(m: Material) -> list[tuple[str, str]]:
    c, moe = m.model, m.model.moe
    leaves = jax.tree.leaves_with_path(m.run.variables["params"])
    sizes = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.size) for path, leaf in leaves]
    total, experts = sum(n for _, n in sizes), sum(n for path, n in sizes if "/moe/experts/" in path)
    skipped = series(m.rows, "skipped")
    blocks = f"{c.layers} blocks, repeating {text(c.pattern)}" + (f"; inserts {text(c.inserts)}" if c.inserts else "")
    facts = [("parameters", f"{total:,}" + (f", of experts {experts:,}" if experts else "")), ("blocks", blocks)]
    if routed_layers(c):
        virtual = f", and {', '.join(m.columns[moe.experts :])}" if moe.virtual_experts else ""
        execution = moe.execution + (f", factor {moe.capacity_factor:g}" if moe.execution == "capacity" else "")
        shared = f"; {moe.shared_experts} shared" if moe.shared_experts else ""
        facts += [
            ("router", f"<code>{text(moe.router)}</code>, {text(execution)}"),
            ("experts", f"E = {moe.experts} of width {moe.expert_width or c.ffn_width}{virtual}{shared}"),
            ("experts a token", f"K = {moe.top_k}"),
            ("routed layers", str(len(routed_layers(c)))),
        ]
    facts.append(("width, vocabulary", f"D = {c.width}, V = {m.run.tokenizer.vocab_size:,}"))
    last = max((row["step"] for row in m.rows), default=0)
    steps = f"{last:,} of {m.run.config.train.steps:,}"
    if len(skipped.values) and np.isfinite(skipped.values).any():
        steps += f"; {int(np.nanmax(skipped.values)):,} skipped for a loss or gradient that was not finite"
    return [*facts, ("steps", steps)]


def _losses(m: Material) -> str:
    rows = []
    losses = series(m.rows, "loss")
    if len(losses.steps):
        rows.append((f"training, step {losses.steps[-1]:,}", number(losses.values[-1]), "", ""))
    bits = evaluations(m.rows, "bits_per_byte")
    for source, one in evaluations(m.rows, "loss").items():
        name = f"validation {text(source)}, step {one.steps[-1]:,}"
        rows.append((name, number(one.values[-1]), number(bits[source].values[-1]) if source in bits else "", ""))
    for source, score in m.observed.scores.items():
        name = f"held out {text(source)}, step {m.run.step:,}, these tokens"
        rows.append((name, number(score["loss"]), number(score["bits_per_byte"]), number(int(score["tokens"]))))
    return table(["", "nats a token", "bits a byte", "tokens"], rows, kinds=".nnn")


def training(m: Material) -> str:
    """Curves of the whole run."""
    losses = {"training": series(m.rows, "loss")} if any("loss" in row for row in m.rows) else {}
    panels = [Panel("Loss", "nats a token", losses | evaluations(m.rows, "loss"))]
    wanted = (
        ("Bits per byte, validation", "bits a byte", evaluations(m.rows, "bits_per_byte"), False),
        ("Learning rate", "", {"": series(m.rows, "learning_rate")}, False),
        ("Gradient norm", "", {"": series(m.rows, "gradient_norm")}, True),
        ("Speed", "tokens a second", {"": series(m.rows, "tokens_per_second")}, False),
    )
    panels += [Panel(*one) for one in wanted if any(len(s.steps) for s in one[2].values())]
    skipped = series(m.rows, "skipped")
    if np.any(skipped.values > 0):
        panels.append(Panel("Skipped steps, in all", "steps", {"": skipped}))
    nulls = sum(value is None for row in m.rows for value in row.values())
    out = picture(pictures.curves(panels), "Loss, learning rate, gradient norm and speed over the steps")
    return out + (paragraph(f"{nulls:,} figures were not finite and are left out.", note=True) if nulls else "")


def routing_over_time(m: Material) -> str:
    """Loads, and what else the routers sum, over the steps."""
    known = layer_names(m.rows)
    layers = [name for name in m.facts if name in known]
    if not layers:
        return paragraph("The metrics have no routing rows.")
    shown = [name for name in layers if name in m.detailed]
    out = picture(
        pictures.load_over_time({name: series(m.rows, f"router/{name}/load") for name in shown}),
        "Heat maps of the load of every expert over the steps",
        "Load of each expert over the steps, in multiples of an even share 1/E: white is even, red more, blue less."
        + _only(shown, layers),
    )
    figures = (
        ("Largest load over mean", "load_max_over_mean", "times"),
        ("Entropy of the router", "entropy", "nats"),
        ("Experts without a token", "dead_experts", "experts"),
        ("Dropped", "dropped", "share of assignments"),
    )
    panels = [Panel(t, unit, {name: series(m.rows, f"router/{name}/{key}") for name in layers}) for t, key, unit in figures]
    for name, lines in other_sums(m.rows, layers).items():
        lines = {layer or "all layers": lines[layer] for layer in ["", *layers] if layer in lines}
        unit = "" if name.endswith("_loss") else "a step"
        panels.append(Panel(name.replace("_", " ").capitalize(), unit, lines))
    zero = [p.title for p in panels if all(np.all(np.nan_to_num(one.values) == 0) for one in p.lines.values())]
    panels = [panel for panel in panels if panel.title not in zero]
    out += picture(pictures.curves(panels), "Figures of the routers over the steps")
    return out + (paragraph(f"Always 0: {text(', '.join(zero).lower())}.", note=True) if zero else "")


def _only(shown: Sequence[str], layers: Sequence[str]) -> str:
    return "" if len(shown) == len(layers) else f" {len(shown)} of the {len(layers)} layers, evenly spaced."


def held_out_load(m: Material) -> str:
    """Loads of every layer on the held-out tokens."""
    loads = np.stack([f.loads for f in m.facts.values()])
    png = pictures.load_by_layer(loads, list(m.facts), m.columns, m.model.moe.experts)
    return picture(png, "Heat map of the load of every layer and expert", "Share of a layer's choices that each expert gets, in multiples of 1/E.")


def pieces(m: Material, limit: int, experts: int) -> str:
    """What the piece tells of the expert, and the pieces of each expert.

    Args:
      m: the material.
      limit: pieces of an expert.
      experts: rows of a layer's table.
    """
    head = ["layer", "I(expert; piece)", "by chance", "H(expert)", "most it could tell", "share of that, corrected"]
    rows = [
        (
            text(name), *map(_bits, (f.piece.bits, f.piece.chance, f.piece.entropy, f.piece.ceiling)),
            percent(f.piece.share),
        )
        for name, f in m.facts.items()
    ]  # fmt: skip
    out = table(head, rows, kinds=".nnnnn") + paragraph(
        "Mutual information of a token's expert and its piece, over assignments (pairs of token and expert). by chance: with the "
        "pieces dealt out anew among the same tokens, mean of 3 shuffles, which is what so few tokens show without any link. most "
        "it could tell: H(expert), less what stays open because a token has several experts. share: (I - chance) / (most - "
        "chance); 0 %: the piece says nothing; 100 %: it decides.",
        note=True,
    )
    out += paragraph(
        f"The pieces that belong most to each expert: by lift, with 10 assignments of an average piece added so that rare ones do "
        f"not win, among pieces of which at least {MINIMUM} tokens go there. The figures: the piece's tokens that have this expert / all of them."
        + _only(m.detailed, list(m.facts))
    )
    for i, name in enumerate(m.detailed):
        f = m.facts[name]
        order = np.argsort(-f.shares, kind="stable")[:experts]
        keep = sorted(int(e) for e in order)
        body = [
            (text(m.columns[e]), percent(f.shares[e]), _piece_list(m, f.pieces[e][:limit]))
            for e in keep
        ]
        left = len(m.columns) - len(keep)
        note = paragraph(f"The {len(keep)} most loaded of {len(m.columns)} experts.", note=True) if left else ""
        opened = " open" if i == 0 else ""
        out += (
            f"<details{opened}><summary>{text(name)}</summary>\n"
            + table(["expert", "of choices", "pieces"], body, kinds=".nw") + note + "</details>\n"
        )  # fmt: skip
    return out


def _piece_list(m: Material, found) -> str:
    if not found:
        return '<span class="k">none</span>'
    return " ".join(
        f'<span class="t">{text(m.run.tokenizer.piece(p.token_id), 24)}</span> <span class="k">{p.here}/{p.tokens}</span>'
        for p in found
    )


def sources(m: Material) -> str:
    """Which source goes to which expert."""
    if len(m.observed.names) < 2:
        return paragraph("There is one source of text. More can be named with <code>--source NAME=GLOB</code>.")
    head = ["layer", "I(expert; source)", "by chance", "share of what it could tell, corrected"]
    rows = [
        (text(name), _bits(f.source.bits), _bits(f.source.chance), percent(f.source.share))
        for name, f in m.facts.items()
    ]
    shares = {name: m.facts[name].source_shares for name in m.detailed}
    png = pictures.sources_by_layer(shares, m.observed.names, m.columns)
    caption = "Percent of a source's choices that go to each expert; a row sums to 100." + _only(m.detailed, list(m.facts))
    return table(head, rows, kinds=".nnn") + picture(png, "Heat maps of sources and experts", caption)


def pairs(m: Material) -> str:
    """Which experts are chosen together."""
    lifts = {name: m.facts[name].pairs for name in m.detailed if m.facts[name].pairs is not None}
    if not lifts or len(m.columns) < 3:
        why = "there are fewer than three experts" if lifts else "every token has at most one expert"
        return paragraph(f"Left out: {why}.")
    caption = (
        "How often two experts have the same token, over how often they would if each expert kept its number of pairs and partners "
        "were drawn independently. Orange: together more often; purple: less; grey: none expected." + _only(list(lifts), list(m.facts))
    )
    return picture(pictures.pairs_by_layer(lifts, m.columns), "Heat maps of pairs of experts", caption)


def changes(m: Material) -> str:
    """What changed since an older checkpoint."""
    if not m.older:
        return paragraph(f"Left out: {text(m.no_older)}.")
    rows = []
    for name, f in m.facts.items():
        named = " ".join(
            f'<span class="t">{text(m.run.tokenizer.piece(token), 24)}</span> <span class="k">{here}/{total}</span>'
            for token, here, total in f.changed
        )
        rows.append(
            (text(name), percent(f.churn.sets), percent(f.churn.first), percent(f.churn.first_by_chance), named or "–")
        )
    head = ["layer", "set of experts", "first expert", "first, by chance", "pieces that changed most (changed / tokens)"]
    return (
        paragraph(f"The same tokens under {text(m.older)} and under step {m.run.step:,}: the share whose choice differs.")
        + table(head, rows, kinds=".nnnw")
        + paragraph(
            "first expert: the one with the largest gate. by chance: if the older first experts were dealt out anew among the "
            "tokens.", note=True,
        )
    )  # fmt: skip


def passages(m: Material, spans: int) -> str:
    """Coloured text; `spans` tokens in all."""
    each = max(spans // max(len(m.detailed) * len(m.observed.names), 1), 16)
    return paragraph(
        "A passage from the middle of each source. The colour is the expert with the largest gate, the line below the second; "
        "a token without colour has no expert. "
        "Point at a token for its experts and gates; press an expert to see it alone." + _only(m.detailed, list(m.facts))
        + (" Of so many experts some colours are close." if len(m.columns) > 16 else "")
    ) + passages_html(m.observed, m.detailed, m.columns, m.run.tokenizer, each)  # fmt: skip


def build(m: Material, scale: float) -> list[tuple[str, str, str]]:
    """(anchor, title, HTML) of each section; `scale`, at most 1, thins the tables of pieces and the passages."""
    found = [("summary", "The run", summary(m)), ("training", "Training", training(m))]
    if not m.facts:
        return found
    experts = max(int(_ROWS_OF_PIECES * 3 * scale) // len(m.detailed), 8)
    shown = min(experts, len(m.columns)) * len(m.detailed)
    limit = int(np.clip(6000 * scale // max(shown, 1), 2, 12))
    return [
        *found,
        ("routing", "Routing during training", routing_over_time(m)),
        ("load", "Load on held-out text", held_out_load(m)),
        ("pieces", "Which token pieces go where", pieces(m, limit, experts)),
        ("sources", "Which sources go where", sources(m)),
        ("pairs", "Experts chosen together", pairs(m)),
        ("changes", "What changed since an older checkpoint", changes(m)),
        ("passages", "Text by expert", passages(m, int(5000 * scale))),
    ]
