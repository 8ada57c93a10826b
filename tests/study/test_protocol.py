"""Equal time, branches, limits of time, tests and margins of a study, with numbers worked out by hand."""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.config import ConfigError, Scale
from moe_jax.config.study import Arm, Curve
from moe_jax.study.collect import collect, training_seconds
from moe_jax.study.documents import save_documents
from moe_jax.study.fixed import Fixed, equal_steps, save_fixed
from moe_jax.study.measure import equal_time_of
from moe_jax.study.plan import prepare, run_config, run_folder
from moe_jax.study.statistics import p_value
from moe_jax.study.summary import tables
from moe_jax.study.work import announcement, check_hours, make_job, predicted_seconds, reported_runs
from tests.study.small import make_study, write_run, write_study, write_timing

DENSE = {"model.pattern": "dense,dense"}


def test_steps_of_equal_time():
    assert (equal_steps(610, 204.0, 239.0), equal_steps(100, 1.0, 8.0), equal_steps(1, 1.0, 9.0)) == (521, 12, 1)
    arms = {"dense": {"steps": 610, "ms": 204.0}, "routed": {"steps": 700, "ms": 239.0}, "broken": {"error": "no memory"}}
    found = equal_time_of("routed", "dense", arms)
    assert found == {"to": "dense", "steps": 521, "ms": 239.0, "to_ms": 204.0, "seconds": pytest.approx(124.519)}
    with pytest.raises(ConfigError, match=r"arm broken equal_time_to=dense: broken cannot be timed \(no memory\)"):
        equal_time_of("broken", "dense", arms)


def test_an_arm_of_equal_time_and_its_twin_have_the_steps_that_were_found():
    arms = Arm("dense", DENSE), Arm("routed", equal_time_to="dense"), Arm("twin", twin_of="routed")
    study = prepare(make_study(arms=arms, baseline="dense"), "small")
    fixed = Fixed(equal_time={"routed": {"steps": 521}})
    steps = {arm.name: run_config(study, arm, 3, fixed=fixed).train.steps for arm in study.arms}
    assert steps == {"dense": 1000, "routed": 521, "twin": 521}
    assert run_config(study, study.arm("routed"), 3).train.steps == 1000  # not yet known


def test_a_curve_over_steps_that_are_not_known():
    arms = Arm("dense", DENSE), Arm("routed", equal_time_to="dense")
    curve = Curve("c", "t", "x", {"": {"dense": "train.steps", "routed": "train.steps"}})
    with pytest.raises(
        ConfigError, match="curve c arm routed='train.steps': its steps are found before the first run; write a"
    ):
        prepare(make_study(arms=arms, baseline="dense", curves=(curve,)), "small")


def test_seconds_of_training():
    rows = [{"step": 40, "tokens_per_second": 100.0}, {"step": 60, "tokens_per_second": 50.0}]
    facts = {"tokens_per_step": 10}
    assert training_seconds(rows, facts) == 4.0 + 4.0 and training_seconds(rows, facts | {"first_step": 20}) == 2.0 + 4.0
    assert training_seconds([], facts) is None


TRUNK = {"optimizer.schedule": "constant", "train.steps": 1000, "train.keep_steps": "400,800"}


def branch(steps, step, **changes):
    settings = TRUNK | {"optimizer.schedule": "wsd", "train.steps": steps, "init.branch_step": step}
    return Arm(f"at_{steps}", settings, starts_from="trunk", start="branch_from", **changes)


def test_branches_of_a_study():
    study = prepare(make_study(arms=(Arm("trunk", TRUNK), branch(500, 400), branch(1000, 800)), baseline="trunk"), "small")
    config = run_config(study, study.arm("at_500"), 5, "w")
    assert (config.init.branch_from, config.init.branch_step) == ("w/runs/trunk/seed_5", 400)
    facts = {"steps": 500, "first_step": 400, "ms": 10.0, "evaluation_batches": 3}
    assert predicted_seconds(facts) == pytest.approx(15 + 1.0 + 0.01)
    job = make_job(study, "w", ["x"], (study.arm("at_500"), 5, ""), {"arms": {"at_500": facts}}, Fixed())
    assert (job.command, job.after, job.first) == (["x", "train", "w", "at_500", "5"], ("trunk seed 5",), 400)


