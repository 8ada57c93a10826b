"""Slopes of arms in order of a quantity."""

import numpy as np
import pytest

from moe_jax.config.study import Curve
from moe_jax.study.curves import collect_curve
from moe_jax.study.summary import curve as to_markdown

LOSSES = {"small": (3.0, 3.2, 3.1), "middle": (2.9, 3.15, 3.3), "large": (2.7, 3.2, 2.9)}


def collected(log=True, **changed):
    runs = {
        (arm, seed): {"state": "done", "loss": loss, "sources": {"text": {"digest": "a"}}}
        for arm, losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    }
    runs |= {key: runs[key] | change for key, change in changed.pop("runs", {}).items()}
    lines = {"": {"small": 4, "large": 64, "middle": 8}}
    return collect_curve(Curve("pool", "Pools", "experts", lines, log=log), runs, range(3))


def test_slope_is_least_squares_by_seed():
    found = collected()["lines"][0]["slope"]["loss"]
    fits = [np.polyfit([2, 3, 6], [LOSSES[arm][seed] for arm in ("small", "middle", "large")], 1)[0] for seed in range(3)]
    half = 4.302652729911275 * np.std(fits, ddof=1) / np.sqrt(3)  # Student's t for two degrees of freedom
    np.testing.assert_allclose(found, [np.mean(fits), np.mean(fits) - half, np.mean(fits) + half, 3], rtol=1e-9)
    linear = collected(log=False)["lines"][0]["slope"]["loss"]
    fits = [np.polyfit([4, 8, 64], [LOSSES[arm][seed] for arm in ("small", "middle", "large")], 1)[0] for seed in range(3)]
    assert linear.mean == pytest.approx(np.mean(fits), rel=1e-12)


def test_slope_leaves_out_seeds_without_every_arm():
    missing = collected(runs={("middle", 1): {"state": "missing"}})["lines"][0]["slope"]["loss"]
    other = collected(runs={("middle", 1): {"sources": {"text": {"digest": "b"}}}})["lines"][0]["slope"]["loss"]
    assert missing.n == other.n == 2


def test_slope_in_the_table():
    one = collected()
    for line in one["lines"]:
        line["slope"] = {metric: value._asdict() for metric, value in line["slope"].items()}
        for point in line["points"]:
            for kind in ("value", "step", "across"):
                point[kind] = {metric: value and value._asdict() for metric, value in point[kind].items()}
    assert "Slope for a doubling of experts, least squares by seed: loss -0.04" in to_markdown(one)


def test_x_can_be_measured():
    """The mean over the runs that have it; an arm without one is left out."""
    lines = {"": dict.fromkeys(LOSSES, 0.0)}
    runs = {
        (arm, seed): {"state": "done", "loss": loss, "load": load + seed, "sources": {"text": {"digest": "a"}}}
        for (arm, losses), load in zip(LOSSES.items(), (5.0, 1.0, 3.0), strict=True)
        for seed, loss in enumerate(losses)
    }
    runs |= {("large", seed): runs["large", seed] | {"state": "missing"} for seed in range(3)}
    runs["small", 0] = runs["small", 0] | {"load": None}
    found = collect_curve(Curve("load", "Load", "load", lines, log=False, x_metric="load"), runs, range(3))
    assert [(point["arm"], point["x"]) for point in found["lines"][0]["points"]] == [("middle", 2.0), ("small", 6.5)]
