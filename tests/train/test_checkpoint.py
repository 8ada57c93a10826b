"""Checkpoints: bit for bit onto any mesh, survive kills and damage, refuse what does not fit."""

import gc
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ConfigError
from moe_jax.train import checkpoint
from moe_jax.train.checkpoint import Checkpoints, load_meta, load_params
from tests.train.states import META, abstract, assert_bit_equal, make_state, put, save

# After a read that failed, TensorStore calls back into an event loop that Orbax has closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture
def collect_failed_reads():
    """Orbax leaves coroutines of a failed read behind; their complaints belong to the test that made them."""
    yield
    for _ in range(3):
        gc.collect()


def data_file(workdir, step):
    """The file that holds the arrays."""
    files = (pathlib.Path(workdir) / "checkpoints" / str(step) / "state").rglob("*")
    return max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 1 and 2, not to be changed."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, (1, 2))
    return workdir


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_restores_bit_for_bit_onto_another_mesh(saved, devices):
    target = abstract(make_state(0, devices))
    with Checkpoints(saved, max_to_keep=5) as checkpoints:
        assert checkpoints.latest_step() == 2
        restored = checkpoints.restore(target)
    assert (restored.step, restored.damaged) == (2, ())
    assert restored.meta == {**META, "data_position": 2}
    assert_bit_equal(restored.state, make_state(2))
    for x, t in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True):
        assert x.sharding == t.sharding


@pytest.mark.smoke
def test_restored_state_can_be_stepped_and_donated(saved):
    with Checkpoints(saved, max_to_keep=5) as checkpoints:
        state = checkpoints.restore(abstract(make_state(0))).state
    stepped = jax.jit(lambda s: jax.tree.map(lambda x: x ^ True if x.dtype == bool else x + 1, s), donate_argnums=0)(state)
    assert int(stepped["step"]) == 3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_save_does_not_see_what_happens_after_it(tmp_path, asynchronous):
    state = make_state(3)
    with Checkpoints(tmp_path, max_to_keep=1, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(1, state, META)
        jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
        checkpoints.wait()
        assert_bit_equal(checkpoints.restore(abstract(make_state(3))).state, make_state(3))


def test_empty_subtrees_named_tuples_and_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Pair = namedtuple("Pair", "left right")
    pair = Pair({}, [np.ones(2, np.float32), (), None])
    state = {**make_state(1, router_state={}), "pair": put(pair)}
    with Checkpoints("run", max_to_keep=1) as checkpoints:
        checkpoints.save(1, state, META)
        restored = checkpoints.restore(abstract(state)).state
        assert_bit_equal(restored, state)
        assert isinstance(restored["pair"], Pair) and restored["router_state"] == {}
    assert load_params("run", {"router_state": {}}).state == {"router_state": {}}


def test_retention_and_saving_a_step_twice(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make_state(step), META)
        assert not checkpoints.save(4, make_state(9), META)
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
        assert_bit_equal(checkpoints.restore(abstract(make_state(0))).state, make_state(4))
        assert_bit_equal(checkpoints.restore(abstract(make_state(0)), 3).state, make_state(3))


def test_steps_that_are_kept(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=1, keep=(2, 3)) as checkpoints:
        for step in (1, 2, 3, 4, 5):
            checkpoints.save(step, make_state(step), META)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 5]
        assert_bit_equal(checkpoints.restore(abstract(make_state(0)), 2).state, make_state(2))


def test_meta_is_what_json_makes_of_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError):
            checkpoints.save(1, make_state(1), {"x": object()})
        checkpoints.save(1, make_state(1), {10: (1, 2), 9: "\u2028", "deep": {"x": [None, 1e-9]}})
        checkpoints.wait()
        assert checkpoints.restore_meta() == {"10": [1, 2], "9": "\u2028", "deep": {"x": [None, 1e-9]}}


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new", max_to_keep=1) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(ConfigError, match="no checkpoint"):
            checkpoints.restore({})
    for workdir in (tmp_path / "new", tmp_path / "absent"):
        with pytest.raises(ConfigError, match="no checkpoint"):
            load_meta(workdir)
    assert not (tmp_path / "absent").exists()