@pytest.mark.parametrize(
    "arm, message",
    [
        (
            branch(500, 300),
            "arm at_500 config.init.branch_step=300: no checkpoint that trunk keeps of its 1000 steps; give trunk",
        ),
        (
            branch(500, 0),
            "arm at_500 config.init.branch_step=0: no checkpoint that trunk keeps of its 1000 steps; name one from 1",
        ),
        (
            branch(450, 400),
            "arm at_450 config.train.steps=450: with schedule=wsd its learning rate leaves the peak at step 360",
        ),
        (
            dataclasses.replace(branch(500, 400), settings=branch(500, 400).settings | {"model.width": 64}),
            "arm at_500 config.model.width=64: may not differ from that of init.branch_from=DIR/runs/trunk/seed_3",
        ),
        (Arm("t", twin_of="at_500"), "arm t config.noise_seed="),
    ],
)
def test_branches_that_cannot_be(arm, message):
    arms = (Arm("trunk", TRUNK), arm) if arm.name != "t" else (Arm("trunk", TRUNK), branch(500, 400), arm)
    with pytest.raises(ConfigError) as error:
        prepare(make_study(arms=arms, baseline="trunk"), "small")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_grid_must_leave_every_branch_its_trunk():
    grid = {"as_is": {}, "cosine": {"optimizer.schedule": "cosine"}}
    arms = Arm("trunk", TRUNK), branch(500, 400, tuned_as="trunk")
    with pytest.raises(ConfigError, match="arm at_500 candidate cosine config.init.branch_step=400: with schedule=cosine and"):
        prepare(make_study(arms=arms, baseline="trunk", grid=grid, seeds=(10,)), "small")
    grid["cosine"] = {"optimizer.learning_rate": Scale(0.5)}
    prepare(make_study(arms=arms, baseline="trunk", grid=grid, seeds=(10,)), "small")


FACTS = {
    "steps": 1000,
    "tokens": 1,
    "epochs": 1.0,
    "training_flops_per_token": 1.0,
    "router_flops_per_token": 1.0,
    "parameters": 1,
    "active_parameters": 1,
    "evaluation_batches": 0,
}


def test_a_study_that_takes_too_long_is_refused():
    arms = Arm("dense", DENSE), Arm("routed", equal_time_to="dense")
    study = make_study(arms=arms, baseline="dense", primary="routed")
    timing = {"arms": {"dense": FACTS | {"ms": 785.0}, "routed": FACTS | {"ms": 2785.0}}}
    runs, fixed = reported_runs(study), Fixed(equal_time={"routed": {"to": "dense", "steps": 282, "seconds": 785.4}})
    assert [predicted_seconds(timing["arms"][arm.name]) for arm in arms] == [800, 2800]
    lines = announcement(study, runs, timing, 1, fixed)
    assert lines[-1] == "predicted: 2 h 00 min one after the other"
    assert lines[1] == "the primary comparison: routed against dense"
    assert lines[3].startswith("  routed: 282 steps in the 785.4 s of dense; 1 tokens")
    check_hours(study, runs, timing)
    timing["arms"]["routed"]["ms"] += 1
    with pytest.raises(ConfigError) as error:
        check_hours(study, runs, timing)
    assert str(error.value).startswith(
        "study hours_limit=2.0: 2 h 00 min predicted, one run after the other, 1 h 33 min of it for"
    )
    assert "arm routed; train fewer" in str(error.value) and "\n" not in str(error.value)
    check_hours(study, runs[1:], timing)  # what is done already counts no more
    check_hours(dataclasses.replace(study, hours_limit=2.1), runs, timing)


LOSSES = {  # minus dense's, by seed
    "dense": (0.0, 0.0, 0.0),
    "better": (-0.10, -0.11, -0.12),
    "close": (0.001, -0.002, 0.002),
    "worse": (0.02, 0.04, 0.03),
}


