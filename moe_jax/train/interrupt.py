"""SIGTERM and SIGINT: noted when they come, acted on at a step boundary, by all processes together."""

import os
import signal
import threading

import jax
import numpy as np


class Interrupts:
    """Context manager that turns SIGTERM and SIGINT into a flag.

    The first signal is only noted: the loop asks `agreed` at each step boundary, saves and exits with
    `exit_code(signum)`. A second SIGINT exits with 130 at once (SystemExit where the program stands;
    checkpoints are atomic). Outside the main thread, where Python cannot handle signals, nothing is
    installed. Enter it after `jax.distributed.initialize`, which installs a SIGTERM handler of its own.

    Args:
      every: with several processes, agree only at steps divisible by this: each agreement is a collective and
        waits for the step before it. One process looks at its own flag at every step.
    """

    def __init__(self, every: int = 1):
        self.every = every
        self.signum = 0
        self._interrupted = False
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception):
        for signum, handler in self._previous.items():
            # None: the previous handler was not installed from Python and cannot be put back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def agreed(self, step: int) -> int:
        """0, or the signal to stop for: the same on all processes, which all pass the same `step`."""
        if jax.process_count() > 1 and step % self.every:
            return 0
        return largest(self.signum)

    def _note(self, signum, frame):
        if signum == signal.SIGINT and self._interrupted:
            # Whatever unwinds now, such as closing a checkpoint, is left to Python's own handling of Ctrl-C.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise SystemExit(exit_code(signum))
        self._interrupted = self._interrupted or signum == signal.SIGINT
        self.signum = self.signum or int(signum)
        # os.write: print is not safe inside a handler.
        os.write(2, f"\n{signal.Signals(signum).name}: stopping after this step\n".encode())


def largest(value: int) -> int:
    """The largest `value` of all processes, which all call this together."""
    if jax.process_count() == 1:
        return int(value)
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def exit_code(signum: int) -> int:
    """The shell's convention: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signum
