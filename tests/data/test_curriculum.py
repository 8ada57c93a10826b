import grain
import numpy as np
import pytest

from moe_jax.config import ConfigError
from moe_jax.data.curriculum import MARGIN, Curriculum, RandomOrder, order_keys
from moe_jax.data.hashing import hash64
from moe_jax.data.pipeline import READ_AHEAD

B, ROWS, LAYERS = 4, 100, 3


def make(lengths=(ROWS,), weights=(1.0,), rule="mean", buckets=5, seed=0):
    return Curriculum(list(lengths), list(weights), seed, B, LAYERS, rule, buckets)


def needs(source, row):
    """Experts per token of a row in each layer: more in rows of higher numbers."""
    return 1 + 0.9 * row / ROWS + np.asarray([0.0, 0.01, 0.02]) * (source + 1)


def train(curriculum, start, end, noise=None):
    """Reports batches start..end-1 and returns their (source, row)."""
    seen = []
    for batch in range(start, end):
        rows = [curriculum[batch * B + i] for i in range(B)]
        curriculum.report(batch, np.stack([needs(*row) for row in rows]))
        seen += rows
    return seen


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 3.0)])
def test_the_random_order_is_that_of_grain(weights):
    lengths = (50, 70)[: len(weights)]
    parts = [
        grain.MapDataset.range(length).map(lambda row, i=i: (i, row)).shuffle(hash64(f"5/{i}") % 2**32).repeat()
        for i, length in enumerate(lengths)
    ]
    stream = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
    order = RandomOrder(list(lengths), list(weights), 5)
    assert [order[k] for k in range(300)] == [tuple(map(int, stream[k])) for k in range(300)]


def test_the_first_epoch_is_random_and_later_ones_are_ordered():
    curriculum, random = make(), RandomOrder([ROWS], [1.0], 0)
    seen = train(curriculum, 0, 3 * ROWS // B)
    assert seen[:ROWS] == [random[k] for k in range(ROWS)]
    for epoch in (1, 2):
        rows = np.asarray([row for _, row in seen[epoch * ROWS : (epoch + 1) * ROWS]])
        assert sorted(rows) == list(range(ROWS))
        parts = rows.reshape(5, -1)
        if epoch == 2:  # all rows are known: the buckets are exact, and random inside
            assert [set(part) for part in parts] == [set(range(20 * i, 20 * (i + 1))) for i in range(5)]
            assert any(list(part) != sorted(part) for part in parts)
        else:  # those of the last batches before the boundary stand at random
            means = parts.mean(axis=1)
            assert np.all(np.diff(means) > 0)
            known = {row for _, row in seen[: ROWS - (MARGIN) * B]}
            assert len(known) < ROWS


def test_the_order_is_of_what_was_reported_before_the_margin():
    """Other shares in the batches after that change nothing, one before does."""
    start = ROWS // B  # the first batch of the second epoch
    orders = []
    for changed in (None, start - MARGIN, start - MARGIN - 1):
        curriculum = make()
        for batch in range(start):
            rows = [curriculum[batch * B + i] for i in range(B)]
            shares = np.stack([needs(*row) for row in rows])
            curriculum.report(batch, 3 - shares if batch == changed else shares)
        orders.append([curriculum[start * B + i] for i in range(ROWS)])
    assert orders[1] == orders[0] and orders[2] != orders[0]


def test_the_order_is_there_when_the_reader_needs_it():
    """A reader MARGIN batches ahead of what was reported always finds its rows; one further may not."""
    curriculum = make()
    for batch in range(3 * ROWS // B):
        for i in range(B):
            curriculum[(batch + MARGIN) * B + i]
        train(curriculum, batch, batch + 1)
    late = make()
    with pytest.raises(RuntimeError, match="epoch 1 .* after 0 reported"):
        late[ROWS]


@pytest.mark.parametrize("rule", ["mean", "cosine"])
@pytest.mark.parametrize("stop", [10, ROWS // B - MARGIN, ROWS // B - 2, ROWS // B, ROWS // B + 11, 2 * ROWS // B - 1])
def test_a_restart_goes_on_with_the_same_order(stop, rule):
    whole, end = make(rule=rule), 3 * ROWS // B
    expected = train(whole, 0, end)
    first, second = make(rule=rule), make(rule=rule)
    seen = train(first, 0, stop)
    second.load({name: array.copy() for name, array in first.arrays().items()}, stop)
    assert seen + train(second, stop, end) == expected
    np.testing.assert_array_equal(second.shares, whole.shares)


def test_a_mixture():
    """Each source has its own epochs and its own order; they take turns as without a curriculum."""
    lengths, weights = (60, 100), (1.0, 2.0)
    curriculum, random = make(lengths, weights), RandomOrder(list(lengths), list(weights), 0)
    seen = train(curriculum, 0, 150)
    assert [source for source, _ in seen] == [random[k][0] for k in range(len(seen))]
    for source, length in enumerate(lengths):
        rows = [row for of, row in seen if of == source]
        for epoch in range(len(rows) // length):
            assert sorted(rows[epoch * length : (epoch + 1) * length]) == list(range(length))
        halves = np.reshape(rows[2 * length : 3 * length], (2, -1)).mean(axis=1) if len(rows) >= 3 * length else (0, 1)
        assert halves[0] < halves[1]


def test_the_margin_is_above_what_is_read_ahead():
    """The buffer, the batch that its thread reads, and the two steps that the trainer has in hand."""
    assert READ_AHEAD + 3 <= MARGIN


def test_a_checkpoint_keeps_what_was_there():
    curriculum = make()
    kept = curriculum.arrays()
    train(curriculum, 0, ROWS // B)
    assert np.all(np.isnan(kept["shares"])) and np.all(kept["epochs"] == -1)


def test_reports_are_in_turn():
    curriculum = make()
    with pytest.raises(ValueError, match="are wanted"):
        curriculum.report(0, np.ones((B, LAYERS - 1)))
    with pytest.raises(ValueError, match="batch 1 is reported after 0"):
        curriculum.report(1, np.ones((B, LAYERS)))


def test_too_few_rows():
    with pytest.raises(ConfigError, match="data.curriculum=mean.*39 rows"):
        make(lengths=(39,))
    make(lengths=(40,))


def test_cosine_is_the_papers_rule():
    shares = 1 + np.asarray([[0.4, 0.2], [0.1, 0.05], [0.3, 0.3], [0.0, 0.4], [0.0, 0.0], [np.nan, np.nan]])
    keys = order_keys(shares, "cosine")
    above, anchor = shares[:4] - 1, np.asarray([0.1, 0.05])
    cosine = above @ anchor / np.linalg.norm(above, axis=1) / np.linalg.norm(anchor)
    np.testing.assert_allclose(keys[:4], -cosine, rtol=1e-12)
    assert keys[4] < keys[:4].min() and np.isnan(keys[5])
    # It ignores the size: half as much of the same is equally near.
    assert keys[0] == pytest.approx(keys[1])
    assert np.argsort(order_keys(shares[:5], "mean")).tolist() == [4, 1, 3, 0, 2]


def test_nothing_known():
    assert np.all(np.isnan(order_keys(np.full((4, 2), np.nan), "cosine")))
    assert np.all(order_keys(np.ones((4, 2)), "cosine") == -2)
