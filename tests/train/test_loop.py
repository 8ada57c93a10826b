"""The loop and what is around it, without a model: signals, limits, profiles, damage."""

import contextlib
import signal
import types

import jax
import numpy as np
import pytest
from etils import epath

from moe_jax.config import ConfigError
from moe_jax.train import loop
from moe_jax.train.checkpoint import DamagedCheckpointError
from moe_jax.train.interrupt import Interrupts
from moe_jax.train.reporter import Profile, Reporter
from moe_jax.train.workdir import own_workdir
from tests.train.small import make_config
from tests.train.states import save_run

TERM = int(signal.SIGTERM)


@pytest.fixture(autouse=True)
def no_log(monkeypatch):
    monkeypatch.setattr(loop, "show_log", lambda: None)
    monkeypatch.setattr(loop, "start_devices", lambda mesh: None)


class Loop(loop.Trainer):
    """A trainer whose step gives the metrics it is told; `events` is what happened, in order."""

    def __init__(self, config, workdir, skipped=lambda step: 0, signals=(), saved=(1,)):
        self.config, self.folder, self.mesh, self.step, self.state = config, epath.Path(workdir), None, 0, None
        self.frozen, self.recorder = 0, None
        self.events, self.lines, self.skipped, self.signals = [], [], skipped, signals
        self.curriculum = None
        self.checkpoints = types.SimpleNamespace(wait=lambda: self.note("wait"), steps=lambda: saved)

    def note(self, event):
        self.events.append(f"{event} {self.step}")

    def save(self):
        self.note("save")

    def evaluate(self, writer, bar):
        self.note("evaluate")

    def go(self, monkeypatch):
        monkeypatch.setattr(loop, "put_batch", lambda batch, mesh, size: batch)
        steps = iter(range(self.step + 1, 100))

        def compiled(state, batch):
            number = next(steps)
            if number in self.signals:
                signal.raise_signal(signal.SIGTERM)
            return state, {"skipped_in_row": self.skipped(number), "loss": 1.0, "frozen": 0}

        reporter = types.SimpleNamespace(
            start=lambda: None,
            log=lambda step, metrics: None,
            writer=None,
            inside_step=contextlib.nullcontext,
            outside=contextlib.nullcontext,
            bar=types.SimpleNamespace(write=self.lines.append, update=lambda step: None),
        )
        with Interrupts() as interrupts, Profile(self.config.train.profile_steps, self.folder) as profile:
            return self._loop(compiled, iter(lambda: {}, 0), interrupts, reporter, profile)


def small(**train):
    defaults = {"steps": 6, "log_every": 100, "eval_every": 2, "checkpoint_every": 4, "max_skipped": 3}
    return make_config(**{f"train__{name}": value for name, value in (defaults | train).items()})


def test_evaluates_saves_and_ends(monkeypatch, tmp_path):
    run = Loop(small(), tmp_path)
    assert run.go(monkeypatch) == 0
    assert run.events == ["evaluate 2", "evaluate 4", "save 4", "evaluate 6", "save 6", "wait 6"]


def test_steps_to_keep_are_saved(monkeypatch, tmp_path):
    run = Loop(small(keep_steps="5,3", eval_every=0), tmp_path)
    assert run.go(monkeypatch) == 0
    assert run.events == ["save 3", "save 4", "save 5", "evaluate 6", "save 6", "wait 6"]


def test_a_signal_saves_before_an_evaluation(monkeypatch, tmp_path):
    run = Loop(small(), tmp_path, signals=(2,))
    assert run.go(monkeypatch) == 128 + TERM
    assert run.events == ["save 2", "wait 2", "evaluate 2"] and "saved step 2" in run.lines[0]


@pytest.mark.parametrize("first, stops_at", [(2, 4), (4, 6), (5, None)])
def test_the_last_steps_skips_count_too(monkeypatch, tmp_path, first, stops_at):
    run = Loop(small(), tmp_path, skipped=lambda step: max(step - first + 1, 0))
    assert run.go(monkeypatch) == (1 if stops_at else 0)
    if stops_at:
        assert f"3 steps in a row up to step {stops_at} had" in run.lines[0]
        assert f"start in another --workdir with a lower optimizer.learning_rate and init.checkpoint={tmp_path}" in run.lines[0]
        assert "save 6" not in run.events


def test_without_a_checkpoint_the_rate_may_be_lowered(monkeypatch, tmp_path):
    run = Loop(small(), tmp_path, skipped=lambda step: step, saved=())
    assert run.go(monkeypatch) == 1 and "gradient; lower optimizer.learning_rate, or raise" in run.lines[0]


