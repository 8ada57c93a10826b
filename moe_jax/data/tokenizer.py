"""Tokenizers that round-trip every text: raw bytes, and byte-level BPE."""

import functools
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from etils import epath

from moe_jax.data.disk import write_whole
from moe_jax.data.hashing import digest


@functools.cache
def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, which byte-level BPE writes its pieces in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Text to ids and back. Ids [0, V-1) stand for bytes of UTF-8; the last, `bos`, starts every document.

    Attributes:
      vocab_size: V, `bos` included.
      bos: id that starts a document and so also ends the one before. No text encodes to it.
      token_bytes: int32 [V], bytes of text behind each id (0 for `bos`).
      fingerprint: equal for tokenizers that give equal ids.
    """

    def __init__(self, pieces: Sequence[bytes]):
        self._pieces = [*pieces, b""]
        self.vocab_size = len(self._pieces)
        self.bos = self.vocab_size - 1
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest("tokenizer", self.to_json())

    def encode(self, text: str) -> np.ndarray:
        """int32 ids [tokens] of `text`, without `bos`. Raises UnicodeEncodeError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind `ids`; nothing for `bos`."""
        return b"".join([self._pieces[i] for i in np.asarray(ids).tolist()])

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str:
        """One id in a form to show: spaces as U+2423, control characters and stray bytes escaped."""
        if token_id == self.bos:
            return "<bos>"
        text = self._pieces[token_id].decode("utf-8", "backslashreplace").replace(" ", "\u2423")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    def to_json(self) -> dict:
        """Everything `from_json` needs, JSON-able."""
        raise NotImplementedError

    @staticmethod
    def from_json(data: dict) -> "Tokenizer":
        """The tokenizer that `to_json` described."""
        if data["kind"] == "bytes":
            return ByteTokenizer()
        return BPETokenizer(data["pieces"], [tuple(merge) for merge in data["merges"]])

    def save(self, path: epath.PathLike) -> None:
        """Writes one JSON file, whole or not at all on a local disk."""
        path = epath.Path(path)
        text = json.dumps(self.to_json() | {"fingerprint": self.fingerprint}, ensure_ascii=True)
        if "://" in os.fspath(path):
            path.write_text(text)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())

    @staticmethod
    def load(path: epath.PathLike) -> "Tokenizer":
        """The tokenizer that `save` wrote.

        Raises:
          ValueError: the file is not as it was written.
        """
        try:
            data = json.loads(epath.Path(path).read_text())
            tokenizer = Tokenizer.from_json(data)
        except Exception as error:  # the library that reads the merges has one type for everything
            raise ValueError(f"{path} holds no tokenizer: {error}") from error
        if data.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise ValueError(f"{path} holds another tokenizer than was written")
        return tokenizer


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of UTF-8; `bos` is 256."""

    def __init__(self):
        super().__init__([bytes([byte]) for byte in range(256)])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def to_json(self) -> dict:
        return {"kind": "bytes"}


class BPETokenizer(Tokenizer):
    """Byte-level BPE (the `tokenizers` library) with GPT-2's split into words, nothing normalised.

    `bos` is unknown to the library's tokenizer, so no text can spell it.

    Args:
      pieces: the tokens by id, in GPT-2's byte characters; all 256 bytes are among them.
      merges: pairs of pieces, most frequent first.
    """

    def __init__(self, pieces: Sequence[str], merges: Sequence[tuple[str, str]]):
        byte_of = _byte_characters()
        super().__init__([bytes(byte_of[c] for c in piece) for piece in pieces])
        self._json = {"kind": "bpe", "pieces": list(pieces), "merges": [list(merge) for merge in merges]}
        vocab = {piece: i for i, piece in enumerate(pieces)}
        self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
        self._bpe.pre_tokenizer = _words()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            text.encode()
        return [np.array(e.ids, np.int32) for e in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def to_json(self) -> dict:
        return self._json

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns at most `vocab_size` - 257 merges from `texts`; fewer where the text has no more pairs."""
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = _words()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        model = json.loads(bpe.to_str())["model"]
        pieces = sorted(model["vocab"], key=model["vocab"].get)
        return cls(pieces, [tuple(merge) for merge in model["merges"]])


def _words() -> tokenizers.pre_tokenizers.PreTokenizer:
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
