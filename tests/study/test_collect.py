"""From the files of runs to rows, tables and pictures, with numbers worked out by hand."""

import json
import math
import pathlib

import numpy as np
import pytest
from matplotlib import pyplot as plt

from benchmarks import table
from moe_jax.config import Config, ConfigError, SourceConfig
from moe_jax.config.study import Arm, Curve
from moe_jax.study import __main__ as command
from moe_jax.study.collect import collect
from moe_jax.study.metrics import METRICS
from moe_jax.study.plan import run_folder
from moe_jax.study.plots import bands, curve, draw, style
from moe_jax.study.summary import tables, to_markdown
from tests.study.small import LAYER, make_study, write_run, write_study, write_timing

T1 = 12.706204736  # Student's t, 97.5 %, one degree of freedom


def write_all(workdir, twin=(0.02, -0.01), study=None):
    """routed: losses (2, 3) and (2.1, 3.1) on (a, b); the twin's and dense's are a shift of these."""
    write_study(workdir, study or make_study())
    curves = {"routed": [3.2, 2.7], "twin": [3.2, 2.7], "dense": [3.4, 3.2]}
    for i, seed in enumerate((3, 5)):
        for arm, shift in (("routed", (0.0, 0.0)), ("twin", twin), ("dense", (0.5, 0.7))):
            loss = {"a": 2 + 0.1 * i + shift[i], "b": 3 + 0.1 * i + shift[i]}
            points = [(step, value + 0.1 * i) for step, value in zip((20, 40), curves[arm])]
            write_run(workdir, arm, seed, loss, points, routed=arm != "dense")
    write_timing(workdir, "before", {"routed": 400.0, "twin": 400.0, "dense": 200.0})
    write_timing(workdir, "after", {"routed": 100.0, "twin": 110.0, "dense": 50.0})


def by_arm(result):
    return {row["arm"]: row for row in result["rows"]}


