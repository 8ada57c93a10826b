"""The folder of a run: the lock, and room for checkpoints."""

import errno
import json
import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import Config, ConfigError, to_dict
from moe_jax.config.load import load_saved_config
from moe_jax.train import workdir
from moe_jax.train.checkpoint import Checkpoints, load_meta
from moe_jax.train.metrics import MetricsWriter, read_metrics
from moe_jax.train.state import total_bytes
from moe_jax.train.workdir import check_free_space, own_workdir
from tests.train.states import abstract, make_state


def test_a_file_system_without_locks_is_used_without(monkeypatch, tmp_path):
    def no_lock(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_lock)
    with own_workdir(tmp_path):
        pass


def test_other_processes_learn_that_the_folder_is_busy(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr("moe_jax.train.workdir.largest", lambda value: 1)
    with pytest.raises(ConfigError, match="process 0 cannot write there"), own_workdir(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "results.json", ".lock", "checkpoints", "tensorboard"])
def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path, name):
    """And a file in the place of a folder; found before anything is written."""
    folder = name not in ("checkpoints", "tensorboard")
    (tmp_path / name).mkdir() if folder else (tmp_path / name).write_text("")
    what = "a folder, not a file" if folder else "a file, not a folder"
    with (
        pytest.raises(ConfigError, match=f"^--workdir={tmp_path}: {name} in it is {what}; move it away"),
        own_workdir(tmp_path),
    ):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_reader_of_a_folder_named_metrics_jsonl(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match="^--workdir=.*: metrics.jsonl in it cannot be read: Is a directory; move it away"):
        read_metrics(tmp_path)


def test_the_home_folder_is_expanded_by_every_entry(tmp_path, monkeypatch):
    """What the parts of a run write and read under ~/run is in one folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with own_workdir("~/run"), Checkpoints("~/run", asynchronous=False) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)}, {"config": {}})
        with MetricsWriter("~/run", tensorboard=False) as writer:
            writer.write(1, {"loss": 1.0})
    check_free_space("~/run", 1, 1)
    assert load_meta("~/run") == {"config": {}} and read_metrics("~/run") == [{"step": 1, "loss": 1.0}]
    (tmp_path / "home" / "run" / "config.json").write_text(json.dumps(to_dict(Config(seed=3))))
    assert load_saved_config("~/run").seed == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["home"]
    assert sorted(entry.name for entry in (tmp_path / "home" / "run").iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
    ]


def test_free_space(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3000))
    check_free_space(tmp_path / "not/yet/there", 1000, 2)
    with pytest.raises(ConfigError, match="GB are free, its checkpoints need"):
        check_free_space(tmp_path, 1001, 2)
    # Two checkpoints are there already: only the one being written is missing.
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    check_free_space(tmp_path, 3000, 2)
    check_free_space("gs://bucket/run", 10**30, 2)
    assert total_bytes(make_state(0)["params"]) == (8 * 16 * 64 + 16 * 3 + 4) * 4 + 10 * 16 * 2
    assert total_bytes(abstract(make_state(0)["params"])) == total_bytes(make_state(0, 1)["params"])