@pytest.mark.parametrize(
    "start, steps, signals, expected",
    [
        (0, "3:5", (), ["start 2", "stop 4"]),
        (2, "3:6", (), ["start 2", "stop 5"]),
        (3, "3:6", (), ["start 3", "stop 5"]),
        (5, "3:6", (), []),
        (0, "3:7", (), ["start 2", "stop 6"]),
        (0, "3:6", (3,), ["start 2", "stop 3"]),
        (0, "", (), []),
    ],
)
def test_a_trace_is_stopped_where_one_was_started(monkeypatch, tmp_path, start, steps, signals, expected):
    run, calls = Loop(small(profile_steps=steps), tmp_path, signals=signals), []
    run.step = start
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start {run.step}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(f"stop {run.step}"))
    run.go(monkeypatch)
    assert calls == expected


def test_time_inside_and_outside_the_step(monkeypatch):
    """In ten seconds two steps take four, an evaluation three, and what is between them the rest."""
    now, rows = [100.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    writer = types.SimpleNamespace(write=lambda step, row: rows.append(row))
    bar = types.SimpleNamespace(update=lambda *args: None)
    reporter = Reporter(small(peak_tflops=1.0), 96, 0, writer, bar)
    wait(50.0)  # such as for the compilation
    reporter.start()
    for _ in range(2):
        wait(1.5)
        with reporter.inside_step():
            wait(2.0)
    with pytest.raises(KeyError), reporter.outside():
        wait(3.0)
        raise KeyError
    metrics = dict.fromkeys(("loss", "gradient_norm", "learning_rate", "skipped"), 0.0)
    reporter.log(2, metrics | {"losses": {}, "stats": {"groups": {}}})
    assert rows[0]["tokens_per_second"] == pytest.approx(2 * reporter.tokens_per_step / 7)
    assert rows[0]["step_share"] == pytest.approx(4 / 7)


class Begun(Exception):
    """The run got as far as reading its text."""


def fit(monkeypatch, workdir, train=None, steps=2):
    """`loop.fit`, whose run is `train()`; None: it ends with `Begun` where it would read the text."""

    def read(*args, **options):
        raise Begun

    monkeypatch.setattr(loop, "open_data", read)
    with monkeypatch.context() as patch:
        if train:
            patch.setattr(loop, "train", lambda *args: train())
        return loop.fit(small(steps=steps), str(workdir))


def test_a_signal_after_the_last_step_is_not_lost(monkeypatch, tmp_path, capsys):
    def interrupted():
        signal.raise_signal(signal.SIGTERM)
        return 0

    assert fit(monkeypatch, tmp_path, interrupted) == 128 + TERM
    assert "all steps are done and saved" in capsys.readouterr().err
    assert fit(monkeypatch, tmp_path, lambda: 0) == 0


@pytest.mark.parametrize("field", ["--workdir", "init.checkpoint"])
def test_damage_is_one_line(monkeypatch, tmp_path, field):
    def damaged():
        raise DamagedCheckpointError("none of steps [3] can be read", field, "runs/a")

    name = field if field.startswith("-") else f"config.{field}"
    line = rf"^{name}=runs/a: none of steps \[3\] can be read; .* another {field.removeprefix('--')}$"
    with pytest.raises(ConfigError, match=line):
        fit(monkeypatch, tmp_path, damaged)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_complete_only_if_the_last_description_can_be_read(monkeypatch, tmp_path, damaged, capsys):
    save_run(tmp_path, small(steps=2), (1, 2))
    if damaged:
        next((tmp_path / "checkpoints" / "2" / "meta").rglob("metadata")).write_text("{}")
        with pytest.raises(Begun):
            fit(monkeypatch, tmp_path)
    else:
        assert fit(monkeypatch, tmp_path) == 0
    assert ("complete" in capsys.readouterr().err) != damaged


def test_one_run_at_a_time(monkeypatch, tmp_path):
    with own_workdir(tmp_path / "run"):
        with pytest.raises(ConfigError, match="--workdir=.*run: another run is writing there; "):
            fit(monkeypatch, tmp_path / "run", lambda: 0)
        with own_workdir(tmp_path / "other"):
            pass
    assert fit(monkeypatch, tmp_path / "run", lambda: 7) == 7


def test_a_workdir_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in ("/proc/x/run", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match="--workdir=.*name a folder that can be written"):
            fit(monkeypatch, workdir, lambda: 0)


@pytest.mark.parametrize("asked", [1, 2])
def test_a_signal_before_the_first_step(tmp_path, asked, monkeypatch, capsys):
    """`asked`: before or after the compilation."""
    events = []

    class Asked:
        def agreed(self, step):
            events.append(step)
            return TERM if events.count(0) == asked else 0

    run = Loop(small(), tmp_path)
    run.state, run.mesh = {"params": {}}, types.SimpleNamespace(shape={"data": 8})
    data = types.SimpleNamespace(train_tokens=1, train_batch=lambda *args: np.zeros(1))
    monkeypatch.setattr(loop, "local_rows", lambda *args: None)
    monkeypatch.setattr(loop, "put_batch", lambda *args: None)
    run.data, run.compile = data, lambda batch: events.append("compiled")
    assert run.run(Asked()) == 128 + TERM
    assert events == [0, "compiled", 0][: 2 * asked - 1] and "before the first step" in capsys.readouterr().err
