"""Intervals against values computed by hand with printed tables of Student's t."""

import math

import pytest

from moe_jax.study.statistics import Interval, first_reached, holm, noise_band, p_value, t_interval, verdict


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


def test_p_values_say_what_intervals_say():
    """Below 0.05 where the interval leaves the hypothesis out; by hand: t = 2 / (1 / sqrt(3)), 2 degrees of freedom."""
    # Two degrees of freedom: p = 1 - t / sqrt(t^2 + 2).
    t = 2 * math.sqrt(3)
    assert p_value([1.0, 2.0, 3.0]) == p_value([-1.0, -2.0, -3.0]) == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-9)
    for values in ([0.1, 0.2, 0.3, 0.15], [-0.1, 0.2, 0.3], [0.01, -0.02, 0.015]):
        found = t_interval(values)
        assert (p_value(values) < 0.05) == (found.low > 0 or found.high < 0)
        for margin in (found.high - 1e-9, found.high + 1e-9):
            assert (p_value(values, margin) < 0.05) == (found.high < margin)
    assert p_value([0.3]) is None and p_value([]) is None
    assert (p_value([0.1] * 3), p_value([0.0] * 3), p_value([0.1] * 3, 0.2), p_value([0.2] * 3, 0.2)) == (0, 1, 0, 1)
    assert p_value([0.5, 0.6, 0.7], 0.1) == 1.0


def test_holm():
    """Worked out by hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04, which may not be below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04]) == [0.04] and holm([]) == [] and holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([None, 0.02]) == [None, 0.04]  # what is missing counts


@pytest.mark.parametrize(
    "difference, band, p, margin, p_margin, expected",
    [
        (Interval(-0.5, -0.6, -0.4, 3), None, 0.2, None, None, "not resolved"),  # the corrected test decides
        (Interval(-0.5, -0.6, -0.4, 3), None, 0.02, 0.1, 0.01, "resolved"),
        (Interval(0.01, -0.01, 0.03, 3), None, 0.3, 0.05, 0.01, "at least as good (margin 0.05)"),
        (Interval(0.02, 0.01, 0.03, 3), None, 0.01, 0.05, 0.01, "resolved, at least as good (margin 0.05)"),
        (Interval(0.01, -0.01, 0.06, 3), None, 0.3, 0.05, 0.08, "not resolved"),
        (Interval(0.01, -0.01, 0.03, 3), 0.02, 0.3, 0.05, 0.01, "at least as good (margin 0.05)"),
        (Interval(0.01, None, None, 1), None, None, 0.05, None, "not resolved (one seed)"),
    ],
)
def test_verdict_of_a_family_and_a_margin(difference, band, p, margin, p_margin, expected):
    assert verdict(difference, band, p, margin, p_margin) == expected
