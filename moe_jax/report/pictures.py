"""Every picture of the page, in one style; each function returns a PNG."""

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from PIL import Image

from moe_jax.report.history import Series, thinned

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "0.6",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "figure.dpi": 110,
}
WIDTH = 9.6  # inches
COLUMNS = 3
_COLOURS = ("#1f5fa8", "#d1602b", "#3d8b4f", "#8a4fa3", "#a8861f", "#2a93a3", "#b03a5b", "#5c5c5c")
_COLUMNS_OF_TIME = 240  # a heat map has no more pixels than that


class Panel(NamedTuple):
    """One plot of lines. lines: {label: series}; many lines that are layers share a colour scale."""

    title: str
    unit: str
    lines: dict[str, Series]
    log: bool = False


def _styled(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """The picture that `draw` makes, as PNG in the page's style."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            figure, buffer = draw(*args, **kwargs), io.BytesIO()
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
            # Fewer bytes, and no difference to the eye.
            image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
            return buffer.getvalue()

    return wrapped


def plain(text: str, limit: int = 28) -> str:
    """A label as matplotlib draws it: no formulas, nothing that the font lacks, not too long."""
    text = "".join(c if c.isprintable() and ord(c) < 0x250 else ascii(c)[1:-1] for c in text)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    # A label that starts with "_" is left out of legends.
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


@_styled
def curves(panels: Sequence[Panel]) -> Figure:
    """A grid of plots of lines over the steps."""
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH * columns / COLUMNS, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels):
        _draw_lines(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _draw_lines(axis, panel: Panel) -> None:
    many = len(panel.lines) > len(_COLOURS)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(len(panel.lines), 2)))
    positive = False
    for i, (label, one) in enumerate(panel.lines.items()):
        colour = shades[i] if many else _COLOURS[i]
        marker = "o" if len(one.steps) < 3 else None
        values = thinned(one, 2000)
        axis.plot(
            values.steps,
            values.values,
            color=colour,
            label=plain(label),
            marker=marker,
            markersize=3,
            linewidth=0.9 if many else None,
        )
        positive |= bool(np.any(values.values > 0))
    axis.set_title(plain(panel.title, 44))
    axis.set_ylabel(panel.unit)
    axis.set_xlabel("step")
    if panel.log and positive:
        axis.set_yscale("log")
    axis.margins(x=0.01)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    if len(panel.lines) > 1:
        if many:
            axis.text(1, 1.02, "dark: first layer", transform=axis.transAxes, ha="right", va="bottom", fontsize=7)
        else:
            axis.legend(loc="best", ncols=1 if len(panel.lines) < 5 else 2, fontsize=7, handlelength=1.2)


@_styled
def mass_by_rank(shares: dict[str, np.ndarray]) -> Figure:
    """Each layer's shares of all gates [N], largest first, in multiples of an even share 1/N, on logarithmic axes.

    Experts without any are left out; where their curve ends it falls to the bottom.
    """
    figure = Figure(figsize=(WIDTH * 0.66, 3.4), layout="constrained")
    axis = figure.subplots()
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(len(shares), 2)))
    lowest = min(len(share) * share[share > 0].min(initial=1 / len(share)) for share in shares.values())
    for i, (layer, share) in enumerate(shares.items()):
        relative = np.sort(share[share > 0])[::-1] * len(share)
        ranks = np.unique(np.geomspace(1, max(len(relative), 1), 400).round().astype(int))
        x, y = ranks, relative[ranks - 1] if len(relative) else np.full(len(ranks), np.nan)
        if len(relative) < len(share):  # the unused ones are below any axis
            x, y = np.append(x, len(relative) + 1), np.append(y, lowest / 2)
        colour = shades[i] if len(shares) > len(_COLOURS) else _COLOURS[i]
        axis.plot(x, y, color=colour, label=plain(layer))
    axis.axhline(1, color="0.4", linewidth=0.9, linestyle="--", label="even")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(1, max(map(len, shares.values())))
    axis.set_ylim(bottom=lowest / 2)
    axis.set_title("Shares of all gates, largest first")
    axis.set_xlabel("expert, by rank")
    axis.set_ylabel("share, in 1/N")
    if len(shares) <= len(_COLOURS):
        axis.legend(loc="best", fontsize=7)
    return figure


@_styled
def load_over_time(loads: dict[str, Series]) -> Figure:
    """A heat map, steps x experts, of each layer's load in multiples of 1/E; one scale for all."""
    norm = _load_norm(max(_relative(one.values).max(initial=0) for one in loads.values()))
    figure, axes = _grid(len(loads), 2.1)
    for axis, (layer, one) in zip(axes, loads.items()):
        one = thinned(one, _COLUMNS_OF_TIME)
        experts = one.values.shape[1]
        image = axis.pcolormesh(
            _edges(one.steps), np.arange(experts + 1) - 0.5, _relative(one.values).T, cmap="RdBu_r", norm=norm
        )
        axis.set_title(plain(layer))
        axis.set_xlabel("step")
        axis.set_ylabel("expert")
        _whole_ticks(axis.yaxis, experts)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        axis.invert_yaxis()
    _load_bar(figure, image, axes, norm)
    return figure


@_styled
def load_by_layer(shares: np.ndarray, layers: Sequence[str], columns: Sequence[str], experts: int) -> Figure:
    """A heat map, layers x columns, of the shares of a layer's choices of real experts [L, N], in multiples of 1/E."""
    height = min(0.9 + 0.27 * len(layers), 9)
    figure = Figure(figsize=(WIDTH, height + 0.5), layout="constrained")
    axis = figure.subplots()
    relative = np.nan_to_num(shares) * experts
    norm = _load_norm(relative.max(initial=0))
    image = axis.imshow(relative, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    _name_ticks(axis.yaxis, layers, 40)
    _name_ticks(axis.xaxis, columns, 32)
    axis.set_xlabel("expert")
    axis.grid(False)
    if relative.size <= 12 * 16:
        for (row, column), value in np.ndenumerate(relative):
            strong = abs(float(norm(value)) - 0.5) > 0.32
            axis.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if strong else "0.1",
            )
    _load_bar(figure, image, [axis], norm)
    return figure


@_styled
def pairs_by_layer(lifts: dict[str, np.ndarray], columns: Sequence[str]) -> Figure:
    """A heat map, experts x experts, of log2 of the pairs over what is expected, for each layer."""
    # A pixel at least for each expert, or some would be missing.
    across = COLUMNS if len(columns) <= 128 else 2
    figure, axes = _grid(len(lifts), 2.9 * COLUMNS / across, across)
    for axis, (layer, ratio) in zip(axes, lifts.items()):
        # Pairs that never happen are the lowest colour, not grey.
        image = axis.imshow(
            np.log2(np.maximum(ratio, 1 / 16)),
            cmap=_with_grey("PuOr_r"),
            vmin=-2,
            vmax=2,
            interpolation="nearest",
        )
        axis.set_title(plain(layer))
        axis.set_xlabel("expert")
        axis.set_ylabel("expert")
        axis.grid(False)
        _name_ticks(axis.xaxis, columns, 9)
        _name_ticks(axis.yaxis, columns, 9)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.75, aspect=25, extend="both", ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("pairs / pairs expected")
    return figure


@_styled
def sources_by_layer(shares: dict[str, np.ndarray], sources: Sequence[str], columns: Sequence[str]) -> Figure:
    """A heat map, sources x experts, of the share of a source's choices that go to each expert, for each layer."""
    top = max(float(np.nanmax(share, initial=0)) for share in shares.values())
    wide = len(columns) > 24
    across = 1 if wide else 2
    rows = math.ceil(len(shares) / across)
    height = 0.85 + 0.26 * len(sources)
    figure = Figure(figsize=(WIDTH, min(height * rows, 24)), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False).flatten()
    for axis, (layer, share) in zip(axes, shares.items()):
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=top or 1, aspect="auto", interpolation="nearest")
        axis.set_title(plain(layer))
        axis.set_xlabel("expert")
        axis.grid(False)
        _name_ticks(axis.yaxis, sources, 20)
        _name_ticks(axis.xaxis, columns, 24)
        if share.shape[1] <= 12:
            for (row, column), value in np.ndenumerate(share):
                dark = value > 0.6 * top
                axis.text(
                    column,
                    row,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "0.1",
                )
    for axis in axes[len(shares) :]:
        axis.set_axis_off()
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, aspect=25)
    bar.ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    bar.set_label("share")
    return figure


