"""The trainer as a user runs it: real processes, killed and resumed."""

import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_jax.config.load import load_saved_config
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.metrics import read_metrics
from moe_jax.train.restore import load_run
from moe_jax.train.state import abstract_state

ROOT = pathlib.Path(__file__).resolve().parents[1]

CONFIG = """
from moe_jax import config as c


def get_config():
    config = c.Config()
    config.data = c.DataConfig(
        sources=(c.SourceConfig(name="numbers", files="{files}", document="paragraph"),),
        tokenizer="bytes", sequence_length=32, batch_size=16, held_out_percent=10.0, cache_dir="{cache}",
    )
    config.model.layers, config.model.width, config.model.ffn_width = 2, 16, 32
    config.model.moe.routers.top_k.bias_rate = 0.01
    config.optimizer.warmup_steps = 3
    t = config.train
    t.steps, t.log_every, t.eval_every, t.checkpoint_every, t.eval_batches, t.tensorboard = 30, 1, 15, 13, 2, False
    return config
"""

# Runs train.py, but the process kills itself, as `kill -9` does, once step KILL_AT is done and all that was saved is
# on disk.
KILLED = """
import os, runpy, signal, sys
from moe_jax.train import loop

log = loop.Reporter.log

def kill_after(self, step, metrics):
    log(self, step, metrics)
    if step == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)

save = loop.Trainer.save

def save_and_wait(self):
    save(self)
    self.checkpoints.wait()

loop.Reporter.log, loop.Trainer.save = kill_after, save_and_wait
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    rng = np.random.default_rng(0)
    paragraphs = [" ".join(str(a + i * b) for i in range(12)) for a, b in rng.integers(1, 50, (400, 2))]
    (folder / "numbers.txt").write_text("\n\n".join(paragraphs))
    path = folder / "config.py"
    path.write_text(CONFIG.format(files=folder / "numbers.txt", cache=folder / "cache"))
    return path


def start(config_file, workdir, *flags, driver=None, **env):
    """A train.py process."""
    command = [sys.executable] + (["-c", driver] if driver else [])
    command += [str(ROOT / "train.py"), f"--config={config_file}", f"--workdir={workdir}", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def train(*args, expect=0, **options):
    """Runs train.py to its end and returns its stderr."""
    process = start(*args, **options)
    _, err = process.communicate(timeout=500)
    assert process.returncode == expect, err
    return err


def logged(workdir):
    """{step: loss} of the training rows, as their exact bits."""
    return {row["step"]: float(row["loss"]).hex() for row in read_metrics(workdir) if "loss" in row}


def state_hash(workdir) -> str:
    """sha256 of the newest checkpoint's whole state, gathered."""
    config = load_saved_config(workdir)
    config.mesh.cpu_devices, config.mesh.expert, config.mesh.fsdp, config.mesh.tensor, config.mesh.data = (
        0,
        1,
        1,
        1,
        -1,
    )
    run = load_run(workdir, config)
    target = abstract_state(run.model, config, run.mesh)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        state = jax.device_get(checkpoints.restore(target).state)
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


