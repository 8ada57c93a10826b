"""Runs that go on from another run's state: what they may change, and that they are the runs of their own configs."""

import json

import pytest

from moe_jax import config as c
from moe_jax.config import Config, ConfigError
from moe_jax.config.validate import validate
from moe_jax.train import loop
from moe_jax.train.branch import check_branch
from moe_jax.train.checkpoint import Checkpoints
from tests.train.small import make_config, words


def stable(**overrides) -> Config:
    return make_config(**{"train__steps": 100, "optimizer__warmup_steps": 10, "optimizer__schedule": "constant"} | overrides)


def branch(**overrides) -> Config:
    """40 steps, the last 20 of them a decay."""
    wsd = {"train__steps": 40, "optimizer__schedule": "wsd", "optimizer__decay_fraction": 0.5, "init__branch_from": "trunk"}
    return stable(**wsd | overrides)


LONG = dict(optimizer__schedule="wsd", optimizer__decay_fraction=0.5, optimizer__final_fraction=0.0)


@pytest.mark.parametrize(
    "trunk, own, step",
    [
        ({}, {}, 20),
        (LONG, {"optimizer__final_fraction": 0.3}, 20),
        (LONG, {"train__steps": 60, "optimizer__schedule": "constant"}, 50),
        ({}, {"train__log_every": 3, "mesh__data": 2, "model__residual_init": 0.1, "optimizer__decay_fraction": 0.1}, 36),
        # Another decay from within the warm-up, and the same schedule from anywhere.
        (dict(optimizer__schedule="cosine"), {"optimizer__schedule": "linear"}, 10),
        (dict(optimizer__schedule="cosine"), {"train__steps": 100, "optimizer__schedule": "cosine", **LONG}, 10),
        (
            dict(optimizer__schedule="cosine"),
            dict(train__steps=100, optimizer__schedule="cosine", optimizer__decay_fraction=0.2),
            70,
        ),
    ],
)
def test_allowed(trunk, own, step):
    check_branch(stable(**trunk), branch(**own), step)


TRUNK = "init.branch_from=trunk"


@pytest.mark.parametrize(
    "trunk, own, step, message",
    [
        (
            {},
            {},
            21,
            "train.steps=40: with schedule=wsd its learning rate leaves the peak at step 20, before the branch; the br",
        ),
        ({}, {}, 40, f"train.steps=40: no step is left after that, 40, of {TRUNK}; raise it, or name an earlier"),
        (LONG, {"train__steps": 200}, 51, f"init.branch_step=51: with schedule=wsd and 100 steps the learning rate of {TRUNK}"),
        (
            dict(optimizer__schedule="cosine"),
            {},
            11,
            "init.branch_step=11: with schedule=cosine and 100 steps the learning rate of",
        ),
        (
            {},
            {"train__steps": 8, "optimizer__decay_fraction": 0.0},
            5,
            f"train.steps=8: its warm-up takes 8 steps, that of {TRUNK} 10",
        ),
        ({}, {"model__width": 64}, 20, f"model.width=64: may not differ from that of {TRUNK}; differing: model.width 32 -> 64"),
        ({}, {"data__batch_size": 8}, 20, "data.batch_size=8: may not differ"),
        ({}, {"optimizer__learning_rate": 1.0}, 20, "optimizer.learning_rate=1.0: may not differ"),
        ({}, {"optimizer__warmup_steps": 9}, 20, "optimizer.warmup_steps=9: may not differ"),
        ({}, {"seed": 9}, 20, "seed=9: may not differ"),
        ({}, {"noise_seed": 9}, 20, "noise_seed=9: may not differ"),
        ({}, {"optimizer__groups": (c.ParameterGroup("embed", 0.0),)}, 20, "optimizer.groups[0]="),
    ],
)
def test_refused(trunk, own, step, message):
    with pytest.raises(ConfigError) as error:
        check_branch(stable(**trunk), branch(**own), step)
    assert str(error.value).startswith(f"config.{message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"init__branch_step": 40}, "init.branch_step=40: no step is left of train.steps=40, which counts from the first step"),
        ({"init__checkpoint": "x"}, "init.checkpoint=x: excludes init.branch_from=trunk; empty one of them"),
        ({"init__upcycle_from": "x"}, "init.upcycle_from=x: excludes init.branch_from=trunk"),
        (
            {"init__branch_from": "", "init__branch_step": 3},
            "init.branch_step=3: init.branch_from is empty; name a run, or use 0",
        ),
        ({"train__keep_steps": "3,x"}, "train.keep_steps=3,x: not steps of 1 or more; write such as 400,800"),
        ({"train__keep_steps": "0"}, "train.keep_steps=0: not steps of 1 or more"),
    ],
)
def test_refused_at_once(overrides, message):
    with pytest.raises(ConfigError) as error:
        validate(branch(**overrides), 1)
    assert str(error.value).startswith(f"config.{message}")


def saved(workdir, step=None):
    """Path -> fingerprint of all that a checkpoint holds."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        record = checkpoints._record(step or checkpoints.latest_step())
        return {path: leaf["fingerprint"] for path, leaf in record["leaves"].items()}, checkpoints.steps()


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture
def text(tmp_path):
    return words(tmp_path)


@pytest.mark.slow
@pytest.mark.fused
def test_a_branch_has_the_bits_of_a_run_of_its_own_config(tmp_path, text, monkeypatch, capsys):
    """From a step that the other run keeps beside its newest; moments, average, the routers' bias and noise, and text too."""
    monkeypatch.setattr(loop, "show_log", lambda: None)
    options = dict(data=text, train__log_every=1, train__tensorboard=False, train__eval_every=0, train__max_to_keep=1)
    options |= dict(optimizer__warmup_steps=2, optimizer__ema_decay=0.9, train__checkpoint_every=3)
    options |= dict(model__moe__routers__top_k__bias_rate=0.01, model__moe__routers__top_k__jitter=0.1)
    trunk = make_config(**options, optimizer__schedule="constant", train__steps=9, train__keep_steps="5,99")
    own = dict(options, optimizer__schedule="wsd", optimizer__decay_fraction=0.25, train__steps=8)
    branched = make_config(**own, init__branch_from=str(tmp_path / "trunk"), init__branch_step=5)
    for name, config in (("trunk", trunk), ("whole", make_config(**own)), ("branch", branched)):
        assert loop.fit(config, tmp_path / name) == 0
    said = capsys.readouterr().err
    assert f"branched from {tmp_path / 'trunk'} step 5" in said
    assert "warning: config.train.keep_steps=5,99: there is no step 99" in said
    of_trunk, steps = saved(tmp_path / "trunk", 5)
    assert steps == [5, 9]
    of_branch, of_whole = saved(tmp_path / "branch")[0], saved(tmp_path / "whole")[0]
    assert of_branch == of_whole and set(of_branch) == set(of_trunk) and of_branch != of_trunk
    ours, theirs, others = (losses(tmp_path / name) for name in ("branch", "whole", "trunk"))
    # The last step is the first whose rate is not the trunk's: no loss shows it, and what is saved does.
    assert list(ours) == [6, 7, 8] and ours == {step: theirs[step] for step in ours} == {step: others[step] for step in ours}

    branched.init.branch_step = 4
    with pytest.raises(ConfigError, match=r"init.branch_from=.*trunk: no checkpoint of step 4, only of \[5, 9\]"):
        loop.fit(branched, tmp_path / "other")
