"""Which run of a study comes next: a graph of jobs, each after those that it needs."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple


class Job(NamedTuple):
    """A run to do: `command` in `folder`, of `steps` steps that are expected to take `seconds` in all.

    after: the names of jobs that must succeed before this one starts; those that are not in its schedule have done so before.
    first: how many of the steps are another run's, from which this one goes on.
    """

    name: str
    command: list[str]
    folder: pathlib.Path
    steps: int
    seconds: float
    after: tuple[str, ...] = ()
    first: int = 0


class Schedule:
    """The jobs that wait. A job starts once all that it comes after have succeeded, and never if one of them fails.

    Args:
      jobs: with different names.
      parallel: how many run at once. One at a time, they keep their order as far as they can; with more, those first that the
        longest chain of seconds begins with, so that no long chain is left for the end.

    Raises:
      ValueError: jobs that wait for each other.
    """

    def __init__(self, jobs: Sequence[Job], parallel: int = 1):
        self._open = {job.name for job in jobs}  # not yet succeeded
        chains = chain_seconds(jobs)
        # Python's sort keeps the order of equal ones.
        self._waiting = sorted(jobs, key=lambda job: -chains[job.name]) if parallel > 1 else list(jobs)

    def __len__(self):
        return len(self._waiting)

    def pop(self) -> Job | None:
        """The job to start now; None while all that wait need others."""
        for job in self._waiting:
            if not self._open.intersection(job.after):
                self._waiting.remove(job)
                return job
        return None

    def succeeded(self, job: Job) -> None:
        """Frees the jobs that only waited for this one."""
        self._open.discard(job.name)

    def failed(self, job: Job) -> list[tuple[Job, Job]]:
        """Takes out the jobs that can never start; returns each with the job that it waits for, in the order to report."""
        lost, missing = [], [job]
        for needed in missing:
            for other in [other for other in self._waiting if needed.name in other.after]:
                self._waiting.remove(other)
                lost.append((other, needed))
                missing.append(other)
        return lost


def chain_seconds(jobs: Sequence[Job]) -> dict[str, float]:
    """For each job by name, its seconds and those of the longest chain of jobs that follow from it.

    Raises:
      ValueError: jobs that wait for each other.
    """
    following = {job.name: [other for other in jobs if job.name in other.after] for job in jobs}
    found, path = {}, []

    def visit(job: Job) -> float:
        if job.name in path:
            circle = " after ".join([*path[path.index(job.name) :][::-1], path[-1]])
            raise ValueError(f"jobs: wait for each other: {circle}")
        if job.name not in found:
            path.append(job.name)
            found[job.name] = job.seconds + max(map(visit, following[job.name]), default=0.0)
            path.pop()
        return found[job.name]

    for job in jobs:
        visit(job)
    return found
