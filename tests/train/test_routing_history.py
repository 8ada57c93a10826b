"""What a run records of its routing: by hand, through a restart, and for routers that settle in different ways."""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from moe_jax.config import FFNConfig, MoEConfig
from moe_jax.train import loop
from moe_jax.train.routing_history import RoutingHistory, due, fluctuation, last_changes, read_history
from tests.train.small import make_config, words


def test_by_hand():
    """Of five tokens: one never changes, one settles at once, one goes away and comes back, two change at the end."""
    experts = np.array([[0, 1, 1, 2, 3], [0, 2, 1, 2, 3], [0, 2, 0, 2, 0], [0, 2, 1, 3, 1]])
    packed = np.packbits(np.eye(4, dtype=bool)[experts], axis=2)
    np.testing.assert_array_equal(last_changes(packed), [-1, 0, 2, 2, 2])
    history = RoutingHistory(np.array([8, 20, 30, 40]), np.arange(5), {"a": packed, "b": packed[:, :3]}, {"a": 4, "b": 4})
    assert fluctuation(history, 40)["a"] == {"fluctuation_20": 0.6, "fluctuation_50": 0.6, "fluctuation_80": 0.0}
    assert [*fluctuation(history, 40)["b"].values()] == [1 / 3, 1 / 3, 0.0]
    np.testing.assert_array_equal(history.chosen("a", 3), np.eye(4, dtype=bool)[experts[3]])
    # Of a run that goes on, and of one that began to record late.
    assert [*fluctuation(history, 80)["a"].values()] == [0.6, None, None]
    assert [*fluctuation(history._replace(steps=history.steps + 10), 50)["a"].values()] == [None, 0.6, 0.0]


@pytest.mark.parametrize(
    "steps, count, expected", [(10, 5, [2, 4, 6, 8, 10]), (10, 3, [4, 7, 10]), (3, 50, [1, 2, 3]), (7, 0, [])]
)
def test_when(steps, count, expected):
    train = make_config(train__steps=steps, train__routing_snapshots=count).train
    assert [step for step in range(1, steps + 1) if due(step, train)] == expected


def layer_of(name: str, router: str, k: int, **options) -> FFNConfig:
    moe = MoEConfig(experts=4, top_k=k, router=router, expert_width=16, **options)
    moe.routers.stable.stage_1, moe.routers.stable.light_width = 0.45, 6
    moe.routers.switch.jitter = 0.5
    return FFNConfig(name, kind="routed", moe=moe)


@pytest.mark.slow
def test_a_run_with_a_restart(tmp_path, monkeypatch, capsys):
    """The file is that of the run in one piece; a frozen routing moves no more, and of soft slots the best one counts."""
    monkeypatch.setattr(loop, "show_log", lambda: None)
    ffns = layer_of("settled", "stable", 1), layer_of("learns", "switch", 1), layer_of("auction", "base", 1)
    ffns += (layer_of("mixed", "soft_moe", 1, allow_noncausal=True),)
    names = [ffn.name for ffn in ffns]
    options = dict(data=words(tmp_path), train__log_every=5, train__tensorboard=False, train__eval_every=0)
    options |= dict(train__routing_snapshots=5, train__routing_tokens=100, optimizer__learning_rate=0.1)
    options |= dict(model__ffns=ffns, model__pattern=",".join(names), model__layers=4)
    config = make_config(**options, optimizer__schedule="constant", train__steps=10)
    assert loop.fit(config, tmp_path / "whole") == 0
    said = capsys.readouterr().err
    line = r"step 6: the routing is frozen: the light router agrees with the backbone on [\d.]+% of the tokens; the fullest"
    assert len(re.findall(line, said)) == 1

    def interrupted(self, step, variables):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return record(self, step, variables)

    record = loop.Recorder.record
    monkeypatch.setattr(loop.Recorder, "record", interrupted)
    assert loop.fit(config, tmp_path / "parts") == 143
    monkeypatch.setattr(loop.Recorder, "record", record)
    assert read_history(tmp_path / "parts").steps.tolist() == [2, 4]
    # What a killed process had recorded after its last checkpoint is cut back.
    shutil.copy(tmp_path / "whole" / "routing.npz", tmp_path / "parts")
    assert loop.fit(config, tmp_path / "parts") == 0
    assert len(re.findall(line, capsys.readouterr().err)) == 1
    whole, parts = read_history(tmp_path / "whole"), read_history(tmp_path / "parts")
    assert whole.steps.tolist() == parts.steps.tolist() == [2, 4, 6, 8, 10] and len(whole.ids) == 96
    assert list(whole.layers) == [f"layer_{i:02d}" for i in range(4)] and set(whole.columns.values()) == {4}
    for name, packed in whole.layers.items():
        np.testing.assert_array_equal(parts.layers[name], packed)
        assert np.all(np.sum(whole.chosen(name, 4), axis=1) == 1)
    settled = whole.layers["layer_00"]
    np.testing.assert_array_equal(settled[2:], np.broadcast_to(settled[4], settled[2:].shape))
    assert np.any(settled[1] != settled[2]) and np.any(whole.layers["layer_01"][3] != whole.layers["layer_01"][4])
    auction = [whole.chosen("layer_02", i).sum(axis=0) for i in range(5)]
    assert max(counts.max() for counts in auction) <= 2 * 96 / 4, "balanced over the batches, of which these are a part"

    last = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()][-1]
    expected = fluctuation(whole, 10)
    assert last["step"] == 10 and last["router/layer_00/fluctuation_50"] == 0 < last["router/layer_00/fluctuation_20"]
    assert {name: last[f"router/layer_01/{name}"] for name in expected["layer_01"]} == expected["layer_01"]
    means = {name: np.mean([layer[name] for layer in expected.values()]) for name in expected["layer_00"]}
    assert {name: last[f"router/{name}"] for name in means} == pytest.approx(means)
