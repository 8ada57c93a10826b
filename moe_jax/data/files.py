"""Documents of local .txt and .jsonl files, gzipped or not."""

import gzip
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator

from etils import epath

from moe_jax.config import ConfigError
from moe_jax.data.hashing import digest, hash64

PIECE_BYTES = 64 * 1024

# The hash that decides a document's split, and its text; None stands for bytes that are no UTF-8 or no JSON.
Document = tuple[int, str | None]


def find_files(field: str, globs: str) -> list[tuple[str, epath.Path]]:
    """(name, path) of the files that match comma-separated globs, sorted by name.

    `**` matches any local folders. A name is the path below the part of its glob that has no wildcard, so it
    stays when a folder moves.

    Raises:
      ConfigError: a glob matches no file, or has `**` in a remote path.
    """
    found = {}
    for pattern in filter(None, (part.strip() for part in globs.split(","))):
        wildcard = next((i for i, c in enumerate(pattern) if c in "*?["), len(pattern))
        folder, slash, _ = pattern[:wildcard].rpartition("/")
        root, tail = epath.Path(folder + slash or ".").expanduser(), pattern[len(folder + slash) :]
        remote = "://" in pattern
        if remote and "**" in tail:
            raise ConfigError(field, pattern, "has ** in a remote path", "name the folders, or use * for each")
        if (root / tail).exists():
            paths = [root / tail]
        else:
            paths = root.glob(tail) if remote else map(epath.Path, pathlib.Path(root).glob(tail))
        paths = [path for path in paths if path.is_file()] if root.is_dir() else []
        if not paths:
            raise ConfigError(field, pattern, "matches no file", "give a path or a glob such as 'folder/**/*.txt'")
        found |= {str(path): (path.relative_to(root).as_posix(), path) for path in paths}
    return sorted(found.values(), key=lambda item: (item[0], str(item[1])))


def files_digest(files: list[tuple[str, epath.Path]]) -> str:
    """Identifies the names and the content of `files`."""
    rows = []
    for name, path in files:
        with path.open("rb") as f:
            rows.append((name, hashlib.file_digest(f, "blake2b").hexdigest()))
    return digest(rows)


def file_documents(files: list[tuple[str, epath.Path]], document: str, text_feature: str, field: str) -> Iterator[Document]:
    """Documents of `files` in order: a row of a .jsonl, else what `document` says of the text of a file.

    Args:
      files: from `find_files`. A text file is held in memory whole; a .jsonl is read row by row.
      document: "file" (cut at line ends where it is longer than PIECE_BYTES), "paragraph" or "line".
      text_feature: name of the text in a .jsonl row.
      field: config path of the source, for errors.

    Raises:
      ConfigError: a .jsonl row has no such text.
    """
    for name, path in files:
        try:
            with path.open("rb") as raw:
                f = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
                if name.removesuffix(".gz").endswith(".jsonl"):
                    yield from _rows(f, name, text_feature, field)
                else:
                    yield from _texts(f.read(), name, document)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield hash64(name), None


def _rows(lines, name: str, text_feature: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except ValueError:
            yield hash64(line), None
            continue
        text = row.get(text_feature) if isinstance(row, dict) else None
        if not isinstance(text, str):
            keys = [key for key, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
            raise ConfigError(
                f"{field}.text_feature",
                text_feature,
                f"row {number} of {name} has no such text",
                f"choose one of its texts: {', '.join(keys) or 'it has none'}",
            )
        try:
            yield hash64(text.encode()), text
        except UnicodeEncodeError:
            yield hash64(text), None


def _texts(data: bytes, name: str, document: str) -> Iterator[Document]:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        yield hash64(name), None
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