def write_all(workdir, **changes):
    arms = [Arm("dense", DENSE), Arm("better"), Arm("close", margin=0.01, equal_time_to="dense"), Arm("worse")]
    grid = {"plain": {}, "half": {"optimizer.learning_rate": Scale(0.5)}}
    study = make_study(
        **{"arms": tuple(arms), "baseline": "dense", "seeds": (10, 11, 12), "grid": grid, "primary": "better"} | changes
    )
    write_study(workdir, study)
    for name, shifts in LOSSES.items():
        for i, (seed, shift) in enumerate(zip(study.seeds, shifts)):
            loss = 3 + 0.1 * i + shift
            write_run(workdir, name, seed, {"a": loss, "b": loss}, [(20, loss + 1), (40, loss)], text="t")
            # 4 documents of 25 tokens of a, 3 of 100 of b; the difference is all in the first of b.
            parts = {"a": np.full(4, 25), "b": np.full(3, 100)}
            sums = {source: {"nats": (3 + 0.1 * i) * size, "tokens": size, "bytes": 2 * size} for source, size in parts.items()}
            sums["b"]["nats"][0] += 400 * shift
            save_documents(run_folder(workdir, name, seed) / "documents.npz", sums)
    write_timing(workdir, "before", dict.fromkeys(LOSSES, 100.0))
    tuning = {
        name: {
            "winner": "half",
            "settings": {},
            "candidates": {
                "plain": {"loss": None, "losses": {}, "failures": {"0": "error: x"}},
                "half": {"loss": 2.5, "losses": {}},
            },
        }
        for name in LOSSES
    }
    equal = {"close": {"to": "dense", "steps": 40, "ms": 100.0, "to_ms": 100.0, "seconds": 4.0}}
    save_fixed(workdir, Fixed(tuning=tuning, equal_time=equal))
    return study


def test_one_family_a_primary_comparison_and_a_margin(tmp_path):
    write_all(tmp_path)
    result = collect(tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    rows = {row["arm"]: row for row in result["rows"]}
    p = {name: p_value(shifts) for name, shifts in LOSSES.items()}
    assert 0.02 < p["worse"] < 0.05 < p["close"]  # resolved alone
    assert {name: row["p"] for name, row in rows.items()} == {
        name: None if name == "dense" else pytest.approx(value, rel=1e-6) for name, value in p.items()
    }
    adjusted = {"better": p["better"], "worse": 2 * p["worse"], "close": max(p["close"], 2 * p["worse"])}
    assert {name: rows[name]["p_adjusted"] for name in adjusted} == pytest.approx(adjusted, rel=1e-6)
    assert rows["close"]["margin"]["p_adjusted"] == pytest.approx(p_value(LOSSES["close"], 0.01), rel=1e-6)
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts == {
        "dense": "baseline",
        "better": "resolved",
        "close": "at least as good (margin 0.01)",
        "worse": "not resolved",
    }
    over = rows["better"]["over_documents"]
    # 7 documents, one of which has the whole difference: none of it where that is not drawn.
    assert over["n"] == 7 and over["mean"] == pytest.approx(-0.11) and over["low"] < -0.2 and over["high"] == 0
    text = tables(result)
    assert "**Primary comparison, better - dense: -0.1100 [" in text and "p = 0.003: resolved.**" in text
    assert "| | p | over documents | bits per byte |" in text.replace("|  |", "| |")
    assert "Holm's correction for 2 comparisons; the primary comparison is tested alone; resolved: p below 0.05." in text
    assert "40 in 4.0 s (4.0 predicted), the time of dense |" in text and "| 40 in 4.0 s (4.0 predicted) |" in text
    assert "| arm | plain | half |" in text and "| dense | failed | **2.5000** |" in text
    assert "half: optimizer.learning_rate x 0.5. dense plain seed 0: error: x." in text


def test_before_the_winners_are_known(tmp_path):
    write_all(tmp_path)
    save_fixed(tmp_path, Fixed())
    assert "**Without a winner yet: dense, better, close, worse.**" in tables(collect(tmp_path))


def test_without_a_primary_comparison_all_are_one_family(tmp_path):
    write_all(tmp_path, primary="")
    result = collect(tmp_path)
    rows = {row["arm"]: row for row in result["rows"]}
    assert rows["better"]["p_adjusted"] == pytest.approx(3 * p_value(LOSSES["better"]), rel=1e-6)
    assert "Primary comparison" not in tables(result)
