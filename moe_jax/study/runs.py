"""The child processes of a study: some at a time, with a bar over all of them; signals are passed on to them."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence

import tqdm

from moe_jax.study.schedule import Job, Schedule
from moe_jax.train.metrics import FILE_NAME, write_whole

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAILED = "failed.json"
LOG = "log.txt"
POLL_SECONDS = 0.1
BAR_SECONDS = 2.0
_STEP = re.compile(rb'^\{"step": (\d+)', re.MULTILINE)


class Children:
    """Context manager around the processes of a study. SIGINT and SIGTERM go to all that run, and no more are started.

    Children have sessions of their own, or a Ctrl-C would reach them twice, which ends a run without saving.

    Attributes:
      signum: the first signal that came; 0: none.
    """

    def __init__(self):
        self.signum, self._running, self._previous = 0, {}, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._pass_on)
        return self

    def __exit__(self, *exception):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        for process in self._running:
            process.terminate()

    def _pass_on(self, signum, frame):
        self.signum = self.signum or int(signum)
        text = f"\n{signal.Signals(signum).name}: {len(self._running)} running, which save and stop\n"
        os.write(2, text.encode())
        for process in self._running:
            process.send_signal(signum)

    def start(self, command: Sequence[str], log=None, cores: Collection[int] = ()) -> subprocess.Popen:
        """Starts a process whose output goes to a file, or to this one's stderr; `cores`: those that it may use, if not all."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        output = sys.stderr.fileno() if log is None else log
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._running[process] = True
        if cores:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process.pid, cores)
        if self.signum:  # it came between the two lines above
            process.send_signal(self.signum)
        return process

    def finished(self, process: subprocess.Popen) -> int | None:
        """The exit code, 130 or 143 if a signal ended it; None while it runs."""
        code = process.poll()
        if code is not None:
            self._running.pop(process, None)
        return 128 - code if code is not None and code < 0 else code

    def wait(self, process: subprocess.Popen) -> int:
        """The exit code, once it is there."""
        while (code := self.finished(process)) is None:
            time.sleep(POLL_SECONDS)
        return code


def shares_of_cores(parallel: int) -> list[list[int]]:
    """Cores for each of `parallel` processes, which would otherwise take turns on all; empty lists: any core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if parallel == 1 or parallel > len(cores):
        return [[]] * parallel
    return [cores[i * len(cores) // parallel : (i + 1) * len(cores) // parallel] for i in range(parallel)]


def run_jobs(jobs: Sequence[Job], parallel: int, children: Children, done: int = 0) -> dict[str, int]:
    """Runs all jobs, `parallel` at a time, and returns the exit codes of those that began.

    A job that fails leaves a failed.json in its folder, with its code and its last line. So does each that comes
    after it and can not start, with the reason and no code. The others go on. After a signal no more start.

    Args:
      jobs: in the order to start them, see `Schedule`.
      parallel: processes at once, each on its share of the cores.
      children: passes signals on.
      done: runs of the study that were finished before, for the bar.
    """
    schedule, running, codes, free = Schedule(jobs, parallel), {}, {}, shares_of_cores(parallel)
    with Bar(jobs, done) as bar, contextlib.ExitStack() as logs:
        while (schedule and not children.signum) or running:
            while len(running) < parallel and not children.signum and (job := schedule.pop()):
                job.folder.mkdir(parents=True, exist_ok=True)
                (job.folder / FAILED).unlink(missing_ok=True)
                log = logs.enter_context(open(job.folder / LOG, "a"))
                cores = free.pop()
                running[children.start(job.command, log, cores)] = job, time.monotonic(), cores
            for process in list(running):
                if (code := children.finished(process)) is not None:
                    job, began, cores = running.pop(process)
                    free.append(cores)
                    codes[job.name] = code
                    bar.finish(job, code, time.monotonic() - began)
                    if code == 0:
                        schedule.succeeded(job)
                    elif not children.signum:
                        note_failure(job, code, last_line(job.folder / LOG))
                        for other, missing in schedule.failed(job):
                            reason = f"not run: {missing.name} {'failed' if missing is job else 'was not run'}"
                            note_failure(other, None, reason)
                            bar.skip(other, reason)
            bar.update([job for job, *_ in running.values()])
            time.sleep(POLL_SECONDS)
    return codes


def note_failure(job: Job, code: int | None, line: str) -> None:
    """Writes failed.json: why a run is not finished. code: None: it did not begin."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_whole(job.folder / FAILED, json.dumps({"code": code, "line": line}))


