"""Token streams: every document of a split tokenised once, kept on disk, and cut into rows."""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath
from tqdm import tqdm

from moe_jax.data.hashing import digest
from moe_jax.data.sources import Split
from moe_jax.data.tokenizer import Tokenizer

# Part of every cache key: raise it when the meaning of the stored files changes.
FORMAT = 1
COUNTED_AT_ONCE = 2**24
ENCODED_AT_ONCE = 2**20


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The documents of one split, one after the other.

    Attributes:
      tokens: uint16 or uint32 [targets + 1], memory-mapped: `bos` and the tokens of each document, then a
        last `bos`.
      documents: documents in the stream.
      bytes: bytes of their text in UTF-8.
      undecodable: documents left out because they are no UTF-8 (or no JSON).
      empty: documents left out because they have no text.
      digest: identifies the text and the tokenizer.
    """

    tokens: np.ndarray
    documents: int
    bytes: int
    undecodable: int
    empty: int
    digest: str

    @property
    def targets(self) -> int:
        """Tokens to predict: every one but the first `bos`."""
        return len(self.tokens) - 1

    def rows(self, sequence_length: int, drop_remainder: bool) -> int:
        """Rows of `sequence_length` tokens; a last, shorter one can be dropped unless it is the only one."""
        full, rest = divmod(self.targets, sequence_length)
        return full + bool(rest and not (drop_remainder and full))


def stream_digest(split: Split, tokenizer: Tokenizer) -> str:
    """Identifies the stream of `split` under `tokenizer`."""
    return digest("stream", FORMAT, split.digest, tokenizer.fingerprint)


def open_stream(
    split: Split, tokenizer: Tokenizer, cache_dir: epath.Path, label: str, show_progress: bool = True
) -> TokenStream:
    """The stream of `split`, tokenised on the first call and memory-mapped from `cache_dir` after that.

    Several processes may call this at once: each builds its own copy, the first one done is kept.
    """
    key = stream_digest(split, tokenizer)
    folder = cache_dir / "streams" / key
    if not folder.exists():
        building = folder.with_name(f".building-{uuid.uuid4().hex}")
        building.mkdir(parents=True)
        try:
            _write_stream(split, tokenizer, building, label, show_progress)
            with contextlib.suppress(OSError):
                os.rename(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    facts = json.loads((folder / "stream.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", dtype=facts.pop("dtype"), mode="r")
    return TokenStream(tokens=tokens, digest=key, **facts)


def _write_stream(split: Split, tokenizer: Tokenizer, folder: epath.Path, label: str, show_progress: bool):
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    facts = {"documents": 0, "bytes": 0, "undecodable": split.undecodable, "empty": 0}
    bar = tqdm(desc=f"tokenising {label}", unit="B", unit_scale=True, delay=2, disable=not show_progress)
    with bar, (folder / "tokens.bin").open("wb") as f:
        for texts in _groups(split.documents(), facts):
            for ids in tokenizer.encode_batch(texts):
                f.write(np.concatenate([[tokenizer.bos], ids]).astype(dtype).tobytes())
            size = sum(len(text.encode()) for text in texts)
            facts["documents"] += len(texts)
            facts["bytes"] += size
            bar.update(size)
        f.write(np.array([tokenizer.bos], dtype).tobytes())
    (folder / "stream.json").write_text(json.dumps(facts | {"dtype": dtype.name}))


def _groups(texts: Iterable[str | None], facts: dict) -> Iterator[list[str]]:
    """Texts in groups worth encoding at once; counts in `facts` what is left out."""
    group, size = [], 0
    for text in texts:
        if not text:
            facts["undecodable" if text is None else "empty"] += 1
            continue
        group.append(text)
        size += len(text)
        if size >= ENCODED_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


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
