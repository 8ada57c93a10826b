"""The order of the rows by what their tokens took, in the whole run."""

import shutil

import jax
import numpy as np
import pytest

from moe_jax.config import ConfigError
from moe_jax.config.validate import validate
from moe_jax.models.places import by_layer
from moe_jax.study.measure import Stepper
from moe_jax.train import loop
from moe_jax.train.metrics import read_metrics
from tests.train.small import BATCH, Runner, make_batch, make_config, words

# After a read that failed, TensorStore calls back into an event loop that Orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def adaptive(**overrides):
    fields = {"model__moe__router": "adaptive", "model__moe__experts": 4, "data__curriculum": "mean", **overrides}
    return make_config(**fields)


@pytest.mark.parametrize("parts", [1, 4])
def test_rows_are_those_of_the_batch(parts):
    """Experts per token of each row, in the order of the batch, whatever microbatches it is cut into."""
    config = adaptive(train__microbatches=parts, model__layers=2, model__moe__routers__adaptive__threshold=0.15)
    runner, batch = Runner(config), make_batch(0)
    out = runner.model.apply(
        {name: runner.state[name] for name in ("params", "router_state")},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        train=True,
        record=True,
    )
    matrices = by_layer(jax.tree.map(np.asarray, out.stats), config.model)
    rows = jax.device_get(runner.step(batch)["rows"])
    assert list(rows) == ["layer_00", "layer_01"]
    for name, shares in rows.items():
        taken = (matrices[name]["matrix"] > 0).reshape(BATCH, -1).sum(1)
        np.testing.assert_allclose(shares, taken / (batch["segment_ids"] > 0).sum(1), rtol=1e-6)
        assert len(set(shares.tolist())) > 3


def test_rows_on_eight_devices():
    one = jax.device_get(Runner(adaptive()).step(make_batch(0))["rows"])
    eight = jax.device_get(Runner(adaptive(mesh__data=8, mesh__expert=1), 8).step(make_batch(0))["rows"])
    np.testing.assert_allclose(eight["layer_00"], one["layer_00"], rtol=1e-6)


def run_config(tmp_path, steps, **overrides):
    tmp_path.mkdir(exist_ok=True)
    config = adaptive(model__width=16, model__ffn_width=16, **overrides)
    config.data, order = words(tmp_path), config.data.curriculum
    config.data.curriculum, config.data.curriculum_buckets = order, 4
    t = config.train
    t.steps, t.log_every, t.eval_every, t.checkpoint_every, t.tensorboard = steps, 1, 0, 0, False
    return config


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(loop, "show_log", lambda: None)
    monkeypatch.setattr(loop, "start_devices", lambda mesh: None)


@pytest.mark.slow
def test_a_restart_in_the_second_epoch_gives_the_same_run(tmp_path, quiet):
    """One run, and one with restarts before, at and after the boundary of the epoch, from its end or from earlier.

    The first epoch is that of a run without a curriculum, the second is not.
    """
    losses, end = {}, 0
    for name, stops in (("whole", []), ("cut", [0.5, 0.97, 1.2]), ("random", [])):
        config = run_config(tmp_path / name, 1, data__curriculum="none" if name == "random" else "mean")
        if not end:
            epoch = loop.open_data(config.data, show_progress=False).train_rows // config.data.batch_size
            end = round(1.6 * epoch)
        config.optimizer.schedule = "constant"
        config.train.checkpoint_every, config.train.max_to_keep = 3 if stops else 0, 2
        folder = tmp_path / name / "run"
        for stop in [round(share * epoch) for share in stops] + [end]:
            config.train.steps = stop
            assert loop.fit(config, folder) == 0
            if stop == round(0.97 * epoch):  # as if it had been killed: it goes on from a checkpoint among its steps
                shutil.rmtree(folder / "checkpoints" / str(stop))
        losses[name] = np.asarray([row["loss"] for row in read_metrics(folder) if "loss" in row])
        if name == "whole":  # a study times the steps of a finished run
            assert np.isfinite(Stepper(config, loop.open_data(config.data, show_progress=False), str(folder))())
    assert len(losses["whole"]) == end
    np.testing.assert_array_equal(losses["cut"], losses["whole"])
    same = np.isclose(losses["random"], losses["whole"], rtol=1e-4)  # another program, which may round otherwise
    assert np.all(same[:epoch]) and np.mean(same[epoch + 1 :]) < 0.2


def test_a_router_that_does_not_decide():
    with pytest.raises(ConfigError, match="data.curriculum=mean.*all rows are alike"):
        validate(adaptive(model__moe__router="switch", model__moe__top_k=1))
    validate(adaptive())
