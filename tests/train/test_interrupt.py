"""Signals, in real processes: noted, acted on at a step boundary, and a way out in a hurry."""

import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from moe_jax.train.interrupt import Interrupts, exit_code

LOOP = """
import sys, time
from moe_jax.train.interrupt import Interrupts, exit_code
with Interrupts() as interrupts:
    print("ready", flush=True)
    for step in range(1, 10000):
        if sys.argv[1] == "hang":
            time.sleep(60)
        time.sleep(0.01)
        if signum := interrupts.agreed(step):
            print("saved", flush=True)
            sys.exit(exit_code(signum))
"""


def start(mode="run"):
    child = subprocess.Popen([sys.executable, "-c", LOOP, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_and_exits(signum, code):
    child = start()
    child.send_signal(signum)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (code, "saved\n")
    assert f"{signum.name}: stopping after this step" in err and "Traceback" not in err


def test_second_sigint_exits_at_once_without_saving():
    child = start("hang")
    # SIGTERM first: it must not be taken for a first SIGINT. Signals of one kind merge until handled, hence
    # the waits.
    for signum in (signal.SIGTERM, signal.SIGINT):
        child.send_signal(signum)
        while signum.name not in child.stderr.readline():
            assert child.poll() is None
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_handlers_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyError), Interrupts() as interrupts:
        assert signal.getsignal(signal.SIGTERM) == interrupts._note
        raise KeyError
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_first_signal_counts():
    with Interrupts() as interrupts:
        assert interrupts.agreed(1) == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert exit_code(interrupts.agreed(2)) == 143


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def body():
        with Interrupts() as interrupts:
            seen.append((signal.getsignal(signal.SIGINT), interrupts.agreed(1)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


def test_several_processes_take_the_largest_flag_at_common_steps(monkeypatch):
    asked = []

    def allgather(flag):
        asked.append(int(flag))
        return np.array([[0], [signal.SIGTERM], [flag]])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    interrupts = Interrupts(every=4)
    assert [interrupts.agreed(step) for step in (1, 2, 3, 4)] == [0, 0, 0, signal.SIGTERM]
    assert asked == [0]
