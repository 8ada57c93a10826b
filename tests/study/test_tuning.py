"""The grid: its candidates, who wins, and what the other runs then have."""

import json

import pytest

from moe_jax.config import ConfigError, Scale, product
from moe_jax.config.study import Arm, study_from_dict, study_to_dict
from moe_jax.study.description import check_unchanged
from moe_jax.study.fixed import Fixed, load_fixed, save_fixed
from moe_jax.study.plan import prepare, run_config, run_folder
from moe_jax.study.tuning import choose, decide
from moe_jax.study.work import reported_runs, stages, tuning_runs, unfinished
from tests.study.small import make_study

RATE = "optimizer.learning_rate"
GRID = {"plain": {}, "half": {RATE: Scale(0.5)}, "end": {RATE: Scale(2), "optimizer.final_fraction": 0.3}}


def tuned(*more, **changes):
    arms = (Arm("routed"), Arm("twin", twin_of="routed"), Arm("dense", {"model.pattern": "dense,dense", RATE: 0.01}), *more)
    return make_study(**{"arms": arms, "grid": GRID, "seeds": (10, 11), "tuning_seeds": (0, 1)} | changes)


def test_product():
    grid = product({RATE: (Scale(0.5), Scale(1)), "optimizer.schedule": ("wsd", "cosine")})
    assert list(grid) == [f"learning_rate-x{x}+schedule-{s}" for x in ("0.5", "1") for s in ("wsd", "cosine")]
    assert grid["learning_rate-x0.5+schedule-cosine"] == {RATE: Scale(0.5), "optimizer.schedule": "cosine"}
    prepare(tuned(grid=grid), "small")


def test_configs_of_candidates_and_winners():
    study = prepare(tuned(Arm("half", {"train.steps": 500, RATE: 0.03}, tuned_as="dense")), "small")
    fixed = Fixed(tuning={"routed": {"winner": "plain"}, "dense": {"winner": "end"}})
    rate = lambda name, **of: run_config(study, study.arm(name), 10, **of).optimizer
    assert rate("dense", fixed=fixed, candidate="half").learning_rate == 0.005
    assert rate("dense").learning_rate == 0.01  # no winner yet
    end = rate("dense", fixed=fixed)
    assert (end.learning_rate, end.final_fraction) == (0.02, 0.3)
    # Another arm's winner: its factor of the arm's own rate.
    assert (rate("half", fixed=fixed).learning_rate, rate("half", fixed=fixed).final_fraction) == (0.06, 0.3)
    assert rate("twin", fixed=fixed) == rate("routed", fixed=fixed) == study.base.optimizer
    assert [arm.name for arm in study.searched()] == ["routed", "dense"]
    assert len(tuning_runs(study, study.searched())) == 2 * 3 * 2 and len(reported_runs(study)) == 4 * 2
    assert run_folder("w", "dense", 1, "end").parts == ("w", "tuning", "dense", "end", "seed_1")


def test_an_arm_is_tuned_from_the_winner_of_the_one_it_starts_from():
    up = Arm("up", {"model.pattern": "dense,routed"}, starts_from="dense", start="upcycle_from")
    arms = up, Arm("dense", {"model.pattern": "dense,dense"})
    study = prepare(tuned(arms=arms, baseline="dense"), "small")
    assert [[arm.name for arm in stage] for stage in stages(study, Fixed())] == [["dense"], ["up"]]
    fixed = Fixed(tuning={"dense": {"winner": "half"}})
    assert [[arm.name for arm in stage] for stage in stages(study, fixed)] == [["up"]]
    config = lambda **of: run_config(study, study.arm("up"), 1, "w", fixed, **of).init.upcycle_from
    assert config(candidate="end") == "w/tuning/dense/half/seed_1" and config() == "w/runs/dense/seed_1"


def test_choose():
    assert choose({"a": 2.0, "b": 1.5, "c": 1.5}) == "b"  # the first of equal ones
    assert choose({"a": None, "b": 3.0, "c": float("nan")}) == "b" and choose({"a": None}) == ""


def write_loss(workdir, arm, candidate, seed, loss):
    folder = run_folder(workdir, arm, seed, candidate)
    folder.mkdir(parents=True)
    if loss is None:
        (folder / "failed.json").write_text(json.dumps({"code": 1, "line": "error: 10 steps in a row"}))
    else:
        scores = {"loss": loss, "tokens": 10, "bytes": 10}
        (folder / "validation.json").write_text(json.dumps({"step": 1, "sources": {"a": scores}}))


