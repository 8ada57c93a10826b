"""Intervals against values computed by hand with printed tables of Student's t."""

import math

import pytest

from moe_jax.study.statistics import Interval, first_reached, noise_band, t_interval, verdict


@pytest.mark.smoke
@pytest.mark.parametrize(
    "values, mean, half",
    [
        ([1.0, 3.0], 2.0, 12.706204736),  # s = sqrt(2), s / sqrt(2) = 1, t(1) = 12.7062
        ([1.0, 2.0, 3.0], 2.0, 4.302652730 / math.sqrt(3)),  # s = 1, t(2) = 4.30265
        (
            [-1.0, 0.0, 1.0, 4.0],
            1.0,
            3.182446305 * math.sqrt(14 / 3) / 2,
        ),  # squares 4 + 1 + 0 + 9, t(3) = 3.18245
    ],
)
def test_by_hand(values, mean, half):
    found = t_interval(values)
    assert found.n == len(values)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-9)


def test_another_confidence():
    assert t_interval([1.0, 3.0], 0.9).high == pytest.approx(2 + 6.313751515, rel=1e-9)


def test_few_and_equal():
    assert t_interval([]) is None
    assert t_interval([0.1]) == Interval(0.1, None, None, 1)
    assert t_interval([0.1] * 3) == Interval(0.1, 0.1, 0.1, 3)


def test_band():
    assert noise_band([]) is None and noise_band([Interval(0.1, None, None, 1)]) is None
    assert noise_band([Interval(0.0, -0.3, 0.2, 2), Interval(0.1, 0.05, 0.25, 2)]) == 0.3


@pytest.mark.parametrize(
    "difference, band, expected",
    [
        (None, None, "no pair"),
        (Interval(-0.5, None, None, 1), None, "not resolved (one seed)"),
        (Interval(-0.5, -0.6, -0.4, 3), None, "resolved"),
        (Interval(0.5, 0.4, 0.6, 3), 0.1, "resolved"),
        (Interval(0.5, -0.1, 1.1, 3), 0.1, "not resolved"),
        (Interval(-0.05, -0.06, -0.04, 3), 0.1, "within A/A noise"),  # an interval without 0 is not enough
        (Interval(-0.05, -0.15, 0.05, 3), 0.1, "within A/A noise"),
    ],
)
def test_verdict(difference, band, expected):
    assert verdict(difference, band) == expected


@pytest.mark.parametrize(
    "values, expected",
    [
        ([4.0, 3.0, 2.0], 15.0),  # halfway from 3 to 2 = from 10 to 20
        ([2.5, 2.0, 1.0], 5.0),  # before the first point is not known
        ([3.0, 2.75, 2.6], None),
        ([4.0, 2.5, 3.0], 10.0),  # the first time, also where it leaves again
        ([4.0, None, 2.0], 20.0),  # not joined over a gap
        ([math.nan, math.inf, 1.0], 20.0),
    ],
)
def test_first_reached(values, expected):
    assert first_reached([5, 10, 20], values, 2.5) == expected
