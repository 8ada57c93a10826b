"""The facts against hand-computed tables and loops."""

import collections
import math

import numpy as np
import pytest

from moe_jax.report.routing_facts import (
    changed_labels,
    churn,
    co_activation,
    contingency,
    entropy,
    independent_pairs,
    information,
    lift,
    most_specific,
    mutual_information,
    pair_lift,
)

T, N = 300, 6


def example(seed=0):
    """Labels of 20 kinds and sets of 0 to N experts."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 20, T)
    chosen = rng.random((T, N)) < 0.1 + 0.6 * ((labels[:, None] + np.arange(N)) % 3 == 0)
    return labels * 7 - 3, chosen


def one_hot(experts):
    return np.eye(N, dtype=bool)[experts]


def test_mutual_information_of_a_table_by_hand():
    """p = 1/2 1/4 / 0 1/4: H(row) = 0.811278, H(column) = 1, H(both) = 1.5 bits."""
    counts = np.array([[2, 1], [0, 1]])
    rows = 0.75 * math.log2(4 / 3) + 0.25 * 2
    assert mutual_information(counts) == pytest.approx(rows + 1 - 1.5, abs=1e-12)
    assert mutual_information(counts) == pytest.approx(0.311278, abs=1e-6)
    assert entropy(counts) == pytest.approx(1.5, abs=1e-12)
    assert mutual_information(np.array([[4, 4], [1, 1]])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.diag([1, 1, 1, 1])) == pytest.approx(2, abs=1e-12)
    assert mutual_information(np.zeros((3, 2), int)) == entropy(np.zeros(4)) == 0


@pytest.mark.smoke
def test_mutual_information_against_a_loop():
    counts = contingency(*example())[1]
    p = counts / counts.sum()
    total = sum(p[i, j] * math.log2(p[i, j] / (p[i].sum() * p[:, j].sum())) for i, j in np.argwhere(p > 0))
    assert mutual_information(counts) == pytest.approx(total, abs=1e-12) and total > 0.1


def test_contingency_against_a_loop():
    labels, chosen = example()
    names, counts = contingency(labels, chosen)
    assert names.tolist() == sorted(set(labels.tolist()))
    for row, name in enumerate(names):
        assert counts[row].tolist() == sum(chosen[t].astype(int) for t in range(T) if labels[t] == name).tolist()
    assert contingency(np.zeros(0, int), np.zeros((0, N), bool))[1].shape == (0, N)


def test_information_of_labels_that_decide_and_that_say_nothing():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 60, 2000)
    sure = information(labels, one_hot(labels % N))
    assert sure.bits == pytest.approx(sure.entropy, abs=1e-12) == sure.ceiling
    assert sure.share == pytest.approx(1, abs=1e-12) and sure.entropy == pytest.approx(math.log2(6), abs=0.01)
    # (rows - 1) (columns - 1) / (2 T ln 2) bits are there by chance: 59 * 5 / 2773 = 0.106.
    empty = information(labels, one_hot(rng.integers(0, N, 2000)))
    assert empty.bits == pytest.approx(0.106, rel=0.2) and empty.chance == pytest.approx(0.106, rel=0.2)
    assert abs(empty.share) < 0.02


def test_information_with_two_experts_a_token():
    """Labels that decide the pair: the drawn one of the two stays open, 1 bit."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 9, 1000)
    pairs = one_hot(labels % 3) | one_hot(3 + labels % 3)
    result = information(labels, pairs)
    assert result.bits == pytest.approx(result.entropy - 1, abs=1e-9) == result.ceiling
    assert result.share == pytest.approx(1, abs=1e-9)


def test_information_without_room():
    one = information(np.arange(50) % 5, np.ones((50, 1), bool))
    assert one.bits == one.entropy == one.ceiling == 0 and math.isnan(one.share)
    unique = information(np.arange(50), one_hot(np.arange(50) % N))  # every label once: chance explains all
    assert unique.bits == pytest.approx(unique.chance, abs=1e-12) and math.isnan(unique.share)
    assert math.isnan(information(np.zeros(0, int), np.zeros((0, N), bool)).share)


