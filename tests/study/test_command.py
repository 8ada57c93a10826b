"""The command as a person runs it: real processes, interrupted and resumed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax.study.runs import steps_done

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = """
from moe_jax import config as c
from moe_jax.config.study import Arm, Study


def get_config(text=""):
    config = c.Config()
    config.data = c.DataConfig(
        sources=(c.SourceConfig(name="numbers", files="{folder}/numbers.txt", document="paragraph"),),
        tokenizer="bytes", sequence_length=32, batch_size=16, held_out_percent=10.0, cache_dir="{folder}/cache",
    )
    config.model.layers, config.model.width, config.model.ffn_width = 2, 16, 32
    config.optimizer.warmup_steps = 3
    t = config.train
    t.steps, t.log_every, t.eval_every, t.checkpoint_every, t.eval_batches, t.tensorboard = 200, 5, 50, 40, 2, False
    t.async_checkpoint = False
    arms = (Arm("routed"), Arm("twin", twin_of="routed"), Arm("dense", {{"model.pattern": text or "dense,dense"}}))
    return Study(config, arms, "routed", seeds=(0,))
"""

# Compiling is most of a small run.
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    paragraphs = [" ".join(str(a + i * b) for i in range(12)) for a, b in rng.integers(1, 50, (4000, 2))]
    (folder / "numbers.txt").write_text("\n\n".join(paragraphs))
    (folder / "study.py").write_text(FILE.format(folder=folder))
    return folder / "study.py"


def start(*arguments):
    command = [sys.executable, "-m", "moe_jax.study", "--rounds=3", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def study(*arguments, expect=0):
    process = start(*arguments)
    out, err = process.communicate(timeout=900)
    assert process.returncode == expect, err
    return out, err


def numbers(workdir):
    """What a study says that does not depend on the clock."""
    result = json.loads((workdir / "study.json").read_text())
    keys = "loss difference bits_per_byte sources load load_worst dead_experts entropy parameters".split()
    rows = [{key: row[key] for key in keys} for row in result["rows"]]
    return result["counts"], result["target"], rows, [run["curve"] for run in result["runs"]]


def test_interrupted_and_resumed_gives_the_same(file, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out, err = study(f"--config={file}", f"--workdir={whole}", "--jobs=2")
    assert "3 arms x 1 seeds 0; differences against routed" in err and "predicted: " in err
    assert "runs 3/3  " in err and "dense seed 0: done" in err and out.startswith("# Study")
    assert "| - | no noise: identical |" in out
    assert {p.name for p in whole.glob("*.png")} == {"loss.png", "differences.png", "load.png"}

    parts.mkdir()
    shutil.copy(whole / "timing_before.json", parts)  # kept: it is of the same arms, on the same machine
    process = start(f"--config={file}", f"--workdir={parts}")
    run = parts / "runs" / "twin" / "seed_0"
    while process.poll() is None and steps_done(run) < 20:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and "run the same command to go on" in err, err
    log = (run / "log.txt").read_text()
    assert "saved step" in log and not (run / "validation.json").exists(), log
    assert numbers(parts)[0] == {"runs": 3, "done": 1, "failed": 0, "missing": 2}
    assert "before training" not in err

    _, err = study(f"--config={file}", f"--workdir={parts}")
    assert "before training" not in err
    assert "runs 2/3  twin seed 0: done" in err and "resumed at step" in (run / "log.txt").read_text()
    assert numbers(parts) == numbers(whole)

    again, err = study(f"--config={file}", f"--workdir={parts}")  # nothing is left to do
    assert "timing" not in err and again == study(f"--workdir={parts}", "--summary")[0]

    # Another arm of that name, and another base, are refused.
    for arguments, message in (
        ([f"--config={file}:dense,routed"], "arm dense settings={'model.pattern': 'dense,routed'}: the study"),
        ([f"--config={file}", "--config.train.steps=7"], "config.train.steps=7: the study in --workdir began with 200"),
    ):
        _, err = study(*arguments, f"--workdir={parts}", expect=2)
        assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_runs_scored_once_more(file, tmp_path):
    """Such an arm trains nothing; with the same settings it has the same numbers, with others its own."""
    scoring = file.with_name("scoring.py")
    others = 'Arm("same", scores="routed"), Arm("capped", {"model.moe.eval_capacity": 0.3}, scores="routed")'
    scoring.write_text(file.read_text().replace('Arm("twin", twin_of="routed")', others))
    out, err = study(f"--config={scoring}", "--config.train.steps=20", "--config.train.eval_every=10", f"--workdir={tmp_path}")
    assert "timing the steps of 2 arms" in err and "same: the runs of routed, scored once more" in err
    assert "runs 1/4  routed seed 0: done" in err and "runs 2/4  same seed 0: done" in err and "runs 4/4  dense seed 0" in err
    assert not (tmp_path / "runs" / "same" / "seed_0" / "checkpoints").exists()
    losses = {run["arm"]: run["loss"] for run in json.loads((tmp_path / "study.json").read_text())["runs"]}
    assert losses["same"] == losses["routed"] != losses["capped"]
    # The command that the notes name gives the number again.
    command = next(part for part in out.split("`") if "--config.model.moe.eval_capacity=0.3" in part)
    _, *arguments = command.replace("DIR", str(tmp_path)).replace("seed_N", "seed_0").split()
    scores = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=True)
    assert json.loads(scores.stdout)["sources"]["numbers"]["loss"] == pytest.approx(losses["capped"], rel=1e-6)


def test_failures(file, tmp_path):
    """Too many passes are refused before anything runs; a run that diverges is counted, and the code is 1."""
    small = ["--config.train.steps=20", "--config.train.eval_every=10", f"--workdir={tmp_path}"]
    _, err = study(f"--config={file}", f"--workdir={tmp_path / 'long'}", "--config.train.steps=20000", expect=2)
    assert "error: arm routed config.train.steps=20000: " in err and "more than epochs_limit=4; train fewer" in err
    assert not (tmp_path / "long" / "runs").exists()
    diverging = file.with_name("diverging.py")
    text = file.read_text().replace('Arm("twin", twin_of="routed"), ', "")
    diverging.write_text(text.replace('"model.pattern": text', '"optimizer.learning_rate": 1e30, "model.pattern": text'))
    out, err = study(f"--config={diverging}", *small, expect=1)
    assert "dense seed 0: exit code 1: error: 10 steps in a row" in err and "1 failed" in err
    assert "**0 of 2 runs are missing, 1 failed.** dense seed 0: error: 10 steps" in out


CHAIN = """
    other = copy.deepcopy(config)
    other.data.sources = (c.SourceConfig(name="other", files="{folder}/other.txt", document="paragraph"),)
    arms = (
        Arm("tuned", {{"optimizer.learning_rate": 1e-6, "train.steps": 10}}, base=other, starts_from="upcycled"),
        Arm("upcycled", starts_from="dense", start="upcycle_from"),
        Arm("dense", {{"model.pattern": "dense,dense"}}),
    )
    return Study(config, arms, "dense", seeds=(0,))
