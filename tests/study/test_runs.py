"""Child processes: side by side, failing, interrupted, orphaned."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_jax.study.runs import Children, last_line, run_jobs, steps_done
from moe_jax.study.schedule import Job

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLAIN = "import time; print('begin', flush=True); time.sleep(0.4); print('end')"
DIVERGES = "import sys; print('step 3'); print('error: 10 steps in a row'); print('more'); sys.exit(1)"
SAVES = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(128 + _[0])
for s in (signal.SIGTERM, signal.SIGINT):
    signal.signal(s, save)
print("ready", flush=True)
time.sleep(60)
"""


def jobs(folder, **scripts):
    return [Job(name, [sys.executable, "-S", "-c", script], folder / name, 10, 5.0) for name, script in scripts.items()]


def run(todo, parallel=1, done=0):
    with Children() as children:
        return run_jobs(todo, parallel, children, done), children.signum


def test_failures_are_counted_and_others_go_on(tmp_path, capfd):
    codes, signum = run(jobs(tmp_path, a=PLAIN, b=DIVERGES, c=PLAIN), done=2)
    assert codes == {"a": 0, "b": 1, "c": 0} and signum == 0
    assert json.loads((tmp_path / "b" / "failed.json").read_text()) == {
        "code": 1,
        "line": "error: 10 steps in a row",
    }
    assert not (tmp_path / "a" / "failed.json").exists() and last_line(tmp_path / "a" / "log.txt") == "end"
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["runs 3/5", "runs 3/5, 1 failed", "runs 4/5, 1 failed"]
    assert "b: exit code 1: error: 10 steps in a row" in lines[1] and "left 00:00" in lines[2]
    # A second try that works takes the note away; the log goes on.
    assert run(jobs(tmp_path, b=PLAIN))[0] == {"b": 0}
    assert not (tmp_path / "b" / "failed.json").exists()
    assert "error" in (tmp_path / "b" / "log.txt").read_text()


@pytest.mark.parametrize("parallel", [1, 2])
def test_side_by_side(tmp_path, parallel):
    times = "import time; print(time.monotonic()); time.sleep(2); print(time.monotonic())"
    assert set(run(jobs(tmp_path, a=times, b=times, c=times), parallel)[0].values()) == {0}
    spans = [tuple(map(float, (tmp_path / n / "log.txt").read_text().split())) for n in "abc"]
    most = max(sum(begin <= start < end for begin, end in spans) for start, _ in spans)
    assert most == parallel


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_side_by_side_each_has_its_own_cores(tmp_path):
    cores = "import os, time; time.sleep(0.5); print(*os.sched_getaffinity(0)); time.sleep(0.5)"
    run(jobs(tmp_path, a=cores, b=cores, c=cores), parallel=2)
    a, b, c = (set(map(int, (tmp_path / n / "log.txt").read_text().split())) for n in "abc")
    assert a | b == os.sched_getaffinity(0) and not a & b and c in (a, b)
    run(jobs(tmp_path, d=cores))
    assert set(map(int, (tmp_path / "d" / "log.txt").read_text().split())) == os.sched_getaffinity(0)


def test_a_run_waits_for_those_that_it_needs(tmp_path, capfd):
    """What needs a run that failed is not run, and says why; what needs that neither; the same jobs try it all again."""
    times = "import time; print(time.monotonic()); time.sleep(0.5); print(time.monotonic())"
    a, b, c, d, e = jobs(tmp_path, a=DIVERGES, b=times, c=times, d=times, e=times)
    todo = [d._replace(after=("b", "gone before")), e._replace(after=("c",)), c._replace(after=("a",)), a, b]
    assert run(todo, parallel=2)[0] == {"a": 1, "b": 0, "d": 0}
    first, second = (tuple(map(float, (tmp_path / name / "log.txt").read_text().split())) for name in "bd")
    assert first[1] < second[0]
    note = lambda name: json.loads((tmp_path / name / "failed.json").read_text())
    assert note("c") == {"code": None, "line": "not run: a failed"}
    assert note("e") == {"code": None, "line": "not run: c was not run"}
    lines = capfd.readouterr().err.splitlines()
    counts = [line.split("  ")[0] for line in lines]
    assert "runs 0/5, 1 failed, 1 not run" in counts and counts[-1] == "runs 2/5, 1 failed, 2 not run"
    assert any("c: not run: a failed" in line for line in lines)
    assert run([job if job.name != "a" else b._replace(name="a", folder=a.folder) for job in todo])[0] == dict.fromkeys(
        "abcde", 0
    )
    assert not list(tmp_path.glob("*/failed.json"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(tmp_path, signum, capfd):
    def interrupt():
        logs = [tmp_path / name / "log.txt" for name in "ab"]
        while not all(log.exists() and "ready" in log.read_text() for log in logs):
            time.sleep(0.05)
        os.kill(os.getpid(), signum)

    threading.Thread(target=interrupt, daemon=True).start()
    previous = signal.getsignal(signum)
    codes, seen = run(jobs(tmp_path, a=SAVES, b=SAVES, c=PLAIN), 2)
    assert codes == {"a": 128 + signum, "b": 128 + signum} and seen == signum  # c has not begun
    assert all("saved" in (tmp_path / name / "log.txt").read_text() for name in "ab")
    assert not (tmp_path / "c").exists() and not (tmp_path / "a" / "failed.json").exists()
    assert "2 running, which save and stop" in capfd.readouterr().err
    assert signal.getsignal(signum) == previous


def test_a_killed_child(tmp_path):
    codes, _ = run(jobs(tmp_path, a="import os; os.kill(os.getpid(), 9)"))
    assert codes == {"a": 137} and json.loads((tmp_path / "a" / "failed.json").read_text())["code"] == 137


def test_an_orphan_stops(tmp_path):
    """As after a `kill -9` of the command: the run is asked to save."""
    orphan = f"""
import os, signal, sys, threading, time
from moe_jax.study.child import _follow_parent
signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / "saved")!r}, "w").close(), os._exit(0)))
threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {orphan!r}])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    for _ in range(200):
        if (tmp_path / "saved").exists():
            return
        time.sleep(0.05)
    raise AssertionError("it goes on without its parent")


def test_steps_done(tmp_path):
    assert steps_done(tmp_path) == 0
    rows = "".join(json.dumps({"step": step, "load": [0.125] * 5000}) + "\n" for step in range(1, 30))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 30, "lo')
    assert steps_done(tmp_path) == 30
