"""Documents of local .txt and .jsonl files, gzipped or not."""

import codecs
import dataclasses
import functools
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.config import ConfigError
from moe_jax.data.globs import File
from moe_jax.data.hashing import digest, hash64

PIECE_BYTES = 64 * 1024
# So many rows without the text that was asked for, and none with it, are taken for a wrong name.
ROWS_TRIED = 1000


class LeftOut(NamedTuple):
    """Stands for a document that cannot be read: the reason, such as "not UTF-8", and the place, such as "a.jsonl row 3"."""

    reason: str
    place: str


# The hash that decides a document's split, and its text.
Document = tuple[int, str | LeftOut]


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Files and how documents are cut from them.

    Attributes:
      files: from `find_files`.
      document: of a text file: "file" (cut at line ends where it is longer than PIECE_BYTES), "paragraph" or "line".
      text_feature: name of the text in a .jsonl row.
      field: config path or flag of the files, for errors.
      feature_field: that of `text_feature`.
    """

    files: list[File]
    document: str
    text_feature: str
    field: str
    feature_field: str

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the names and the content of the files, and how they are read.

        Raises:
          ConfigError: a file cannot be read.
        """
        rows, marks = [], set()
        for name, path in self.files:
            try:
                with path.open("rb") as f:
                    start = _start(f, name)
                    f.seek(0)
                    rows.append((name, hashlib.file_digest(f, "blake2b").hexdigest()))
            except OSError as error:
                raise self._unreadable(name, error) from error
            # What was once read in another way has a digest of its own; what was not keeps the one it had.
            if start.startswith(codecs.BOM_UTF8):
                marks.add("without byte order mark")
            if _kind(name) != (name.removesuffix(".gz").endswith(".jsonl"), name.endswith(".gz")):
                marks.add("kind by suffix in any case")
        return digest(digest(rows), (self.document, self.text_feature), *sorted(marks))

    @property
    def split_by_name(self) -> bool:
        """Whether the hash of a document may be that of a name, not of its text."""
        return self.document == "file" and not all(_kind(name)[0] for name, _ in self.files)

    def documents(self) -> Iterator[Document]:
        """The documents in order. A text file is held in memory whole; a .jsonl is read row by row.

        Raises:
          ConfigError: a file cannot be read, or no .jsonl row has such a text.
        """
        rows = _Rows(self.text_feature, self.feature_field)
        for name, path in self.files:
            is_rows, is_gzip = _kind(name)
            try:
                with path.open("rb") as raw:
                    f = gzip.GzipFile(fileobj=raw) if is_gzip else raw
                    try:
                        yield from rows.read(f, name) if is_rows else _texts(f.read(), name, self.document)
                    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                        yield hash64(name), _bad_gzip(error, name, raw)
            except OSError as error:
                raise self._unreadable(name, error) from error
        rows.check()

    def _unreadable(self, name: str, error: OSError) -> ConfigError:
        fix = "make it readable, or leave it out of the glob"
        return ConfigError(self.field, name, f"cannot be read: {error.strerror or error}", fix)


def _kind(name: str) -> tuple[bool, bool]:
    """Whether a file of this name holds JSON rows, and whether it is gzipped."""
    name = name.lower()
    return name.removesuffix(".gz").endswith((".jsonl", ".ndjson")), name.endswith(".gz")


def _start(f, name: str) -> bytes:
    """The first bytes of a file's text."""
    try:
        return (gzip.GzipFile(fileobj=f) if _kind(name)[1] else f).read(3)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return b""


def _bad_gzip(error: Exception, name: str, raw) -> LeftOut:
    if isinstance(error, EOFError):
        return LeftOut("gzip cut short", f"{name}, cut at {raw.seek(0, 2):,} bytes")
    raw.seek(0)
    return LeftOut("damaged gzip" if raw.read(2) == b"\x1f\x8b" else "not gzip", name)


class _Rows:
    """Reads .jsonl files, and counts over all of them how many rows have the text."""

    def __init__(self, feature: str, field: str):
        self._feature, self._field = feature, field
        self._found = self._lacking = 0
        self._first = ("", "")  # a row without the text, and the texts that it has

    def read(self, lines, name: str) -> Iterator[Document]:
        for number, line in enumerate(lines, 1):
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    yield hash64(name), LeftOut("UTF-16, not UTF-8", name)
                    return
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield self._document(line, f"{name} row {number}")

    def _document(self, line: bytes, place: str) -> Document:
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            return hash64(line), LeftOut("not UTF-8", place)
        except (ValueError, RecursionError):
            return hash64(line), LeftOut("not JSON", place)
        if not isinstance(row, dict) or self._feature not in row:
            self._lacking += 1
            if self._lacking == 1:
                texts = [key for key, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
                self._first = place, ", ".join(texts)
            if self._lacking >= ROWS_TRIED:
                self.check()
            return hash64(line), LeftOut("no such feature", place)
        self._found += 1
        text = row[self._feature]
        if not isinstance(text, str):
            return hash64(line), LeftOut("null text" if text is None else "text that is no string", place)
        try:
            return hash64(text.encode()), text
        except UnicodeEncodeError:
            return hash64(text), LeftOut("not UTF-8", place)

    def check(self) -> None:
        """Refuses a name of the text that no row has."""
        if self._lacking and not self._found:
            place, texts = self._first
            fix = f"choose one of its texts: {texts}" if texts else "name files whose rows are objects with a text"
            limit = f"no row has such a text, from {place} on"
            raise ConfigError(self._field, self._feature, limit, fix)


def _texts(data: bytes, name: str, document: str) -> Iterator[Document]:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield hash64(name), LeftOut("UTF-16, not UTF-8", name)
        return
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        yield hash64(name), LeftOut("not UTF-8", name)
        return
    if document == "file":
        for number, piece in enumerate(_pieces(data)):
            yield hash64(f"{name}#{number}"), piece.decode()
        return
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    # Short documents go by their text, so that a repeated one is never on both sides of a split.
    for part in _paragraphs(lines) if document == "paragraph" else lines:
        if part.strip():
            yield hash64(part), part


def _paragraphs(lines: list[str]) -> Iterator[str]:
    paragraph = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cuts UTF-8 at line ends, or else between characters, into pieces of at most PIECE_BYTES."""
    start = 0
    while len(data) - start > PIECE_BYTES:
        end = data.rfind(b"\n", start, start + PIECE_BYTES) + 1
        if not end:
            end = start + PIECE_BYTES
            while data[end] & 0xC0 == 0x80:
                end -= 1
        yield data[start:end]
        start = end
    yield data[start:]