"""


def test_runs_that_start_from_others(file, tmp_path):
    """Dense, upcycled from it, and that trained further on other text."""
    rng = np.random.default_rng(1)
    (file.parent / "other.txt").write_text("\n\n".join(" ".join(map(str, row)) for row in rng.integers(1, 999, (2000, 12))))
    chain = file.with_name("chain.py")
    chain.write_text("import copy\n" + file.read_text().partition("    arms = ")[0] + CHAIN.format(folder=file.parent)[1:])
    arguments = [f"--config={chain}", f"--workdir={tmp_path}", "--config.train.steps=20", "--config.train.eval_every=10"]
    out, err = study(*arguments, "--jobs=2")
    assert "tuned: starts from upcycled; " in err and "runs 3/3" in err
    ends = [err.index(f"{name} seed 0: done") for name in ("dense", "upcycled", "tuned")]
    assert ends == sorted(ends)
    runs = {name: tmp_path / "runs" / name / "seed_0" for name in ("dense", "upcycled", "tuned")}
    logs = {name: (folder / "log.txt").read_text() for name, folder in runs.items()}
    assert f"upcycled from {runs['dense']} step 20" in logs["upcycled"] and "what the dense one does" in logs["upcycled"]
    assert f"from {runs['upcycled']} step 20" in logs["tuned"] and "other train: " in logs["tuned"]

    rows = {row["arm"]: row for row in json.loads((tmp_path / "study.json").read_text())["rows"]}
    # All are scored on the study's text. At a rate that changes nothing the last run keeps the loss that it starts with.
    assert [list(row["sources"]) for row in rows.values()] == [["numbers"]] * 3
    assert rows["tuned"]["loss"] == pytest.approx(rows["upcycled"]["loss"], abs=1e-3)
    assert rows["upcycled"]["loss"] < rows["dense"]["loss"] - 0.01
    assert [rows[name]["starts_from"] for name in runs] == ["", "dense", "upcycled"]
    assert [rows[name]["own_sources"] for name in runs] == [False, False, True]
    assert rows["tuned"]["start_cost"]["tokens"] == 2 * 20 * 16 * 32 and "| dense (10,240 tokens, " in out

    # Once the dense run cannot be had again, what needs it is not run.
    for folder in runs.values():
        (folder / "validation.json").unlink()
    shutil.rmtree(runs["dense"] / "checkpoints")
    (runs["dense"] / "checkpoints").write_text("no folder")
    out, err = study(*arguments, expect=1)
    assert (
        "upcycled seed 0: not run: dense seed 0 failed" in err and "tuned seed 0: not run: upcycled seed 0 was not run" in err
    )
    assert "**2 of 3 runs are missing, 1 failed.**" in out


PROTOCOL = """
    t.steps, t.eval_every, t.checkpoint_every, t.keep_steps = 30, 15, 0, "10"
    config.optimizer.schedule = "constant"
    decay = {{"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.5, "train.steps": 20, "init.branch_step": 10}}
    arms = (
        Arm("dense", {{"model.pattern": "dense,dense"}}),
        Arm("routed", equal_time_to="dense"),
        Arm("decayed", {{"model.pattern": "dense,dense"}} | decay, starts_from="dense", start="branch_from", tuned_as="dense"),
    )
    grid = {{"slow": {{"optimizer.learning_rate": c.Scale(1e-6)}}, "as_is": {{}}}}
    more = dict(grid=grid, tuning_seeds=(0,), primary="routed", hours_limit=float(text or 2))
    return Study(config, arms, "dense", seeds=(10,), **more)
"""


def test_tuned_equally_timed_and_branched(file, tmp_path):
    protocol = file.with_name("protocol.py")
    protocol.write_text(file.read_text().partition("    arms = ")[0] + PROTOCOL.format()[1:])
    _, err = study(f"--config={protocol}:0.001", f"--workdir={tmp_path}", expect=2)
    assert "error: study hours_limit=0.001: " in err and not (tmp_path / "runs").exists()
    out, err = study(f"--config={protocol}", f"--workdir={tmp_path}", "--jobs=2")
    assert (
        "2 arms are tuned first: 2 candidates x 1 seeds 0 each" in err and "the primary comparison: routed against dense" in err
    )
    assert "dense: as_is wins" in err and "runs 4/4" in err and "runs 3/3" in err
    assert list((tmp_path / "compiled").iterdir())  # by the runs, for each other
    assert "less with 2 runs side by side (those that tune: reported ones go one after the other)" in err
    dense, routed = (tmp_path / "runs" / name / "seed_10" for name in ("dense", "routed"))
    assert (routed / "config.json").stat().st_mtime > (dense / "validation.json").stat().st_mtime
    fixed = json.loads((tmp_path / "fixed.json").read_text())
    assert {name: arm["winner"] for name, arm in fixed["tuning"].items()} == {"dense": "as_is", "routed": "as_is"}
    equal = fixed["equal_time"]["routed"]
    assert equal["steps"] == round(30 * equal["to_ms"] / equal["ms"])
    result = json.loads((tmp_path / "study.json").read_text())
    rows = {row["arm"]: row for row in result["rows"]}
    assert [rows[name]["steps"] for name in ("dense", "routed", "decayed")] == [30, equal["steps"], 20]
    assert all(row["seconds"]["mean"] > 0 and row["winner"] == "as_is" for row in rows.values())
    assert rows["routed"]["over_documents"]["mean"] == pytest.approx(rows["routed"]["difference"]["mean"], abs=1e-6)
    assert rows["decayed"]["branch_step"] == 10 and rows["decayed"]["start_cost"] is None  # its steps count the other run's
    log = (tmp_path / "runs" / "decayed" / "seed_10" / "log.txt").read_text()
    assert f"branched from {tmp_path}/runs/dense/seed_10 step 10" in log
    assert "| dense step 10 |" in out and "decayed: a branch of dense at its step 10; its steps, tokens" in out
    assert "**Tuning**" in out and "**Primary comparison, routed - dense: " in out

    # Times of another day change neither the steps nor the winners.
    (tmp_path / "timing_before.json").unlink()
    (tmp_path / "runs" / "routed" / "seed_10" / "validation.json").unlink()
    _, err = study(f"--config={protocol}", f"--workdir={tmp_path}")
    assert "before training" in err and "runs 3/3  routed seed 10: done" in err and "tuning" not in err.replace("tuned", "")
    assert json.loads((tmp_path / "fixed.json").read_text()) == fixed
