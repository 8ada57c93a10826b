import numpy as np
import pytest
from etils import epath

from moe_jax.data import ByteTokenizer, PackedRows
from moe_jax.data.splits import Split
from moe_jax.data.streams import open_stream

TEXTS = ["hello", "x" * 37, "é", "\n", "a b c d e f g h i j", "日本語" * 9]


def make_stream(texts, folder, name="texts"):
    split = Split(lambda: iter(texts), digest=f"{name}{texts}")
    return open_stream(split, ByteTokenizer(), epath.Path(folder), name, show_progress=False)


def documents_of(rows, bos):
    """Texts read back from the inputs and the last target."""
    rows = list(rows)
    tokens = np.concatenate([row["tokens"][row["segment_ids"] > 0] for row in rows])
    stream = [*tokens, rows[-1]["targets"][rows[-1]["segment_ids"] > 0][-1]]
    starts = np.flatnonzero(np.array(stream) == bos)
    assert starts[0] == 0 and starts[-1] == len(stream) - 1
    return [bytes(stream[a + 1 : b]).decode() for a, b in zip(starts, starts[1:])]


@pytest.mark.parametrize("length", [8, 16, 33, 500])
@pytest.mark.parametrize("document_attention", [True, False])
def test_rows_hold_every_document(tmp_path, length, document_attention):
    stream = make_stream(TEXTS, tmp_path)
    assert (stream.documents, stream.bytes) == (len(TEXTS), sum(len(text.encode()) for text in TEXTS))
    rows = PackedRows(stream, 256, length, document_attention)
    assert documents_of(rows, 256) == TEXTS
    assert len(rows) == -(-stream.targets // length)


@pytest.mark.parametrize("length", [8, 33])
def test_every_token_is_a_target_once(tmp_path, length):
    stream = make_stream(TEXTS, tmp_path)
    rows = list(PackedRows(stream, 256, length))
    targets = np.concatenate([row["targets"][row["loss_weights"] == 1] for row in rows])
    np.testing.assert_array_equal(targets, stream.tokens[1:])
    token_bytes = ByteTokenizer().token_bytes
    assert token_bytes[targets].sum() == stream.bytes
    for row in rows:
        assert {v.dtype.name for k, v in row.items() if k != "loss_weights"} == {"int32"}
        np.testing.assert_array_equal(row["loss_weights"], (row["segment_ids"] > 0).astype(np.float32))


def test_segments_and_positions(tmp_path):
    row = PackedRows(make_stream(["ab", "c", "defgh"], tmp_path), 256, 12)[0]
    assert row["tokens"].tolist() == [256, 97, 98, 256, 99, 256, 100, 101, 102, 103, 104, 0]
    assert row["targets"].tolist() == [97, 98, 256, 99, 256, 100, 101, 102, 103, 104, 256, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 0]
    assert row["loss_weights"].tolist() == [1] * 11 + [0]


def test_a_document_cut_by_a_row_starts_again(tmp_path):
    row = PackedRows(make_stream(["abcdefghij", "k"], tmp_path), 256, 8)[1]
    assert row["tokens"].tolist() == [104, 105, 106, 256, 107, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]


def test_one_segment_without_document_attention(tmp_path):
    row = PackedRows(make_stream(["ab", "c"], tmp_path), 256, 8, document_attention=False)[0]
    assert row["segment_ids"].tolist() == [1] * 5 + [0] * 3
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_last_short_row_is_dropped_unless_alone(tmp_path):
    stream = make_stream(["x" * 20], tmp_path)
    assert [len(PackedRows(stream, 256, n, drop_remainder=True)) for n in (8, 21, 30)] == [2, 1, 1]
    assert [len(PackedRows(stream, 256, n)) for n in (8, 21, 30)] == [3, 1, 1]
