"""The folder of a run: the lock, and room for checkpoints."""

import errno
import types

import jax
import pytest

from moe_jax.config import ConfigError
from moe_jax.train import workdir
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
