"""The order of runs that need each other, without processes."""

import pathlib

import pytest

from moe_jax.study.schedule import Job, Schedule, chain_seconds


def job(name, seconds=1.0, *after):
    return Job(name, [], pathlib.Path(name), 1, seconds, after)


def names(schedule):
    """All that can start now."""
    found = []
    while one := schedule.pop():
        found.append(one.name)
    return found


FAMILY = [job("tuned", 2.0, "upcycled"), job("long", 6.0), job("upcycled", 3.0, "dense"), job("dense", 4.0), job("short", 1.0)]


def test_chains():
    assert chain_seconds(FAMILY) == {"tuned": 2, "long": 6, "upcycled": 5, "dense": 9, "short": 1}
    both = [job("a", 1.0), job("b", 5.0), job("c", 2.0, "a", "b"), job("d", 4.0, "a")]
    assert chain_seconds(both) == {"a": 5, "b": 7, "c": 2, "d": 4}


@pytest.mark.parametrize("parallel, first", [(1, ["long", "dense", "short"]), (2, ["dense", "long", "short"])])
def test_order(parallel, first):
    """One at a time the order is kept; side by side the longest chain is first. Each waits for what it needs."""
    schedule = Schedule(FAMILY, parallel)
    assert names(schedule) == first and len(schedule) == 2
    for done, free in (("long", []), ("dense", ["upcycled"]), ("short", []), ("upcycled", ["tuned"])):
        schedule.succeeded(next(job for job in FAMILY if job.name == done))
        assert names(schedule) == free
    assert not schedule


def test_two_needs():
    a, b, c = job("a"), job("b"), job("c", 1.0, "a", "b")
    schedule = Schedule([c, a, b])
    assert names(schedule) == ["a", "b"]
    schedule.succeeded(b)
    assert names(schedule) == []
    schedule.succeeded(a)
    assert names(schedule) == ["c"]


def test_what_is_not_there_was_done_before():
    assert names(Schedule([job("upcycled", 3.0, "dense"), job("tuned", 1.0, "upcycled")])) == ["upcycled"]


def test_failures_reach_all_that_follow():
    schedule = Schedule(FAMILY)
    assert names(schedule) == ["long", "dense", "short"]
    tuned, _, upcycled, dense, short = FAMILY
    assert schedule.failed(short) == []
    assert schedule.failed(dense) == [(upcycled, dense), (tuned, upcycled)]
    assert not schedule and names(schedule) == []


def test_a_run_that_two_failures_reach_is_lost_once():
    a, b, c, d = job("a"), job("b", 1.0, "a"), job("c", 1.0, "a"), job("d", 1.0, "b", "c")
    schedule = Schedule([a, b, c, d])
    assert schedule.pop() == a
    assert schedule.failed(a) == [(b, a), (c, a), (d, b)]


@pytest.mark.parametrize(
    "jobs, circle",
    [
        ([job("a", 1.0, "a")], "a after a"),
        ([job("x"), job("a", 1.0, "c", "x"), job("b", 1.0, "a"), job("c", 1.0, "b")], "c after b after a after c"),
    ],
)
def test_a_circle(jobs, circle):
    with pytest.raises(ValueError, match=f"jobs: wait for each other: {circle}"):
        Schedule(jobs)