def test_rows(tmp_path):
    write_all(tmp_path)
    result = collect(tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["counts"] == {"runs": 6, "done": 6, "failed": 0, "missing": 0}
    rows = by_arm(result)
    routed, twin, dense = rows["routed"], rows["twin"], rows["dense"]
    # A quarter of the tokens are of a: 0.25 * 2.05 + 0.75 * 3.05.
    assert routed["loss"] == pytest.approx(2.8) and routed["sources"]["a"]["loss"] == pytest.approx(2.05)
    assert routed["bits_per_byte"] == pytest.approx(2.8 / math.log(2) / 2)
    assert routed["difference"] is None and routed["verdict"] == "baseline"
    # Differences 0.5 and 0.7: mean 0.6, s / sqrt(2) = 0.1.
    expected = {"mean": 0.6, "low": 0.6 - 0.1 * T1, "high": 0.6 + 0.1 * T1, "n": 2}
    assert dense["difference"] == pytest.approx(expected)
    assert dense["sources"]["b"]["difference"] == pytest.approx(expected)
    # The A/A pair, 0.02 and -0.01: mean 0.005, s / sqrt(2) = 0.015.
    assert result["band"] == pytest.approx(0.005 + 0.015 * T1)
    assert twin["verdict"] == "A/A" and twin["aa"]["identical"] is False
    assert dense["verdict"] == "not resolved"
    assert (dense["ms"], dense["ratio"], dense["timed"]) == (50.0, 0.5, "after")
    assert dense["tokens_per_second"] == pytest.approx(512 / 0.05)
    # Last quarter of 40 steps: the row of step 40 alone.
    assert (routed["load"], routed["load_worst"], routed["worst_layer"]) == (1.5, 1.75, LAYER)
    assert (routed["dead_experts"], routed["dropped"], routed["entropy"], routed["skipped"]) == (
        3,
        0.25,
        2.0,
        1,
    )
    assert dense["load"] is None and dense["skipped"] == 1


def test_time_to_the_target(tmp_path):
    write_all(tmp_path)
    result = collect(tmp_path)
    # On the curve b, with three quarters of the tokens, is 0.4 below a; seed 5 ends highest.
    assert result["target"]["loss"] == pytest.approx(2.8 - 0.3)
    rows = by_arm(result)
    # Seed 3 from 2.9 to 2.4 passes 2.5 at 36, seed 5 is there at 40: 3.6 and 4 s.
    assert rows["routed"]["time"]["seconds"] == pytest.approx(
        {"mean": 3.8, "low": 3.8 - 0.2 * T1, "high": 3.8 + 0.2 * T1, "n": 2}
    )
    assert rows["routed"]["time"]["rank"] == 1 and rows["twin"]["time"]["rank"] is None
    assert rows["dense"]["time"]["reached"] == 0 and rows["dense"]["time"]["rank"] is None
    assert "not reached" in tables(result)


def test_a_target_of_the_study(tmp_path):
    write_all(tmp_path, study=make_study(target_loss=2.96))
    rows = by_arm(collect(tmp_path))
    # routed: 20 and 21.6 steps; dense: 34 steps of seed 3, and seed 5 ends at 3.0.
    assert rows["routed"]["time"]["steps"]["mean"] == pytest.approx((20 + 21.6) / 2)
    assert rows["dense"]["time"]["reached"] == 1 and rows["dense"]["time"]["rank"] is None
    assert "1.7 not reached by 1 of 2" in tables(collect(tmp_path))


def test_the_band_decides(tmp_path):
    write_all(tmp_path, twin=(0.2, -0.2))
    assert by_arm(collect(tmp_path))["dense"]["verdict"] == "within A/A noise"  # 0.6 <= 0.2 * T1


def test_no_noise(tmp_path):
    write_all(tmp_path, twin=(0.0, 0.0))
    result = collect(tmp_path)
    twin = by_arm(result)["twin"]
    assert result["band"] is None and twin["verdict"] == "no noise: identical"
    line = next(line for line in tables(result).splitlines() if line.startswith("| twin"))
    assert "| - | no noise: identical |" in line and "+0.0000" not in tables(result)


@pytest.mark.parametrize("change", ["curve", "loss"])
def test_close_is_not_identical(tmp_path, change):
    write_all(tmp_path, twin=(0.0, 0.0 if change == "curve" else 1e-15))
    if change == "curve":
        path = run_folder(tmp_path, "twin", 3) / "metrics.jsonl"
        text = path.read_text()
        assert '"loss": 3.3000000000000003' in text
        path.write_text(text.replace('"loss": 3.3000000000000003', '"loss": 3.3', 1))
    assert by_arm(collect(tmp_path))["twin"]["aa"]["identical"] is False


def test_a_partial_study(tmp_path, capsys):
    write_all(tmp_path)
    folder = run_folder(tmp_path, "dense", 5)
    (folder / "validation.json").rename(folder / "failed.json")
    (folder / "failed.json").write_text(json.dumps({"code": 1, "line": "error: 10 steps in a row"}))
    (run_folder(tmp_path, "twin", 5) / "validation.json").unlink()
    (tmp_path / "timing_after.json").unlink()
    assert command.summarize(str(tmp_path)) == 0
    result = json.loads((tmp_path / "study.json").read_text())
    assert result["counts"] == {"runs": 6, "done": 4, "failed": 1, "missing": 1}
    rows = by_arm(result)
    assert rows["dense"]["difference"] == {"mean": pytest.approx(0.5), "low": None, "high": None, "n": 1}
    assert rows["dense"]["verdict"] == "not resolved (one seed)" and rows["dense"]["timed"] == "before"
    text = (tmp_path / "study.md").read_text()
    assert "**1 of 6 runs are missing, 1 failed.** dense seed 5: error: 10 steps in a row" in text
    assert capsys.readouterr().out.startswith("# Study") and "before training" in text


def test_nothing_yet(tmp_path):
    write_study(tmp_path, make_study())
    assert command.summarize(str(tmp_path)) == 0
    assert "**6 of 6 runs are missing, 0 failed.**" in (tmp_path / "study.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_a_loss_that_is_not_finite(tmp_path):
    write_all(tmp_path)
    path = run_folder(tmp_path, "dense", 3) / "validation.json"
    scores = json.loads(path.read_text())
    scores["sources"]["a"] |= {"loss": None, "bits_per_byte": None}
    path.write_text(json.dumps(scores))
    row = by_arm(collect(tmp_path))["dense"]
    assert row["difference"]["n"] == 1 and row["loss"] == pytest.approx(2.85 + 0.7)


def test_other_text_is_refused(tmp_path):
    write_study(tmp_path, make_study())
    write_run(tmp_path, "routed", 3, {"a": 2.0, "b": 3.0}, [(20, 3.0)])
    write_run(tmp_path, "dense", 5, {"a": 2.0, "b": 3.0}, [(20, 3.0)], digest="other")
    with pytest.raises(ConfigError, match="dense seed 5 was scored on other text of a than routed seed 3"):
        collect(tmp_path)


def test_a_run_that_was_not_begun(tmp_path):
    """It is missing and not failed, with the reason."""
    study = make_study(arms=(Arm("routed"), Arm("next", starts_from="routed")))
    write_study(tmp_path, study)
    for arm, code, line in (("routed", 1, "error: 10 steps in a row"), ("next", None, "not run: routed seed 3 failed")):
        folder = run_folder(tmp_path, arm, 3)
        folder.mkdir(parents=True)
        (folder / "failed.json").write_text(json.dumps({"code": code, "line": line}))
    result = collect(tmp_path)
    assert result["counts"] == {"runs": 4, "done": 0, "failed": 1, "missing": 3}
    reasons = "routed seed 3: error: 10 steps in a row next seed 3: not run: routed seed 3 failed"
    assert f"**3 of 4 runs are missing, 1 failed.** {reasons}" in tables(result)


def test_what_a_start_has_cost(tmp_path):
    """A chain of three; the A/A arm of the last has the same cost. None has a rank but what begins afresh."""
    dense, middle = Arm("dense"), Arm("middle", starts_from="dense", start="upcycle_from")
    arms = dense, middle, Arm("last", starts_from="middle"), Arm("again", twin_of="last"), Arm("s", scores="middle")
    write_study(tmp_path, make_study(arms=arms, baseline="dense"))
    times = {"dense": 100.0, "middle": 250.0, "last": 10.0, "again": 10.0}
    for name in (*times, "s"):
        for seed in (3, 5):
            write_run(tmp_path, name, seed, {"a": 2.0, "b": 2.0}, [] if name == "s" else [(40, 2.0)])
    write_timing(tmp_path, "before", times)
    result = collect(tmp_path)
    rows = by_arm(result)
    # 40 steps of 20,480 tokens at 3 MFLOP each.
    first = {"tokens": 20480, "flops": 20480 * 3e6, "seconds": 4.0}
    both = {"tokens": 40960, "flops": 40960 * 3e6, "seconds": 14.0}
    expected = {
        "dense": ("", None),
        "middle": ("dense", first),
        "last": ("middle", both),
        "again": ("middle", both),
        "s": ("dense", first),
    }
    assert {name: (row["starts_from"], row["start_cost"]) for name, row in rows.items()} == {
        name: (start, cost and pytest.approx(cost)) for name, (start, cost) in expected.items()
    }
    assert [name for name, row in rows.items() if row["time"]["rank"]] == ["dense"]
    text = tables(result)
    assert "(rank) | starts from |" in text and "| - |\n| middle |" in text
    assert "| middle (40,960 tokens, 0.123 TFLOP, 14 s) |" in text and "such an arm has no rank" in text
    assert style(result)["middle"]["label"] == "middle (from dense)" and style(result)["dense"]["label"] == "dense"


def test_other_tokens_compare_in_bits_per_byte(tmp_path):
    """`small` has twice the tokens of the others on the same text, so half the loss at equal bits per byte."""
    arms = Arm("dense"), Arm("other"), Arm("small"), Arm("smaller", baseline="small")
    lines = {"": {"dense": 1, "small": 2, "smaller": 4}}
    curve = Curve("sizes", "Sizes", "x", lines, ("loss", "bits_per_byte", "difference", "bits_difference"))
    write_study(tmp_path, make_study(arms=arms, baseline="dense", curves=(curve,)))
    losses = {"dense": 3.0, "other": 2.9, "small": 1.4, "smaller": 1.3}
    for name, loss in losses.items():
        tokens = {"digest": "e", "tokens": 2} if name.startswith("small") else {}
        for i, seed in enumerate((3, 5)):
            write_run(tmp_path, name, seed, {"a": loss + i, "b": loss + i}, [(20, 9.0), (40, loss)], text="t", **tokens)
    write_timing(tmp_path, "before", dict.fromkeys(losses, 100.0))
    result = collect(tmp_path)
    rows = by_arm(result)
    bit = math.log(2)
    assert rows["other"]["difference"]["mean"] == pytest.approx(-0.1)
    assert rows["small"]["difference"] is None and rows["small"]["sources"]["a"]["difference"] is None
    # 2.8 nats against 3 with the first seed, 4.8 against 4 with the second, in the bytes of one of dense's tokens.
    assert rows["small"]["bits_difference"]["mean"] == pytest.approx((-0.2 + 0.8) / 2 / bit / 2)
    assert rows["small"]["verdict"] == "not resolved" and rows["small"]["time"]["of"] == 0
    assert rows["smaller"]["difference"]["mean"] == pytest.approx(-0.1) and rows["smaller"]["verdict"] == "resolved"
    assert set(bands(result, "curve")) == {"dense", "other"}
    points = {point["arm"]: point for point in result["curves"][0]["lines"][0]["points"]}
    assert points["small"]["step"]["loss"] is None and points["smaller"]["step"]["loss"]["mean"] == pytest.approx(-0.1)
    assert points["small"]["value"]["difference"] is None
    step = points["small"]["step"]["bits_per_byte"]
    assert step == points["small"]["step"]["bits_difference"] == pytest.approx(rows["small"]["bits_difference"])
    text = tables(result)
    row = next(line for line in text.splitlines() if line.startswith("| small |"))
    assert "| 1.9000 | +0.2164 [-" in row and "] bits per byte | not resolved |" in row and row.endswith("| - |")
    assert " small: another tokenizer than the baseline's." in text


def test_other_text_under_any_tokens_is_refused(tmp_path):
    write_study(tmp_path, make_study())
    write_run(tmp_path, "routed", 3, {"a": 2.0, "b": 3.0}, [], text="t")
    write_run(tmp_path, "dense", 3, {"a": 2.0, "b": 3.0}, [], digest="e", text="t")
    collect(tmp_path)
    write_run(tmp_path, "dense", 5, {"a": 2.0, "b": 3.0}, [], digest="e", text="u")
    with pytest.raises(ConfigError, match="dense seed 5 was scored on other text of a than routed seed 3"):
        collect(tmp_path)


def test_an_arm_of_other_text_has_no_curve(tmp_path):
    """It is scored on the study's; what it evaluates in training is its own."""
    other = Config()
    other.data.sources = (SourceConfig(name="a", files="x.txt"),)
    arms = Arm("routed"), Arm("elsewhere", base=other), Arm("more", {"data.sources[0].weight": 2.0})
    write_study(tmp_path, make_study(arms=arms))
    for arm in arms:
        for seed in (3, 5):
            write_run(tmp_path, arm.name, seed, {"a": 2.0, "b": 3.0}, [(20, 3.0), (40, 2.5)])
    result = collect(tmp_path)
    rows = by_arm(result)
    assert set(bands(result, "curve")) == {"routed", "more"}
    assert [rows[arm.name]["time"]["of"] for arm in arms] == [2, 0, 2]
    assert rows["elsewhere"]["difference"]["mean"] == 0
    assert " elsewhere: trained on other text, scored on that of the study's sources" in tables(result)


ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name, page", [("routers", "README.md"), ("starts", "benchmarks/studies/starts.md")])
def test_the_results_of_this_repository(name, page):
    """Results of older studies can still be read, and the page that shows them has what they say."""
    result = json.loads((ROOT / "benchmarks" / "studies" / f"{name}.json").read_text())
    assert tables(result) in (ROOT / page).read_text()


def write_pools(workdir, seeds=(3, 5)):
    """dense; pools of 1 and 4 of two kinds, b0 only with the larger one; a run scored twice; half as many steps."""
    half = {"train.steps": 20}
    arms = (
        Arm("dense"),
        Arm("a1"),
        Arm("a4"),
        Arm("b4"),
        Arm("b4_again", {"model.moe.eval_capacity": 1.0}, scores="b4"),
        Arm("dense_half", half, baseline="dense_half"),
        Arm("a4_half", half, baseline="dense_half"),
    )
    lines = {"a": {"a4": 4, "a1": 1}, "b": {"b4": 4}}
    curves = (
        Curve("pool", "Pools", "experts", lines, ("loss", "unevenness", "difference")),
        Curve("lone", "Alone", "x", {"": {"dense": 1}}),
    )
    write_study(workdir, make_study(arms=arms, baseline="dense", seeds=seeds, curves=curves, shown=("dense", "a4")))
    losses = {"dense": 3.0, "a1": 2.9, "a4": 2.5, "b4": 2.6, "b4_again": 2.8, "dense_half": 3.5, "a4_half": 3.1}
    for name, loss in losses.items():
        for i, seed in enumerate(seeds):
            # a4 is 0.1 better with the second seed.
            value, uneven = loss + i - 0.1 * i * (name == "a4"), (0.4 if name == "a1" else 0.8) - 0.2 * (name == "b4")
            curve = [] if name == "b4_again" else [(20, value + 1), (40, value)]
            use = None if name.startswith("dense") else (0.8, uneven)
            write_run(workdir, name, seed, {"a": value, "b": value}, curve, routed=False, use=use)
    write_timing(workdir, "before", {name: 100.0 for name in losses if name != "b4_again"})


def test_curves(tmp_path):
    write_pools(tmp_path)
    result = collect(tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    pool = result["curves"][0]
    points = {point["arm"]: point for line in pool["lines"] for point in line["points"]}
    assert [point["arm"] for point in pool["lines"][0]["points"]] == ["a1", "a4"]  # in order of x
    assert points["a1"]["value"]["loss"]["mean"] == pytest.approx(3.4)
    assert points["a1"]["step"]["loss"] is None and points["a1"]["across"]["loss"] is None
    # Differences -0.4 and -0.5: mean -0.45, s / sqrt(2) = 0.05.
    expected = {"mean": -0.45, "low": -0.45 - 0.05 * T1, "high": -0.45 + 0.05 * T1, "n": 2}
    assert points["a4"]["step"]["loss"] == pytest.approx(expected) and points["a4"]["across"]["loss"] is None
    assert points["b4"]["step"]["loss"] is None
    assert points["b4"]["across"]["loss"]["mean"] == pytest.approx(0.15)
    # Over 100 and 300 tokens: 0.25 * 0.3 + 0.75 * 0.6, against 4/3 of it.
    assert points["b4"]["value"]["unevenness"]["mean"] == pytest.approx(0.525)
    assert points["b4"]["across"]["unevenness"]["mean"] == pytest.approx(0.525 - 0.7)
    text = tables(result)
    assert (
        "| line | experts | arm | loss | to the point before | to a | unevenness, nats | to the point before | to a "
        "| loss minus the baseline's | to the point before | to a |" in text
    )
    # Against dense's 3.0 and 4.0 the differences are -0.5 and -0.6, and those to the point before those of the losses.
    assert points["a4"]["value"]["difference"] == pytest.approx(
        {name: value - 0.1 * (name != "n") for name, value in expected.items()}
    )
    assert points["a4"]["step"]["difference"] == pytest.approx(expected)
    assert "| b | 4 | b4 | 3.1000 [" in text and "| 87.5" not in text and "| 70.0 [70.0, 70.0] % |" in text


def test_a_baseline_of_its_own_and_a_second_score(tmp_path):
    write_pools(tmp_path)
    result = collect(tmp_path)
    rows = by_arm(result)
    assert rows["dense_half"]["verdict"] == "baseline" and rows["dense_half"]["difference"] is None
    assert rows["a4_half"]["difference"]["mean"] == pytest.approx(-0.4)
    assert rows["a4"]["difference"]["mean"] == pytest.approx(-0.55)
    again = rows["b4_again"]
    assert again["loss"] == pytest.approx(3.3) and again["difference"]["mean"] == pytest.approx(-0.2)
    # What it costs is what the runs cost that it scores; it has no curve of training.
    assert (again["ms"], again["tokens"], again["skipped"]) == (100.0, 20480, None)
    assert again["time"]["of"] == 0 and rows["dense"]["usage"] is None
    text = tables(result)
    command = "python -m moe_jax.evaluate --workdir=DIR/runs/b4/seed_N --split=validation --config.model.moe.eval_capacity=1.0"
    assert (
        " to dense_half |" in text
        and f"b4_again: the runs of b4, scored once more with another evaluation: `{command}`." in text
    )
    assert "retrieves; unevenness" in text and "both means over the sources by their tokens" in text
    assert ", or to the arm that is named, paired" in text and "20,480 tokens a run, 0.50 epochs." in text


def test_pictures_of_curves(tmp_path):
    write_pools(tmp_path)
    result = collect(tmp_path)
    assert draw(result, tmp_path) == ["loss.png", "differences.png", "pool.png", "lone.png"]
    assert set(bands(result, "curve")) == {"dense", "a4"}  # what the study shows
    figure = curve(result, result["curves"][0])
    loss, unevenness, minus = figure.axes
    # A picture shows the numbers of the table, and its axis says which they are.
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "loss (nats per token)",
        "unevenness (nats)",
        "loss minus the baseline's (nats per token)",
    ]
    np.testing.assert_allclose(loss.containers[0].lines[0].get_xydata(), [[1, 3.4], [4, 2.95]])
    assert minus.get_xscale() == "log" and [text.get_text() for text in minus.get_xticklabels()] == ["1", "4"]
    a, b = minus.containers
    # Losses of 3.4, 2.95 and 3.1, and 3.5 of the baseline, whose seeds differ as theirs do.
    np.testing.assert_allclose(a.lines[0].get_xydata(), [[1, -0.1], [4, -0.55]])
    np.testing.assert_allclose(b.lines[0].get_xydata(), [[4, -0.4]])
    ends = [path.vertices[:, 1] for path in a.lines[2][0].get_paths()]
    np.testing.assert_allclose(ends[1], [-0.55 - 0.05 * T1, -0.55 + 0.05 * T1])
    np.testing.assert_allclose(unevenness.containers[0].lines[0].get_xydata()[:, 1], [0.35, 0.7])
    plt.close(figure)
    for run in result["runs"]:
        run["state"] = "missing"
    for one in result["curves"]:
        for line in one["lines"]:
            for point in line["points"]:
                point["value"] = dict.fromkeys(point["value"])
    assert curve(result, result["curves"][0]) is None


def test_pictures(tmp_path):
    write_all(tmp_path)
    result = collect(tmp_path)
    names = draw(result, tmp_path)
    assert names == ["loss.png", "differences.png", "load.png"] and not plt.get_fignums()
    for name in names:
        height, width = plt.imread(tmp_path / name).shape[:2]
        assert width > 700 and height > 250
    assert all(f"![{name}]({name})" in to_markdown(result, names) for name in names)
    for run in result["runs"]:
        run["load_curve"] = []
    assert draw(result, tmp_path) == ["loss.png", "differences.png"] and not (tmp_path / "load.png").exists()


def test_into_a_readme(tmp_path, capsys):
    write_all(tmp_path)
    command.summarize(str(tmp_path))
    readme, study = tmp_path / "README.md", tmp_path / "study.json"
    begin, end = "<!-- study routers: written by benchmarks/table.py -->", "<!-- end of study routers -->"
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n{table.BEGIN}\nkept\n{table.END}\n")
    for _ in range(2):
        table.main([f"--study={study}", "--name=routers", f"--readme={readme}"])
    text = readme.read_text()
    assert text.startswith("before\n") and "old" not in text and "kept" in text and "after\n" in text
    assert "| dense | 2 | 3.4000 |" in text and "cores, 2026-01-02" in text
    for arguments, message in (
        ([f"--study={study}"], "--study and --name go together"),
        ([f"--study={study}", "--name=other"], "not one pair of the lines '<!-- study other"),
        ([f"--study={tmp_path / 'description.json'}", "--name=routers"], "KeyError 'benchmark'"),
    ):
        with pytest.raises(SystemExit) as stop:
            table.main([*arguments, f"--readme={readme}"])
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_flops_follow_the_experts_that_ran():
    """Over all of training, where the rows have them; else the table has what the config plans."""
    rows = [{"step": step, "router/load_max_over_mean": 1.0} for step in range(1, 9)]
    read = lambda name, rows: METRICS[name].read({}, rows)
    assert read("flops_per_token", rows) is None and read("experts_per_token", rows) is None
    counted = [row | {"flops_per_token": 1e6 * row["step"], "router/experts_per_token": 0.5 * row["step"]} for row in rows]
    assert read("flops_per_token", counted) == 4.5e6 and read("experts_per_token", counted) == pytest.approx(0.5 * 7.5)