def _grid(count: int, height: float, across: int = COLUMNS):
    columns = min(across, count)
    rows = math.ceil(count / columns)
    room = 0.9 if columns < across else 0  # for the colour bar
    figure = Figure(figsize=(WIDTH * columns / across + room, height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes


def _relative(loads: np.ndarray) -> np.ndarray:
    return np.nan_to_num(loads) * loads.shape[1]


def _load_norm(largest: float) -> TwoSlopeNorm:
    return TwoSlopeNorm(1.0, 0.0, float(np.clip(largest, 2.0, 4.0)))


def _load_bar(figure, image, axes, norm) -> None:
    ticks = [0, 0.5, 1, *range(2, int(norm.vmax) + 1)]
    bar = figure.colorbar(
        image,
        ax=list(axes),
        shrink=0.9,
        aspect=25,
        extend="max" if norm.vmax >= 4 else "neither",
        ticks=ticks,
    )
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    bar.set_label("load, in 1/E")


def _edges(steps: np.ndarray) -> np.ndarray:
    """Where the columns of a heat map begin and end: the row of a step covers those since the row before."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return np.concatenate([[first], steps]).astype(np.float64)


def _whole_ticks(axis, count: int) -> None:
    every = max(math.ceil(count / 8), 1)
    axis.set_ticks(range(0, count, every))


def _name_ticks(axis, names: Sequence[str], limit: int) -> None:
    every = max(math.ceil(len(names) / limit), 1)
    short = [plain(name, 22) for name in names[::every]]
    turn = {"rotation": 90} if axis.axis_name == "x" and max(map(len, short), default=0) > 3 else {}
    axis.set_ticks(range(0, len(names), every), short, **turn)


def _with_grey(name: str):
    return matplotlib.colormaps[name].with_extremes(bad="0.85")
