"""How many experts a token takes: the figures by hand, and the section in a page."""

import numpy as np
import pytest

from moe_jax.report.collect import Choices, Observed
from moe_jax.report.set_sizes import by_row, clustering, findings, harder_half, kind_of, sizes, words
from tests.report.test_report import make_config, make_run, page_of

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def observed(taken: dict[str, list[int]], experts: int = 3, **arrays) -> Observed:
    """Tokens that take so many experts, the first ones."""
    layers = {
        name: Choices(np.packbits(np.arange(experts + 1) < np.asarray(one)[:, None], axis=1), experts + 1, None, {}, {})
        for name, one in taken.items()
    }
    count = len(next(iter(taken.values())))
    fields = {"positions": np.arange(count), "rows": np.zeros(count, np.int32), "nats": np.zeros(count)} | arrays
    empty = np.zeros(count, np.int32)
    return Observed(
        ("a",), empty, empty, passages={}, scores={}, layers=layers, batch=(1, 1), dense=frozenset(), retrieved={}, **fields
    )


def test_sizes():
    """Of layers where tokens differ; the fourth column is a virtual expert."""
    one = observed({"same": [2, 2, 2], "differ": [1, 4, 0]})
    found = sizes(one, {"same": 3, "differ": 3})
    assert {name: a.tolist() for name, a in found.items()} == {"differ": [1, 3, 0]}
    assert sizes(one._replace(dense=frozenset({"differ"})), {"same": 3, "differ": 3}) == {}


@pytest.mark.parametrize(
    "piece, kind",
    [
        (b"\n    ", "new line"),
        (b"  ", "space"),
        (b" 12", "number"),
        (b"):", "punctuation"),
        (b" name", "start of a word"),
        (b" _x", "start of a word"),
        (b"ame", "rest of a word"),
        (b"", "other"),
        (b"3d", "other"),
    ],
)
def test_kinds(piece, kind):
    assert kind_of(piece) == kind


def test_words():
    pieces = [b" ad", b"apt", b"ive", b" 12", b"x", b" gate", b"s", b"."]
    rows = np.asarray([0, 0, 0, 0, 0, 0, 1, 1])
    assert words(pieces, rows) == [("adaptive", [0, 1, 2]), ("x", [4]), ("gate", [5]), ("s", [6])]
    assert words([b"fo", b"o ", b"bar"], np.zeros(3)) == [("foo", [0, 1]), ("bar", [2])]


def test_differences_are_means_over_rows():
    values, rows = np.asarray([1.0, 2, 1, 1, 5]), np.asarray([0, 0, 1, 1, 2])
    second = np.asarray([False, True, False, True, True])
    found = by_row(values, rows, ~second, second)  # row 2 has no first part
    assert (found.mean, found.n) == (0.5, 2)


def test_harder_half():
    nats, rows = np.asarray([1.0, 3, 2, 10, 30, 20]), np.asarray([0, 0, 0, 1, 1, 1])
    assert harder_half(nats, rows).tolist() == [False, True, False, False, True, False]


def test_findings_have_the_sign_of_what_is_there():
    """Eight rows in which late and hard tokens take two experts in the last layer, and every token one in the first."""
    rng = np.random.default_rng(0)
    rows, positions = np.repeat(np.arange(8), 100), np.tile(np.arange(100), 8)
    nats = rng.permutation(800).astype(float)
    late, hard = positions >= 50, harder_half(nats, rows)
    chance = rng.random(800)
    one = observed(
        {"first": 1 + (chance < 0.2), "last": 1 + (chance < 0.1 + 0.3 * late + 0.5 * hard)},
        rows=rows,
        positions=positions,
        nats=nats,
    )
    found = findings(sizes(one, {"first": 3, "last": 3}), one)
    assert len(found) == 3 and all(f.difference.low > 0 and f.difference.n == 8 for f in found)
    assert abs(found[2].difference.mean - 0.25) < 0.1


def test_clustering():
    rows = np.repeat(np.arange(20), 10)
    real, chance = clustering(np.repeat(np.arange(20) % 2, 10).astype(float), rows)
    assert real == 0.5 and chance < 0.25
    real, chance = clustering(np.tile(np.arange(10) % 2, 20).astype(float), rows)
    assert real == 0


def test_in_a_page(tmp_path, capsys):
    folder = make_run(tmp_path, make_config(tmp_path, moe={"router": "adaptive", "experts": 4}))
    said = "".join(page_of(folder, capsys=capsys).text)
    for wanted in ("How many experts a token takes", "By kind of token", "By word", "What the paper saw"):
        assert wanted in said
    folder = make_run(tmp_path / "same", make_config(tmp_path / "same", moe={"top_k": 1}))
    assert "How many experts a token takes" not in "".join(page_of(folder, capsys=capsys).text)