def last_line(path: pathlib.Path) -> str:
    """The last line of a log that says something, an error where there is one."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-20:] if line.startswith("error: ")]
    return (errors or lines or [""])[-1][-300:]


def steps_done(folder: pathlib.Path) -> int:
    """The last step in a run's metrics; 0: none yet."""
    try:
        with open(folder / FILE_NAME, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 2**17, 0))
            found = _STEP.findall(file.read())
    except OSError:
        return 0
    return int(found[-1]) if found else 0


class Bar:
    """Runs done, failed, not run and the time left, on stderr: a bar on a terminal, elsewhere a line for each run that ends.

    Counted in seconds that the runs are expected to take, which differ from arm to arm; what an earlier command did of
    a run is left out.
    """

    def __init__(self, jobs: Sequence[Job], done: int):
        self.total, self.done, self.failed, self.skipped, self.looked = len(jobs) + done, done, 0, 0, 0.0
        self.first = {job.name: steps_done(job.folder) for job in jobs}
        self.finished, self.live = 0.0, sys.stderr.isatty()
        self.tqdm = tqdm.tqdm(
            total=sum(self._left(job, self.first[job.name]) for job in jobs) or 1.0,
            dynamic_ncols=True,
            file=sys.stderr if self.live else open(os.devnull, "w"),
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]",
        )
        self._describe()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.tqdm.close()
        if not self.live:
            self.tqdm.fp.close()

    def update(self, running: Sequence[Job]) -> None:
        """Looks how far the running jobs are, now and then."""
        if time.monotonic() - self.looked < BAR_SECONDS:
            return
        self.looked = time.monotonic()
        part = sum(self._left(job, self.first[job.name]) - self._left(job, steps_done(job.folder)) for job in running)
        self._move(self.finished + part)

    def finish(self, job: Job, code: int, seconds: float) -> None:
        """Counts a job that ended."""
        self.done += code == 0
        self.failed += code not in (0, 130, 143)
        self.finished += self._left(job, self.first[job.name])
        what = "done" if code == 0 else f"exit code {code}: {last_line(job.folder / LOG)}"
        self._say(f"{job.name}: {what}, {tqdm.tqdm.format_interval(seconds)}")

    def skip(self, job: Job, reason: str) -> None:
        """Counts a job that will not begin."""
        self.skipped += 1
        self.tqdm.total = max(self.tqdm.total - self._left(job, self.first[job.name]), self.finished)
        self._say(f"{job.name}: {reason}")

    def _say(self, line: str) -> None:
        self._describe()
        self._move(self.finished)
        numbers = self.tqdm.format_dict
        rate = numbers["elapsed"] / max(self.finished, 1e-9)
        left = tqdm.tqdm.format_interval(max(self.tqdm.total - self.finished, 0) * rate)
        if self.live:
            self.tqdm.write(line, file=sys.stderr)
        else:
            print(f"{self.tqdm.desc.removesuffix(': ')}  {line}  left {left}", file=sys.stderr, flush=True)

    def _left(self, job: Job, step: int) -> float:
        # A share for starting and for the evaluation at the end, so that a bar at its end has no work behind it.
        return job.seconds * (1 - 0.95 * min(max(step - job.first, 0) / (job.steps - job.first), 1))

    def _describe(self) -> None:
        counts = {"failed": self.failed, "not run": self.skipped}
        others = "".join(f", {count} {name}" for name, count in counts.items() if count)
        self.tqdm.set_description(f"runs {self.done}/{self.total}{others}", refresh=False)

    def _move(self, value: float) -> None:
        self.tqdm.update(max(value - self.tqdm.n, 0))
        self.tqdm.refresh()
