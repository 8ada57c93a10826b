"""Rows of one length, cut from a token stream."""

import numpy as np

from moe_jax.data.streams import TokenStream

COUNTED_AT_ONCE = 2**24


class PackedRows:
    """A token stream as rows of S tokens, with random access (a Grain data source).

    Row i reads tokens i*S.. of the stream and predicts each one's successor, so every token but the first
    `bos` is a target exactly once; a document's last token predicts the `bos` that ends it. A row is

        tokens, targets   int32 [S]
        positions         int32 [S], from 0 in each segment
        segment_ids       int32 [S], 1, 2, ... per document in the row; 0: padding
        loss_weights      float32 [S], 1 for a target, 0 for padding

    Args:
      stream: the tokens.
      bos: id that starts a document.
      sequence_length: S.
      document_attention: off: one segment a row.
      drop_remainder: leave out a last row with padding, unless it is the only row.
    """

    def __init__(
        self,
        stream: TokenStream,
        bos: int,
        sequence_length: int,
        document_attention: bool = True,
        drop_remainder: bool = False,
    ):
        self._stream, self._bos, self._length = stream, bos, sequence_length
        self._document_attention = document_attention
        self._rows = stream.rows(sequence_length, drop_remainder)

    def __len__(self) -> int:
        return self._rows

    def __repr__(self) -> str:
        return f"PackedRows(rows={self._rows}, sequence_length={self._length})"

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        start = int(row) * self._length
        window = np.asarray(self._stream.tokens[start : start + self._length + 1], np.int32)
        count = max(len(window) - 1, 0)
        starts = window[:count] == self._bos if self._document_attention else np.zeros(count, bool)
        starts[:1] = True
        index = np.arange(count, dtype=np.int32)
        result = self.padding()
        result["tokens"][:count] = window[:-1]
        result["targets"][:count] = window[1:]
        result["positions"][:count] = index - np.maximum.accumulate(np.where(starts, index, 0))
        result["segment_ids"][:count] = np.cumsum(starts)
        result["loss_weights"][:count] = 1
        return result

    def token_shares(self, vocab_size: int) -> np.ndarray:
        """float64 [V]: the share of each id in the stream."""
        counts = np.zeros(vocab_size)
        for start in range(0, len(self._stream.tokens), COUNTED_AT_ONCE):
            counts += np.bincount(self._stream.tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
        return counts / max(counts.sum(), 1)

    def padding(self) -> dict[str, np.ndarray]:
        """A row of nothing but padding."""
        integers = ("tokens", "targets", "positions", "segment_ids")
        row = {name: np.zeros(self._length, np.int32) for name in integers}
        return row | {"loss_weights": np.zeros(self._length, np.float32)}
