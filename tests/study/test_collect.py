"""From the files of runs to rows, tables and pictures, with numbers worked out by hand."""

import json
import math

import pytest
from matplotlib import pyplot as plt

from benchmarks import table
from moe_jax.config import ConfigError
from moe_jax.study import __main__ as command
from moe_jax.study.collect import collect
from moe_jax.study.plan import run_folder
from moe_jax.study.plots import draw
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