def test_lift_and_the_most_specific_against_loops():
    counts = contingency(*example())[1]
    counts[:, 2] = 0  # an expert without a token
    prior, minimum = 3.0, 4
    score = np.zeros(counts.shape)
    for i, j in np.ndindex(counts.shape):
        share = counts[:, j].sum() / counts.sum()
        if share:
            score[i, j] = (counts[i, j] + prior * share) / (counts[i].sum() + prior) / share
    np.testing.assert_allclose(lift(counts, prior), score, rtol=1e-12)
    found = most_specific(counts, 4, minimum=minimum, prior=prior)
    for j in range(N):
        wanted = [i for i in range(len(counts)) if counts[i, j] >= minimum and score[i, j] > 1]
        wanted.sort(key=lambda i: (-score[i, j], -counts[i, j], i))
        assert found[j] == wanted[:4]
    assert found[2] == [] and all(len(rows) == 4 for j, rows in enumerate(found) if j != 2)


def test_a_frequent_piece_comes_before_a_rare_one_of_equal_lift():
    counts = np.array([[5, 0], [900, 2], [300, 700]])
    assert most_specific(counts, 3)[0] == [1, 0]


def test_co_activation_against_a_loop():
    chosen = example()[1]
    pairs = collections.Counter()
    for row in chosen:
        on = np.flatnonzero(row).tolist()
        pairs.update((i, j) for i in on for j in on)
    expected = np.array([[pairs[i, j] for j in range(N)] for i in range(N)])
    np.testing.assert_array_equal(co_activation(chosen), expected)


def test_pairs_of_an_independent_draw_have_a_lift_of_1():
    """Pairs w_i w_j off the diagonal, of uneven experts: the fit finds them again."""
    w = np.array([10.0, 3, 2, 2, 1, 0])
    pairs = np.outer(w, w)
    expected = independent_pairs(pairs)
    off = ~np.eye(N, dtype=bool)
    np.testing.assert_allclose(expected[off], pairs[off], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(expected.sum(axis=1), np.where(off, pairs, 0).sum(axis=1), rtol=1e-6, atol=1e-9)
    ratio = pair_lift(pairs)
    assert np.isnan(np.diag(ratio)).all() and np.isnan(ratio[5]).all()
    np.testing.assert_allclose(ratio[:5, :5][off[:5, :5]], 1, rtol=1e-6)


def test_pairs_that_belong_together():
    """0 with 1 and 2 with 3 alone: of 3 equal partners, one gets all."""
    chosen = np.repeat(np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool), 30, axis=0)
    ratio = pair_lift(co_activation(chosen))
    assert ratio[0, 1] == pytest.approx(3, rel=1e-6) and ratio[0, 2] == ratio[3, 1] == 0


def test_churn_against_a_loop():
    (_, old), (_, new) = example(0), example(3)
    rng = np.random.default_rng(4)
    first, old_first = rng.integers(-1, N, T), rng.integers(-1, N, T)
    result = churn(new, first, old, old_first)
    assert result.sets == sum(set(np.flatnonzero(a)) != set(np.flatnonzero(b)) for a, b in zip(new, old)) / T
    assert result.first == sum(a != b for a, b in zip(first, old_first)) / T
    same = sum(a == b for a in first for b in old_first) / T**2  # every pairing
    assert result.first_by_chance == pytest.approx(1 - same, abs=1e-12)
    assert churn(old, first, old, first)[:2] == (0, 0)


def test_changed_labels_against_a_loop():
    labels, changed = np.array([1] * 40 + [2] * 40 + [3] * 4 + [4] * 6), np.zeros(90, bool)
    changed[[*range(10), *range(40, 70), *range(80, 84)]] = True
    assert changed_labels(labels, changed, 5) == [(2, 30, 40), (1, 10, 40)]  # 3 is rare, 4 did not change
    assert changed_labels(labels, changed, 5, minimum=4, prior=0) == [(3, 4, 4), (2, 30, 40), (1, 10, 40)]
    assert changed_labels(labels, changed, 1) == [(2, 30, 40)]
