"""Passages of text coloured by expert."""

import colorsys
from collections.abc import Sequence

import numpy as np

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.report.collect import Observed
from moe_jax.report.page import text

_PALETTE = (
    "#ffd27f",
    "#9fd3f5",
    "#b8e3a0",
    "#f5a9b8",
    "#cdb6ee",
    "#f2ee8a",
    "#8fe0cf",
    "#e3c3a0",
    "#c6ccd6",
    "#f59e6c",
    "#7fb4e6",
    "#86c489",
    "#e07f9a",
    "#a58be0",
    "#d1c24d",
    "#4fc0b5",
)
_GOLDEN = 0.381966  # of the circle of hues: neighbours differ most
_TITLE_EXPERTS = 4

# Marks the tokens of one expert alone.
_SCRIPT = """<script>
document.querySelectorAll('.legend button').forEach(function(b){b.onclick=function(){
var on=b.getAttribute('aria-pressed')!=='true',style=document.getElementById('only');
document.querySelectorAll('.legend button').forEach(function(o){o.setAttribute('aria-pressed','false')});
b.setAttribute('aria-pressed',on?'true':'false');
style.textContent=on?'.passage span:not(.'+b.dataset.e+
'):not(.s'+b.dataset.e.slice(1)+'){background:none;box-shadow:none;color:#9aa2aa}':'';
}});
</script>
"""


def colours(count: int) -> list[str]:
    """Light colours for dark text; up to 16 are easy to tell apart."""
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    lights = (0.80, 0.70, 0.87)
    shades = [colorsys.hls_to_rgb(i * _GOLDEN % 1, lights[i % 3], 0.75) for i in range(count)]
    return ["#" + "".join(f"{round(255 * c):02x}" for c in rgb) for rgb in shades]


def _darker(colour: str) -> str:
    return "#" + "".join(f"{int(colour[i : i + 2], 16) * 7 // 10:02x}" for i in (1, 3, 5))


def passages_html(
    observed: Observed, layers: Sequence[str], columns: dict[str, list[str]], tokenizer: Tokenizer, tokens: int
) -> str:
    """A selector of layers, a legend, and of each source the first `tokens` tokens of its passage in each layer."""
    inputs, styles, parts, used = [], [], [], set()
    for i, layer in enumerate(layers):
        checked = " checked" if i == 0 else ""
        inputs.append(f'<input type="radio" name="layer" id="at{i}"{checked}><label for="at{i}">{text(layer)}</label>\n')
        styles.append(f"#at{i}:checked~.at{i}{{display:block}}")
        inside = []
        for source, gates in observed.layers[layer].gates.items():
            ids = observed.passages[source][:tokens]
            spans = [_span(tokenizer, int(token), gate, columns[layer], used) for token, gate in zip(ids, gates)]
            inside.append(f'<h3>{text(source)}</h3><div class="passage">{"".join(spans)}</div>\n')
        parts.append(f'<div class="of at{i}">{"".join(inside)}</div>\n')
    # Expert e has one colour in all layers; the layer with the most names them.
    names = max((columns[layer] for layer in layers), key=len, default=[])
    palette = colours(len(names))
    styles += [f".e{e}{{background:{palette[e]}}}" for e in sorted(used)]
    styles += [f".s{e}{{box-shadow:inset 0 -3px {_darker(palette[e])}}}" for e in sorted(used)]
    legend = "".join(
        f'<button type="button" data-e="e{e}" aria-pressed="false" style="background:{palette[e]}">{text(name)}</button>'
        for e, name in enumerate(names)
    )
    return (
        f'<style>{"".join(styles)}</style><style id="only"></style>'
        f'<div class="legend">{legend}</div>\n<div class="layers">\n{"".join(inputs)}{"".join(parts)}</div>\n{_SCRIPT}'
    )


def _span(tokenizer: Tokenizer, token: int, gates: np.ndarray, columns: Sequence[str], used: set[int]) -> str:
    """One token: coloured by its first expert, underlined by its second; `used` gets their columns."""
    order = [int(e) for e in np.argsort(-gates, kind="stable") if gates[e] != 0]
    used.update(order[:2])
    classes = " ".join(f"{kind}{e}" for kind, e in zip("es", order))
    shown = ", ".join(f"{columns[e]} ({gates[e]:.2f})" for e in order[:_TITLE_EXPERTS])
    more = f" and {len(order) - _TITLE_EXPERTS} more" if len(order) > _TITLE_EXPERTS else ""
    piece = tokenizer.piece(token)
    title = f"{piece}  →  {shown or 'no expert'}{more}"
    raw = tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
    inside = "↵<br>".join(text(line, 40) for line in raw.split("\n")) if raw else text(piece)
    attribute = f' class="{classes}"' if classes else ""
    return f'<span{attribute} title="{text(title, 200)}">{inside}</span>'
