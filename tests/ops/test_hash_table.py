import time

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.hash_table import balanced_hash_table, distinct_hash_table, random_hash_table

V, E = 1000, 8
PINNED_RANDOM = [6, 3, 6, 5, 0, 7, 6, 6, 1, 3, 2, 7]
PINNED_DISTINCT = [[27, 15, 31, 26, 3, 39], [26, 28, 4, 17, 14, 37]]
PINNED_BALANCED = [0, 1, 2, 1, 2, 0]


def zipf(vocab_size=V):
    """A histogram of frequency 1 / rank in shuffled order, with a tail of zeros."""
    counts = 20 * vocab_size // np.arange(1, vocab_size + 1)
    counts[-vocab_size // 5 :] = 0
    return np.random.default_rng(0).permutation(counts)


def loads(table, counts, experts=E):
    return np.bincount(table, weights=counts, minlength=experts)


def test_random():
    """Pinned: a table is part of a trained model, so the same seed must give it everywhere and for ever."""
    table = random_hash_table(V, E, 42)
    assert table.dtype == np.int32 and table.shape == (V,) and set(table) == set(range(E))
    assert table[:12].tolist() == PINNED_RANDOM
    np.testing.assert_array_equal(table, random_hash_table(V, E, 42))
    np.testing.assert_array_equal(table[:100], random_hash_table(100, E, 42))
    assert np.mean(table == random_hash_table(V, E, 43)) < 0.25
    # Uniform: within 5 standard deviations in each bin.
    share = np.bincount(random_hash_table(64_000, 7, 0), minlength=7) / 64_000
    np.testing.assert_allclose(share, 1 / 7, atol=5 * np.sqrt(6 / 49 / 64_000))
    np.testing.assert_array_equal(random_hash_table(5, 1, 0), 0)


def test_distinct():
    """Pinned as the random one; different experts in a row, each equally often; all of them where all are drawn."""
    table = distinct_hash_table(V, 40, 6, 42)
    assert table.dtype == np.int32 and table[:2].tolist() == PINNED_DISTINCT
    np.testing.assert_array_equal(table[:100], distinct_hash_table(100, 40, 6, 42))
    assert all(len(set(row)) == 6 for row in table.tolist())
    # Each in a row with probability 6 / 40: within 5 standard deviations.
    share = np.bincount(table.ravel(), minlength=40) / V
    np.testing.assert_allclose(share, 6 / 40, atol=5 * np.sqrt(6 / 40 * 34 / 40 / V))
    np.testing.assert_array_equal(np.sort(distinct_hash_table(9, 5, 5, 0)), np.tile(np.arange(5), (9, 1)))
    assert distinct_hash_table(50, 2**30, 4, 0).max() > 2**29
    with pytest.raises(ValueError, match="draws=6: at most the 5 experts"):
        distinct_hash_table(9, 5, 6, 0)


@pytest.mark.parametrize("seed", range(5))
def test_balanced_is_more_even_than_random(seed):
    """Where one token exceeds an even share its count is the largest load; else the loads differ by 1 at most."""
    counts = zipf()
    assert counts.max() * E > counts.sum()
    balanced, drawn = loads(balanced_hash_table(counts, E, seed), counts), loads(random_hash_table(V, E, seed), counts)
    assert balanced.max() <= drawn.max() and balanced.max() == counts.max()
    flat = np.minimum(counts, 500)
    even = loads(balanced_hash_table(flat, E, seed), flat)
    assert even.max() - even.min() <= 1 < np.ptp(loads(random_hash_table(V, E, seed), flat))


def test_balanced_is_greedy():
    """Against the definition, token by token."""
    counts = np.random.default_rng(1).permutation(np.arange(1, 40) ** 2)  # no ties between tokens
    table, load = balanced_hash_table(counts, 5, 0), np.zeros(5, int)
    for token in np.argsort(-counts):
        assert load[table[token]] == load.min()
        load[table[token]] += counts[token]


def test_balanced_table_and_seed():
    counts = zipf()
    table = balanced_hash_table(counts, E, 42)
    assert table.dtype == np.int32 and table.shape == (V,) and set(table) == set(range(E))
    assert balanced_hash_table([3, 3, 3, 1, 0, 0], 3, 42).tolist() == PINNED_BALANCED
    np.testing.assert_array_equal(table, balanced_hash_table(jnp.asarray(counts), E, 42))
    np.testing.assert_array_equal(table, balanced_hash_table(counts.astype(np.float32), E, 42))
    other = balanced_hash_table(counts, E, 43)
    assert np.mean(table == other) < 0.5
    np.testing.assert_array_equal(np.sort(loads(other, counts)), np.sort(loads(table, counts)))
    np.testing.assert_array_equal(balanced_hash_table(counts, 1, 0), 0)


@pytest.mark.parametrize("counts", [zipf(), np.zeros(V), np.where(np.arange(V) == 3, 10**9, 0)])
def test_tokens_never_seen_are_spread(counts):
    unseen = balanced_hash_table(counts, E, 0)[np.asarray(counts) == 0]
    assert np.ptp(np.bincount(unseen, minlength=E)) <= 1


def test_a_large_vocabulary_takes_seconds():
    start = time.process_time()
    table = balanced_hash_table(zipf(2**20), 64, 0)
    assert time.process_time() - start < 10  # about 1 on a free core
    assert table.shape == (2**20,)


@pytest.mark.parametrize("counts", [[[1, 2]], [1, -1], [1.0, np.nan], [np.inf, 1.0], [0.5], 3])
def test_bad_counts_are_refused(counts):
    with pytest.raises(ValueError, match="whole numbers >= 0"):
        balanced_hash_table(counts, 2, 0)
