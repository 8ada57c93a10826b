"""Pictures of a study, from what `collect` returns."""

import functools
import pathlib
import warnings
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from moe_jax.study.metrics import METRICS

# Okabe and Ito's colours, which most colour-blind people can tell apart, without yellow, which is hard to see on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", "-.", ":")
DPI = 120


def draw(result: dict[str, Any], folder: pathlib.Path) -> list[str]:
    """Writes the pictures that there is something for into `folder`; returns their names."""
    pictures = {"loss.png": loss, "differences.png": differences, "load.png": load}
    pictures |= {f"{one['name']}.png": functools.partial(curve, one=one) for one in result["curves"]}
    written = []
    for name, picture in pictures.items():
        figure = picture(result)
        if figure is None:
            (folder / name).unlink(missing_ok=True)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a glyph that the font lacks, in the name of an arm
            figure.savefig(folder / name, dpi=DPI)
        plt.close(figure)
        written.append(name)
    return written


def style(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and label of every arm, the same in all pictures; an A/A arm has its twin's colour, dotted."""
    own = [row["arm"] for row in result["rows"] if not row["twin_of"]]
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % 3]} for i, name in enumerate(own)
    }
    for row in result["rows"]:
        if row["twin_of"]:
            styles[row["arm"]] = {"color": styles[row["twin_of"]]["color"], "linestyle": ":"}
        start = row.get("starts_from")
        styles[row["arm"]]["label"] = f"{row['arm']} (from {start})" if start else row["arm"]
    return styles


def bands(result: dict[str, Any], key: str) -> dict[str, np.ndarray]:
    """{arm: [points, 4]} of step, mean, lowest and highest over the seeds that are done, at the steps they share.

    Of the arms that the study shows.
    """
    found, shown = {}, result["study"]["shown"]
    for row in result["rows"]:
        if shown and row["arm"] not in shown:
            continue
        curves = [
            dict(map(tuple, run[key]))
            for run in result["runs"]
            if run["arm"] == row["arm"] and run["state"] == "done" and run[key]
        ]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        values = [[curve[step] for curve in curves] for step in steps]
        if steps:
            found[row["arm"]] = np.array([[s, np.mean(v), np.min(v), np.max(v)] for s, v in zip(steps, values)])
    return found


def _plot(axis, curves: dict[str, np.ndarray], styles, scale: dict[str, float] | None = None) -> None:
    for arm, points in curves.items():
        if scale is not None and not scale.get(arm):
            continue
        x = points[:, 0] * (scale[arm] if scale else 1.0)
        marker = "o" if len(x) < 15 else None
        axis.plot(x, points[:, 1], linewidth=1.6, marker=marker, markersize=3, **styles[arm])
        if styles[arm]["linestyle"] == ":":  # an A/A arm; its band would hide its twin's
            continue
        axis.fill_between(x, points[:, 2], points[:, 3], color=styles[arm]["color"], alpha=0.15, linewidth=0)
    axis.grid(color="0.9")
    axis.set_axisbelow(True)


