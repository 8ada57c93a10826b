"""Parameters from another run's checkpoint, by prefixes."""

import numpy as np
import pytest

from moe_jax.config import ConfigError
from moe_jax.train.fill import fill_from
from tests.train.states import assert_bit_equal, make_state, put, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 1 and 2, not to be changed."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, (1, 2))
    return workdir


def fresh(seed=9):
    state = make_state(seed)
    return {"params": state["params"], "router_state": state["router_state"]}


def test_fill_everything(saved):
    filled, report = fill_from(saved, fresh())
    want = make_state(2)
    assert_bit_equal(filled, {"params": want["params"], "router_state": want["router_state"]})
    assert (report.step, report.unfilled, report.unused) == (2, {}, ())
    assert f"filled 5 of 5 leaves from {saved} step 2" == str(report)


def test_fill_by_prefix_lists_what_was_not_filled(saved):
    target = fresh()
    target["params"]["layers"]["moe_2"] = target["params"]["norm"]
    target["params"]["layers"]["dense"] = put({"x": np.zeros((16, 4), np.float32)})["x"]
    filled, report = fill_from(saved, target, ("layers",))
    want = make_state(2)
    assert report.filled == ("params/layers/moe/experts", "router_state/layers/moe/bias")
    assert_bit_equal(filled["params"]["layers"]["moe"], want["params"]["layers"]["moe"])
    assert_bit_equal(filled["router_state"], want["router_state"])
    assert filled["params"]["embed"] is target["params"]["embed"]
    assert report.unfilled == {
        "params/embed": "is not in init.include",
        "params/layers/dense": "is float32 [16, 3], needs float32 [16, 4]",
        "params/layers/moe_2": "is not in the checkpoint",
        "params/norm": "is not in init.include",
    }
    assert set(report.unused) == {"params/embed", "params/layers/dense", "params/norm"}
    _, report = fill_from(saved, target, ("layers/moe",))
    assert "params/layers/moe_2" in report.unfilled


@pytest.mark.parametrize("prefix", ["layer", "layers/dense", "moe", "params/embed"])
def test_a_prefix_that_fills_nothing_is_refused(saved, prefix):
    target = fresh()
    target["params"]["layers"]["dense"] = put({"x": np.zeros((16, 4), np.float32)})["x"]
    with pytest.raises(ConfigError, match=f"config.init.include={prefix}: fills nothing.*embed, layers"):
        fill_from(saved, target, ("embed", prefix))
