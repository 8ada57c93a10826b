"""The other sections of the page, from the rows of the metrics and the recorded choices."""

from collections.abc import Sequence

import numpy as np

from moe_jax.report import pictures
from moe_jax.report.analysis import MINIMUM
from moe_jax.report.history import evaluations, layer_names, other_sums, series
from moe_jax.report.overview import Material, bits, summary
from moe_jax.report.page import paragraph, percent, picture, table, text
from moe_jax.report.passages import passages_html
from moe_jax.report.pictures import Panel
from moe_jax.report.retrieval import retrieval
from moe_jax.report.set_sizes import set_sizes
from moe_jax.report.settling import settling

# How much of what grows with layers and experts a page holds, before it is thinned.
_UNITS = {"experts_per_token": "experts", "agreement": "share of tokens", "two_experts": "share of tokens"}
_PIECE_ROWS, _PIECES, _PASSAGE_TOKENS = 1200, 6000, 5000


def _validation(rows, key: str):
    return {f"validation {name}": one for name, one in evaluations(rows, key).items()}


def training(m: Material) -> str:
    """Curves of the whole run."""
    losses = {"training": series(m.rows, "loss")} if any("loss" in row for row in m.rows) else {}
    panels = [Panel("Loss", "nats a token", losses | _validation(m.rows, "loss"))]
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
    return out + (paragraph(f"Figures that were not finite and are left out: {nulls:,}.", note=True) if nulls else "")


def routing_over_time(m: Material) -> str:
    """Loads, and what else the routers sum, over the steps."""
    known = layer_names(m.rows)
    layers = [name for name in m.analyses if name in known]
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
        unit = _UNITS.get(name, "" if name.endswith("_loss") else "a step")
        panels.append(Panel(name.replace("_", " ").capitalize(), unit, lines))
    zero = [p.title for p in panels if all(np.all(np.nan_to_num(one.values) == 0) for one in p.lines.values())]
    panels = [panel for panel in panels if panel.title not in zero]
    out += picture(pictures.curves(panels), "Figures of the routers over the steps")
    return out + (paragraph(f"Always 0: {text(', '.join(zero).lower())}.", note=True) if zero else "")


def _only(shown: Sequence[str], layers: Sequence[str]) -> str:
    return "" if len(shown) == len(layers) else f" {len(shown)} of the {len(layers)} layers, evenly spaced."


def held_out_load(m: Material) -> str:
    """Loads of every layer on the held-out tokens."""
    out = ""
    for layers in m.alike(m.analyses):
        loads = np.stack([m.analyses[name].loads for name in layers])
        out += picture(
            pictures.load_by_layer(loads, layers, m.columns[layers[0]], m.experts(layers[0])),
            "Heat map of the load of every layer and expert",
            "Share of the choices of real experts that each gets, in multiples of 1/E; virtual ones against the same.",
        )
    return out


def pieces(m: Material, limit: int, experts: int) -> str:
    """What the piece tells of the expert, and the pieces of each expert.

    Args:
      m: the material.
      limit: pieces of an expert.
      experts: rows of a layer's table.
    """
    head = [
        "layer",
        "I(expert; piece)",
        "by chance",
        "H(expert)",
        "most it could tell",
        "share of that, corrected",
    ]
    rows = [
        (
            text(name),
            *map(bits, (f.piece.bits, f.piece.chance, f.piece.entropy, f.piece.ceiling)),
            percent(f.piece.share),
        )
        for name, f in m.analyses.items()
    ]
    out = table(head, rows, kinds=".nnnnn") + paragraph(
        "Mutual information of a token's expert and its piece, over assignments (pairs of token and expert). by "
        "chance: with the pieces dealt out anew among the same tokens, mean of 3 shuffles, which is what so few "
        "tokens show without any link. most it could tell: H(expert), less what stays open because a token has "
        "several experts. share: (I - chance) / (most - chance); 0 %: the piece says nothing; 100 %: it decides.",
        note=True,
    )
    out += paragraph(
        "The pieces that belong most to each expert: by lift, with 10 assignments of an average piece added so that "
        f"rare ones do not win, among pieces of which at least {MINIMUM} tokens go there. The figures: the piece's "
        "tokens that have this expert / all of them." + _only(m.detailed, list(m.analyses))
    )
    columns = m.columns  # worked out from the config at each call
    for i, name in enumerate(m.detailed):
        f = m.analyses[name]
        order = np.argsort(-f.shares, kind="stable")[:experts]
        keep = sorted(int(e) for e in order)
        body = [(text(columns[name][e]), percent(f.shares[e]), _piece_list(m, f.pieces[e][:limit])) for e in keep]
        left = len(columns[name]) - len(keep)
        note = paragraph(f"The {len(keep)} most loaded of {len(columns[name])} experts.", note=True) if left else ""
        opened = " open" if i == 0 and len(keep) <= 32 else ""
        out += (
            f"<details{opened}><summary>{text(name)}</summary>\n"
            + table(["expert", "of choices", "pieces"], body, kinds=".nw")
            + note
            + "</details>\n"
        )
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
    rows = [(text(name), bits(f.source.bits), bits(f.source.chance), percent(f.source.share)) for name, f in m.analyses.items()]
    caption = "Percent of a source's choices that go to each expert; a row sums to 100." + _only(m.detailed, list(m.analyses))
    out = table(head, rows, kinds=".nnn")
    for layers in m.alike(m.detailed):
        shares = {name: m.analyses[name].source_shares for name in layers}
        png = pictures.sources_by_layer(shares, m.observed.names, m.columns[layers[0]])
        out += picture(png, "Heat maps of sources and experts", caption)
    return out