MESHES = {
    1: ("--config.mesh.cpu_devices=1",),
    8: ("--config.mesh.cpu_devices=8", "--config.mesh.expert=4", "--config.mesh.tensor=2"),
}


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(config_file, tmp_path, devices):
    """30 steps = 13 steps, kill -9 during step 18, resume from 13, 17 steps: every loss and the final state."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # On one device the three compile the step once, which is most of their time; on eight each compiles it for itself.
    once = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")} if devices == 1 else {}
    train(config_file, whole, *MESHES[devices], **once)
    train(config_file, parts, *MESHES[devices], driver=KILLED, KILL_AT="18", expect=-signal.SIGKILL, **once)
    assert max(logged(parts)) == 18
    err = train(config_file, parts, *MESHES[devices], **once)
    assert "resumed at step 13" in err
    assert logged(parts) == logged(whole) and sorted(logged(whole)) == list(range(1, 31))
    assert state_hash(parts) == state_hash(whole)


@pytest.mark.slow
def test_what_may_change_on_resume(config_file, tmp_path):
    """A complete run says so; other data is refused; more steps on another mesh go on, with a warning."""
    run, eight = tmp_path / "run", "--config.train.steps=8"
    train(config_file, run, eight, *MESHES[1])
    before = logged(run)
    assert "complete" in train(config_file, run, eight, *MESHES[1])
    assert logged(run) == before
    err = train(config_file, run, eight, "--config.data.batch_size=8", "--config.seed=1", expect=2)
    assert err.count("\n") == 1 and "batch_size" in err and "seed" in err
    # The same text in another folder is the same; another text is not, and is named.
    moved = config_file.parent / "moved" / "numbers.txt"
    moved.parent.mkdir(exist_ok=True)
    text = (config_file.parent / "numbers.txt").read_text()
    moved.write_text(text + "\n\n1 2 3 4")
    place = f"--config.data.sources[0].files={moved}"
    err = train(config_file, run, "--config.train.steps=9", place, *MESHES[1], expect=2)
    last = err.splitlines()[-1]
    assert last.startswith("error: config.data.sources[0]=numbers: ") and " is not the checkpoint's: " in last
    moved.write_text(text)
    mesh = ("--config.mesh.cpu_devices=2", "--config.mesh.expert=2")
    # A trace of which only the rest is left to make.
    err = train(config_file, run, *mesh, place, "--config.train.steps=10", "--config.train.profile_steps=7:10")
    assert "warning" in err and "schedule" in err and "resumed at step 8" in err and sorted(logged(run)) == list(range(1, 11))
    assert any(path.is_file() for path in (run / "profile").rglob("*"))


@pytest.mark.parametrize(
    "signum, code",
    [
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.smoke),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_exits(config_file, tmp_path, signum, code):
    flags = ("--config.train.steps=5000", "--config.train.checkpoint_every=0", "--config.train.eval_every=0")
    process = start(config_file, tmp_path / "run", *flags)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "saved step" in err and "Traceback" not in err
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == max(logged(tmp_path / "run"))


@pytest.mark.slow
def test_too_many_non_finite_steps_stop_the_run(config_file, tmp_path):
    flags = (
        "--config.optimizer.learning_rate=1e30",
        "--config.train.max_skipped=4",
        "--config.optimizer.warmup_steps=0",
    )
    err = train(config_file, tmp_path / "run", *flags, expect=1)
    line = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(line) == 1 and "4 steps in a row" in line[0] and "Traceback" not in err


@pytest.mark.slow
def test_starts_from_another_run(config_file, tmp_path):
    train(config_file, tmp_path / "first", "--config.train.steps=5")
    flags = (
        f"--config.init.checkpoint={tmp_path / 'first'}",
        "--config.init.include=embed,stack/groups/block_0",
    )
    err = train(config_file, tmp_path / "second", *flags, "--config.train.steps=5", "--config.model.moe.experts=4")
    assert "stack/groups/block_1/moe/experts/w_in" in err


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


IN_ORDER = ("data.curriculum=mean", "model.moe.router=adaptive", "model.moe.routers.adaptive.target_k=1.5", "train.steps=45")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("train.steps=30",), IN_ORDER], ids=["random order", "curriculum"])
def test_two_processes_train_are_killed_and_resume(config_file, tmp_path, settings):
    """Two processes of two devices each, over gloo, give the losses of one process with four, before and after a kill.

    An order that follows what rows took begins at step 28 of 45, and is made from what all processes report.
    """
    flags = ("--config.mesh.expert=2", "--config.mesh.data=2", *(f"--config.{setting}" for setting in settings))
    train(config_file, tmp_path / "one", *flags, "--config.mesh.cpu_devices=4")

    def pair(expect, **options):
        address = f"localhost:{free_port()}"
        env = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2"}
        both = [
            start(
                config_file,
                tmp_path / "two",
                *flags,
                "--config.mesh.cpu_devices=2",
                PROCESS_ID=str(i),
                **env,
                **options,
            )
            for i in range(2)
        ]
        results = []
        for process in both:
            try:
                results.append((process.communicate(timeout=300)[1], process.returncode))
            finally:
                process.kill()
        for err, code in results:
            assert code in expect, err
        return [err for err, _ in results]

    # One process kills itself; the other is killed likewise, or notices and ends with an error.
    pair(expect=(-signal.SIGKILL, -signal.SIGABRT, 1), driver=KILLED, KILL_AT="18")
    errors = pair(expect=(0,))
    assert "resumed at step 13" in "".join(errors)
    one, two = ([row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert len(two) == int(settings[-1].partition("=")[2])
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.slow
def test_evaluate_and_generate_read_the_run(config_file, tmp_path):
    workdir = tmp_path / "run"
    train(config_file, workdir, "--config.train.steps=5")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def command(*words):
        return subprocess.run([sys.executable, "-m", *words], env=env, capture_output=True, text=True, timeout=300)

    other = tmp_path / "other.txt"
    other.write_text("1 2 3 4\n" * 50)
    result = command("moe_jax.evaluate", f"--workdir={workdir}", f"--source=other={other}", f"--source=again={other}")
    scores = json.loads(result.stdout)
    assert scores["step"] == 5 and set(scores["sources"]) == {"other", "again"}
    assert scores["sources"]["other"]["loss"] == scores["sources"]["again"]["loss"]
    assert scores["sources"]["other"]["bytes"] == 400
    result = command("moe_jax.generate", f"--workdir={workdir}", "--prompt=1 2 ", "--tokens=8")
    assert result.returncode == 0 and result.stdout.startswith("1 2 "), result.stderr
    result = command("moe_jax.evaluate", f"--workdir={tmp_path / 'nothing'}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.shared_data
def test_books_train_and_other_texts_are_separate_rows(shared_data, tmp_path):
    """Novels train; other novels, articles, plays and German captions are evaluated as sources of their own."""
    workdir = tmp_path / "run"
    flags = (
        f"--config.data.sources[0].files={shared_data}/books/train/*.txt",
        "--config.train.steps=10",
        "--config.optimizer.warmup_steps=5",
        "--config.sample.tokens=8",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    train(ROOT / "configs" / "text.py", workdir, *flags)
    texts = {
        "books": "books/heldout/*.txt",
        "wikitext2": "wikitext2/test.txt",
        "shakespeare": "shakespeare/input.txt",
        "captions_de": "multi30k/test_2016_flickr.de",
    }
    sources = [f"--source={name}={shared_data / files}" for name, files in texts.items()]
    command = [sys.executable, "-m", "moe_jax.evaluate", f"--workdir={workdir}", "--batches=2", *sources]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    scores = json.loads(result.stdout)["sources"]
    assert list(scores) == list(texts)
    assert all(0.5 < score["bits_per_byte"] < 8 for score in scores.values())