def test_other_shapes_dtypes_and_leaves_are_refused_by_name(saved):
    target = abstract(make_state(0))
    dense = target["params"]["layers"]["dense"]
    target["params"]["layers"]["dense"] = jax.ShapeDtypeStruct((16, 5), dense.dtype, sharding=dense.sharding)
    target["params"]["embed"] = target["params"]["embed"].update(dtype=jnp.float32)
    target["params"]["extra"] = target["step"]
    del target["flags"]
    with Checkpoints(saved, max_to_keep=5) as checkpoints, pytest.raises(ConfigError) as error:
        checkpoints.restore(target)
    message = str(error.value)
    assert "params/layers/dense is float32 [16, 3], needs float32 [16, 5]" in message
    assert "params/embed is bfloat16 [10, 16], needs float32" in message
    assert "params/extra is not in the checkpoint" in message
    assert "flags/frozen is not in the model" in message
    assert "\n" not in message


def test_many_misfits_are_counted(saved):
    target = {"params": {f"p{i}": x for i, x in enumerate([abstract(make_state(0))["step"]] * 9)}}
    with pytest.raises(ConfigError, match=r"params/p3 is not in the checkpoint and \d+ more"):
        load_params(saved, target)


def test_a_target_without_shardings_is_the_callers_mistake(saved):
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0)["params"])
    with pytest.raises(ValueError, match="without a sharding: params/embed, "):
        load_params(saved, {"params": target})


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "one bit", "meta", "step"])
@pytest.mark.usefixtures("collect_failed_reads")
def test_damage_falls_back_to_the_newest_intact(tmp_path, caplog, damage):
    save(tmp_path, (1, 2))
    file = data_file(tmp_path, 2)
    if damage == "meta":
        file = tmp_path / "checkpoints/2/meta/metadata"
        file.write_text(file.read_text().replace('"data_position": 2', '"data_position": 3'))
    elif damage == "step":
        for file in (tmp_path / "checkpoints/2").iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    elif damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        half = content[: len(content) // 2]
        file.write_bytes({"one bit": content, "truncated": half, "empty": b""}[damage])
    # A reader changes nothing.
    target = abstract(make_state(0))
    assert load_params(tmp_path, target).damaged == (2,)
    assert (tmp_path / "checkpoints/2").exists()
    with Checkpoints(tmp_path, max_to_keep=5) as checkpoints:
        restored = checkpoints.restore(target)
        assert (restored.step, restored.damaged, restored.meta["data_position"]) == (1, (2,), 1)
        assert_bit_equal(restored.state, make_state(1))
        assert "Checkpoint 2" in caplog.text
        # The step can be saved again, and the damaged one is still there to look at.
        assert checkpoints.steps() == [1]
        assert checkpoints.save(2, make_state(2), META)
        checkpoints.wait()
        assert checkpoints.restore(target).step == 2
    assert (tmp_path / "checkpoints/damaged_2").exists()


@pytest.mark.usefixtures("collect_failed_reads")
def test_no_flipped_bit_is_read_in_silence(tmp_path):
    save(tmp_path, (1,))
    state, target = make_state(1), abstract(make_state(1))
    files = [f for f in (tmp_path / "checkpoints/1").rglob("*") if f.is_file()]
    chance = random.Random(0)
    found = 0
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        for _ in range(24):
            # Half of them in the arrays.
            file = data_file(tmp_path, 1) if chance.random() < 0.5 else chance.choice(files)
            good = file.read_bytes()
            if not good:
                continue
            bad = bytearray(good)
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
            file.write_bytes(bad)
            try:
                assert_bit_equal(checkpoints.restore(target).state, state)
            except checkpoint.DamagedCheckpointError:
                found += 1
            file.write_bytes(good)
        assert_bit_equal(checkpoints.restore(target).state, state)
    assert found > 8


@pytest.mark.usefixtures("collect_failed_reads")
def test_a_reader_finds_what_replaced_the_steps_it_listed(tmp_path):
    save(tmp_path, (1,))
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.latest_step() == 1
        save(tmp_path, (2,), max_to_keep=1)
        assert not (tmp_path / "checkpoints" / "1").exists()
        assert reader.restore_meta()["data_position"] == 2


@pytest.mark.usefixtures("collect_failed_reads")
def test_when_all_are_damaged_it_says_so_and_renames_nothing(tmp_path):
    save(tmp_path, (1,))
    data_file(tmp_path, 1).write_bytes(b"")
    with Checkpoints(tmp_path, max_to_keep=5) as checkpoints:
        with pytest.raises(checkpoint.DamagedCheckpointError, match=r"none of steps \[1\] can be read"):
            checkpoints.restore(abstract(make_state(0)))
        assert checkpoints.steps() == [1]


KILLED = """
import os, signal, sys
import jax, jax.numpy as jnp
from moe_jax.train.checkpoint import Checkpoints
workdir, event, place = sys.argv[1:]
def kill(name, args):
    if name == event and str(args[0]).endswith(place):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints = Checkpoints(workdir, max_to_keep=1)
state = {"params": {str(i): jnp.full((64, 1024), i, jnp.float32) for i in range(8)}}
for step in (1, 2):
    checkpoints.save(step, jax.tree.map(lambda x: x + step, state), {"step": step})
    checkpoints.wait()
    # Python reports each file it touches to audit hooks; the first save stays unharmed.
    sys.addaudithook(kill)
"""


@pytest.mark.parametrize(
    ("event", "place", "survivor"),
    [
        ("os.mkdir", "/2.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", 1),
        ("open", "_METADATA", 1),
        ("os.rename", "/2.orbax-checkpoint-tmp", 1),
        ("shutil.rmtree", "/checkpoints/1", 2),
        ("os.rmdir", "ocdbt.process_0", 2),
    ],
    ids=["start", "writing", "before the commit", "before the old one goes", "while the old one goes"],
)
def test_kill_9_during_a_save(tmp_path, event, place, survivor):
    command = [sys.executable, "-c", KILLED, str(tmp_path), event, place]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    present = {d.name for d in (tmp_path / "checkpoints").iterdir()}
    assert len(present) == 2, "the kill came too early or too late"
    leaf = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        restored = checkpoints.restore({"params": {str(i): leaf for i in range(8)}})
        assert (restored.step, restored.damaged, restored.meta) == (survivor, (), {"step": survivor})
        for i in range(8):
            assert np.all(np.asarray(restored.state["params"][str(i)]) == i + survivor)
        assert checkpoints.save(3, restored.state, {})
    assert [d.name for d in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_leftovers_of_an_uncommitted_save_are_cleaned(tmp_path):
    save(tmp_path, (1,))
    unfinished = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    (tmp_path / "checkpoints/1").rename(unfinished)
    save(tmp_path, (1,))
    with Checkpoints(tmp_path, max_to_keep=5) as checkpoints:
        assert checkpoints.steps() == [1]
    assert not unfinished.exists()


def test_load_params_reads_neither_optimizer_nor_the_rest(saved, monkeypatch):
    seen = []
    read = Checkpoints._read
    monkeypatch.setattr(
        Checkpoints,
        "_read",
        lambda self, step, t, leaves: seen.append(list(t)) or read(self, step, t, leaves),
    )
    target = abstract({k: v for k, v in make_state(0, 4).items() if k in ("params", "router_state")})
    restored = load_params(saved, target, step=1)
    want = make_state(1)
    assert_bit_equal(restored.state, {"params": want["params"], "router_state": want["router_state"]})
    assert len(seen) == 1 and all(path.startswith(("params/", "router_state/")) for path in seen[0])
    assert load_meta(saved)["data_position"] == 2


def test_fingerprints_do_not_depend_on_the_mesh_and_see_swaps():
    leaves = [jax.device_get(checkpoint._fingerprints(checkpoint.leaves_by_path(make_state(1, d)))) for d in (1, 4, 8)]
    assert leaves[0] == leaves[1] == leaves[2]
    x = np.arange(64, dtype=np.int32).reshape(4, 16)
    assert int(checkpoint._fingerprint(x)) != int(checkpoint._fingerprint(x[[1, 0, 2, 3]]))
    assert int(checkpoint._fingerprint(x)) != int(
        checkpoint._fingerprint(x ^ (np.arange(64).reshape(4, 16) < 2) * np.int32(-(2**31)))
    )