def pairs(m: Material) -> str:
    """Which experts are chosen together."""
    lifts = {name: m.analyses[name].pairs for name in m.detailed if m.analyses[name].pairs is not None}
    shown = [name for name in lifts if len(m.columns[name]) >= 3]
    if not shown:
        why = "there are fewer than three experts" if lifts else "every token has at most one expert"
        return paragraph(f"Left out: {why}.")
    caption = (
        "How often two experts have the same token, over how often they would if each expert kept its number of "
        "pairs and partners were drawn independently. Orange: together more often; purple: less; grey: none expected."
        + _only(shown, list(m.analyses))
    )
    return "".join(
        picture(
            pictures.pairs_by_layer({name: lifts[name] for name in layers}, m.columns[layers[0]]),
            "Heat maps of pairs of experts",
            caption,
        )
        for layers in m.alike(shown)
    )


def changes(m: Material) -> str:
    """What changed since an older checkpoint."""
    if not m.older:
        return paragraph(f"Left out: {text(m.no_older)}.")
    rows = []
    for name, f in m.analyses.items():
        named = " ".join(
            f'<span class="t">{text(m.run.tokenizer.piece(token), 24)}</span> <span class="k">{here}/{total}</span>'
            for token, here, total in f.changed
        )
        rows.append(
            (
                text(name),
                percent(f.churn.sets),
                percent(f.churn.first),
                percent(f.churn.first_by_chance),
                named or "–",
            )
        )
    head = [
        "layer",
        "set of experts",
        "first expert",
        "first, by chance",
        "pieces that changed most (changed / tokens)",
    ]
    return (
        paragraph(f"The same tokens under {text(m.older)} and under step {m.run.step:,}: the share whose choice differs.")
        + table(head, rows, kinds=".nnnw")
        + paragraph(
            "first expert: the one with the largest gate. by chance: if the older first experts were dealt out anew among the "
            "tokens.",
            note=True,
        )
    )


def passages(m: Material, spans: int) -> str:
    """Coloured text; `spans` tokens in all."""
    each = max(spans // max(len(m.detailed) * len(m.observed.names), 1), 16)
    return paragraph(
        "A passage from the middle of each source. The colour is the expert with the largest gate, the line below the second; "
        "a token without colour has no expert. "
        "Point at a token for its experts and gates; press an expert to see it alone."
        + _only(m.detailed, list(m.analyses))
        + (" Of so many experts some colours are close." if max(map(len, m.columns.values())) > 16 else "")
    ) + passages_html(m.observed, m.detailed, m.columns, m.run.tokenizer, each)


def build(m: Material, size: int) -> list[tuple[str, str, str]]:
    """(anchor, title, HTML) of each section; tables of pieces and passages are thinned until the page is below `size` bytes."""
    opening = [("summary", "The run", summary(m)), ("training", "Training", training(m))]
    if m.observed.retrieved:
        opening.append(("retrieval", "One-neuron experts", retrieval(m)))
    if not m.analyses:
        return opening
    opening += [
        ("routing", "Routing during training", routing_over_time(m)),
        ("load", "Load on held-out text", held_out_load(m)),
    ]
    if m.routing is not None and len(m.routing.steps) > 1:
        opening.append(("settling", "How the routing settles", settling(m)))
    if found := set_sizes(m):
        opening.append(("sizes", "How many experts a token takes", found))
    after = [
        ("sources", "Which sources go where", sources(m)),
        ("pairs", "Experts chosen together", pairs(m)),
        ("changes", "What changed since an older checkpoint", changes(m)),
    ]
    for scale in (1.0, 0.5, 0.25, 0.1):
        experts = max(int(_PIECE_ROWS * scale) // len(m.detailed), 8)
        shown = sum(min(experts, len(m.columns[name])) for name in m.detailed)
        limit = int(np.clip(_PIECES * scale // shown, 2, 12))
        sections = [
            *opening,
            ("pieces", "Which token pieces go where", pieces(m, limit, experts)),
            *after,
            ("passages", "Text by expert", passages(m, int(_PASSAGE_TOKENS * scale))),
        ]
        if sum(len(inside.encode()) for _, _, inside in sections) < size:
            break
    return sections