def loss(result: dict[str, Any]):
    """Validation loss against steps, and against seconds of training."""
    curves, styles = bands(result, "curve"), style(result)
    if not curves:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    seconds = {row["arm"]: (row["ms"] or 0.0) / 1e3 for row in result["rows"]}
    _plot(axes[0], curves, styles)
    _plot(axes[1], curves, styles, seconds)
    target = result["target"]["loss"]
    if target is not None:
        for axis in axes:
            axis.axhline(target, color="0.5", linewidth=0.8, label=f"target {target:.4f}")
    # The steep start would leave the arms one line: what is below the loss at a third of training fills the picture.
    low = min(points[:, 2].min() for points in curves.values())
    high = max(points[min(len(points) - 1, len(points) // 3), 3] for points in curves.values())
    margin = 0.05 * (high - low) or 0.1
    for axis in axes:
        axis.set_xlim(left=0)
    axes[0].set_ylim(low - margin, high + margin)
    axes[0].set_title("against steps", fontsize=11)
    axes[1].set_title("against training time", fontsize=11)
    axes[0].set_xlabel("optimizer steps")
    axes[1].set_xlabel("training time (s): steps times ms per step, timed in turns")
    axes[0].set_ylabel(f"validation {METRICS['loss'].axis}")
    _title(figure, result, "Validation loss, mean and range over seeds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    return figure


def differences(result: dict[str, Any]):
    """Paired differences to the baseline with their intervals, the A/A band shaded."""
    baseline = result["study"]["baseline"]
    rows = [row for row in result["rows"] if row["difference"]][::-1]
    if not rows:
        return None
    styles, band = style(result), result["band"]
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.42 * len(rows)), layout="constrained")
    if band is not None:
        axis.axvspan(-band, band, color="0.88", zorder=0, label=f"A/A band, ±{band:.4f}")
    axis.axvline(0, color="0.4", linewidth=0.8)
    for y, row in enumerate(rows):
        d, colour = row["difference"], styles[row["arm"]]["color"]
        if d["low"] is not None:
            axis.plot([d["low"], d["high"]], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot(
            d["mean"],
            y,
            "o",
            color=colour,
            markerfacecolor="white" if row["twin_of"] else colour,
            markersize=7,
        )
    same = {row["arm"] for row in rows if row["twin_of"] == baseline and row["aa"] and row["aa"]["identical"]}
    labels = [
        row["arm"]
        + (f" - {row['baseline']}" if row["baseline"] != baseline else "")
        + f" ({'no noise: identical' if row['arm'] in same else 'n=' + str(row['difference']['n'])})"
        for row in rows
    ]
    axis.set_yticks(range(len(rows)), labels, fontsize=9)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    others = ", or that named" if any(row["baseline"] != baseline for row in rows) else ""
    axis.set_xlabel(f"final validation loss minus {baseline}'s{others}\n(nats per token); left is better")
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    if band is not None:
        axis.legend(fontsize=9, loc="best")
    _title(axis, result, "Paired differences with 95 % t-intervals over seeds")
    return figure


def load(result: dict[str, Any]):
    """Load of the fullest expert over the mean, against steps."""
    curves, styles = bands(result, "load_curve"), style(result)
    if not curves:
        return None
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    _plot(axis, curves, styles)
    axis.axhline(1, color="0.5", linewidth=0.8, label="balanced")
    top = max(points[:, 3].max() for points in curves.values())
    if top > 4:
        axis.set_yscale("log", base=2)
        ticks = [2.0**i for i in range(0, int(np.ceil(np.log2(top))) + 1)]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel(METRICS["load"].axis)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    _title(axis, result, "Load, mean over layers; mean and range over seeds")
    return figure


def curve(result: dict[str, Any], one: dict[str, Any]):
    """Metrics of arms against a quantity, means and intervals over seeds; the numbers of the curve's table."""
    found = {
        (i, metric): [(point["x"], value) for point in line["points"] if (value := point["value"][metric])]
        for i, line in enumerate(one["lines"])
        for metric in one["metrics"]
    }
    if not any(found.values()):
        return None
    count = len(one["metrics"])
    figure, axes = plt.subplots(1, count, figsize=(3 + 4 * count, 4.6), squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], one["metrics"]):
        scale = METRICS[metric].scale
        for i, line in enumerate(one["lines"]):
            points = found[i, metric]
            x, means = [x for x, _ in points], [scale * value["mean"] for _, value in points]
            ends = [(value["mean"],) * 2 if value["low"] is None else (value["low"], value["high"]) for _, value in points]
            reach = [[scale * abs(end[side] - value["mean"]) for end, (_, value) in zip(ends, points)] for side in (0, 1)]
            axis.errorbar(
                x,
                means,
                reach if points else None,
                label=line["label"],
                color=COLOURS[i % len(COLOURS)],
                marker="o",
                linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
                linewidth=1.6,
                markersize=5,
                capsize=3,
            )
        ticks = sorted({point["x"] for line in one["lines"] for point in line["points"]})
        if one["log"]:
            axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,.6g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(one["x"])
        axis.set_ylabel(METRICS[metric].axis)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        if METRICS[metric].minus_baseline:
            axis.axhline(0, color="0.4", linewidth=0.8)
    if len(one["lines"]) > 1:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    _title(figure, result, f"{one['title']}\nmean and 95 % t-interval over seeds")
    return figure


def _title(place, result: dict[str, Any], text: str) -> None:
    """Over a figure, or over the only axes of one."""
    title = result["study"]["title"].replace("$", r"\$")
    put = place.suptitle if hasattr(place, "suptitle") else place.set_title
    put(f"{title}\n{text[0].lower()}{text[1:]}" if title else text, fontsize=12)