def test_the_winner_is_fixed_once_all_runs_are_there(tmp_path):
    study = prepare(tuned(), "small")
    dense = study.arm("dense")
    losses = {"plain": (2.0, 2.2), "half": (1.0, None), "end": (1.9, 2.1)}
    for candidate, (first, second) in losses.items():
        write_loss(tmp_path, "dense", candidate, 0, first)
        assert decide(study, dense, tmp_path, Fixed()) is None
        write_loss(tmp_path, "dense", candidate, 1, second)
    found = decide(study, dense, tmp_path, Fixed())
    assert found["winner"] == "end" and found["settings"] == {RATE: 0.02, "optimizer.final_fraction": 0.3}
    assert found["candidates"]["end"]["loss"] == pytest.approx(2.0)
    assert found["candidates"]["half"] == {
        "loss": None,
        "losses": {"0": 1.0, "1": None},
        "failures": {"1": "error: 10 steps in a row"},
    }
    save_fixed(tmp_path, Fixed(tuning={"dense": found}))
    assert load_fixed(tmp_path).winner(study, dense) == "end" and load_fixed(tmp_path / "none") == Fixed()
    left = unfinished(tmp_path, tuning_runs(study, [dense]))
    assert [(arm.name, *run) for arm, *run in left] == [("dense", 1, "half")]
    (tmp_path / "fixed.json").write_text("{")
    with pytest.raises(ConfigError, match="fixed.json: JSONDecodeError"):
        load_fixed(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"seeds": (1, 10)},
            "study seeds=(1, 10): the seeds 1 are tuning_seeds too, on which the settings were chosen; write such",
        ),
        ({"grid": {"a": {}}}, "study grid=a: one candidate is no search"),
        ({"grid": ("a", "b")}, "study grid=('a', 'b'): not a dict of settings; write such as {'as_it_is'"),
        ({"grid": {"a": {}, "b/c": {}}}, "study grid: name of a candidate='b/c': not a label"),
        ({"grid": {"a": {}, "b": {"train.steps": 3}}}, "study grid b config.train.steps=3: the steps of an arm, and what"),
        ({"grid": {"a": {}, "b": {"seed": 3}}}, "study grid b config.seed=3: every arm is trained from every seed"),
        ({"grid": {"a": {}, "b": {RATE: Scale(0)}}}, f"study grid b config.{RATE}=Scale(factor=0): not a factor above 0"),
        (
            {"grid": {"a": {}, "b": {"optimizer.schedule": Scale(2)}}},
            "arm routed candidate b config.optimizer.schedule='cosine': no number to multiply by 2; give the candidate a value",
        ),
        ({"grid": {"a": {}, "b": {"optimizer.rate": 3}}}, "arm routed candidate b config.optimizer.rate=3: no such field"),
        ({"tuning_seeds": (1, 1)}, "study tuning_seeds=(1, 1): not different integers"),
        ({"primary": "routed"}, "study primary=routed: no arm that is compared with a baseline; name one of dense"),
        ({"margin": -1}, "study margin=-1: not a number 0 or more"),
        ({"hours_limit": 0}, "study hours_limit=0: not a number above 0"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        prepare(tuned(**changes), "small")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


UP = Arm("up", starts_from="dense", start="upcycle_from", tuned_as="dense")


@pytest.mark.parametrize(
    "arms, message",
    [
        ((Arm("x", tuned_as="twin"),), "arm x tuned_as=twin: no arm with a search of its own; name one of routed, dense"),
        ((Arm("x", twin_of="dense", tuned_as="dense"),), "arm x tuned_as=dense: it has the settings of dense; leave it out"),
        ((Arm("x", starts_from="up"), UP), "arm x tuned_as='': up, which it starts from, has no runs with the tuning seeds"),
        (
            (Arm("x", {"init.branch_step": 5}, starts_from="routed", start="branch_from"),),
            "arm x tuned_as='': a branch of routed has its settings; write tuned_as='routed'",
        ),
        (
            (Arm("x", equal_time_to="twin"),),
            "arm x equal_time_to=twin: no other arm with runs and steps of its own; name one of",
        ),
        ((Arm("x", equal_time_to="x"),), "arm x equal_time_to=x: no other arm"),
        ((Arm("x", twin_of="dense", equal_time_to="dense"),), "arm x equal_time_to=dense: it has the runs of dense; leave it"),
        (
            (Arm("x", {"train.steps": 9}, equal_time_to="dense"),),
            "arm x config.train.steps=9: the seconds of dense say how many",
        ),
        (
            (Arm("x", starts_from="dense", equal_time_to="dense"),),
            "arm x equal_time_to=dense: x starts from dense, whose seconds would not count; give the arm train.steps",
        ),
        ((Arm("x", margin=float("nan")),), "arm x margin=nan: not a number 0 or more"),
    ],
)
def test_arms_refused(arms, message):
    with pytest.raises(ConfigError) as error:
        prepare(tuned(*arms), "small")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_without_a_grid_there_is_nothing_to_have():
    with pytest.raises(ConfigError, match="arm x tuned_as=routed: the study has no grid"):
        prepare(make_study(arms=(Arm("routed"), Arm("x", tuned_as="routed"))), "small")
    assert make_study().searched() == [] and make_study(seeds=(0, 1)).tuning_seeds == (0, 1, 2)  # not used


def test_description():
    begun = prepare(tuned(Arm("x", margin=0.1, equal_time_to="dense", tuned_as="dense"), primary="dense", margin=0.2), "small")
    tree = json.loads(json.dumps(study_to_dict(begun)))
    assert study_from_dict(tree) == begun
    new = ("grid", "tuning_seeds", "primary", "margin", "hours_limit")
    old = study_from_dict({name: value for name, value in tree.items() if name not in new})
    assert (old.grid, old.tuning_seeds, old.hours_limit) == ({}, (0, 1, 2), 2.0)
    same = dict(primary="dense", margin=0.2, hours_limit=9.0)
    x = begun.arm("x")
    check_unchanged(begun, tuned(x, Arm("more"), **same))
    for arm, changes, message in [
        (x, {"grid": GRID | {"more": {}}}, "study grid="),
        (x, {"tuning_seeds": (0, 1, 2)}, r"study tuning_seeds=\(0, 1, 2\): the study in --workdir began with \(0, 1\)"),
        (x, {"primary": ""}, "study primary=none: the study in --workdir began with dense"),
        (x, {"margin": 0.3}, "study margin=0.3: the study in --workdir began with 0.2"),
        (
            Arm("x", margin=0.1, tuned_as="dense"),
            {},
            "arm x equal_time_to=: the study in --workdir began with dense|arm x equal",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_unchanged(begun, tuned(arm, **same | changes))
