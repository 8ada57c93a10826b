"""Scores by document: how they are kept, and the bootstrap over them."""

import itertools

import numpy as np
import pytest

from moe_jax.study.documents import Documents, bootstrap_difference, load_documents, save_documents


def documents(nats, tokens, size=None):
    return Documents(np.asarray(nats, float), np.asarray(tokens), np.asarray(tokens if size is None else size))


def test_all_draws_of_three_documents():
    """Against the 27 ways to draw three of three, each as probable as the others."""
    ours, theirs, tokens = np.array([10.0, 22.0, 3.0]), np.array([12.0, 20.0, 5.0]), np.array([10, 20, 5])
    found = bootstrap_difference([(documents(ours, tokens), documents(theirs, tokens))], "tokens")
    draws = [list(draw) for draw in itertools.product(range(3), repeat=3)]
    values = [(ours - theirs)[draw].sum() / tokens[draw].sum() for draw in draws]
    assert found.mean == pytest.approx(-2 / 35) and found.n == 3
    # The extremes are those of one document three times, 1 of 27 each: beyond the percentiles.
    assert (found.low, found.high) == pytest.approx((min(values), max(values)))
    again = bootstrap_difference([(documents(ours, tokens), documents(theirs, tokens))], "tokens")
    assert again == found  # a fixed seed


def test_seeds_are_averaged_and_bytes_give_bits():
    tokens, size = np.array([4, 8]), np.array([8, 16])
    base = documents([1.0, 2.0], tokens, size)
    pairs = [(documents([2.0, 2.0], tokens, size), base), (documents([1.0, 4.0], tokens, size), base)]
    # Mean differences 0.5 and 1.0 nats.
    assert bootstrap_difference(pairs, "tokens").mean == pytest.approx(1.5 / 12)
    assert bootstrap_difference(pairs, "bytes").mean == pytest.approx(1.5 / np.log(2) / 24)
    assert bootstrap_difference([], "tokens") is None
    assert bootstrap_difference([(documents([np.nan, 1.0], tokens), base)], "tokens") is None
    one = bootstrap_difference([(documents([2.0], [4]), documents([1.0], [4]))], "tokens")
    assert one == (0.25, None, None, 1)


def test_coverage():
    """Of 200 texts of 60 documents, the interval holds the true difference of about 95 of 100."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        tokens = rng.integers(50, 400, 60)
        theirs = 3.0 * tokens + rng.normal(0, 5, 60)
        ours = theirs + tokens * 0.02 + rng.normal(0, 4, 60) * np.sqrt(tokens)
        found = bootstrap_difference([(documents(ours, tokens), documents(theirs, tokens))], "tokens", resamples=500)
        held += found.low <= 0.02 <= found.high
    assert 178 <= held <= 198, held  # 190 -+ 4 standard deviations of 3.1, less what 60 documents cost


def test_file(tmp_path):
    path = tmp_path / "documents.npz"
    assert load_documents(path) is None
    part = lambda start: {"nats": np.arange(2.0) + start, "tokens": np.arange(2) + start, "bytes": np.arange(2) + start}
    save_documents(path, {"b": part(10), "a/x": part(0)})
    found = load_documents(path)
    np.testing.assert_array_equal(found.nats, [0, 1, 10, 11])
    assert found.tokens.dtype.kind == "i" and list(tmp_path.iterdir()) == [path]
