"""Token streams: every document of a split tokenised once, and kept on disk with what tells a whole copy from a damaged one."""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath
from tqdm import tqdm

from moe_jax.config import ConfigError
from moe_jax.data.disk import remove, sync, write_whole
from moe_jax.data.files import LeftOut
from moe_jax.data.hashing import digest, hash64
from moe_jax.data.say import say
from moe_jax.data.splits import Split
from moe_jax.data.tokenizer import Tokenizer

# Part of every cache key: raise it when the meaning of the stored tokens changes.
FORMAT = 1
COUNTED_AT_ONCE = 2**24
ENCODED_AT_ONCE = 2**20


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The documents of one split, one after the other.

    Attributes:
      tokens: uint16 or uint32 [targets + 1], memory-mapped: `bos` and the tokens of each document, then a
        last `bos`.
      hashes: uint64 [documents], equal for documents of equal text.
      documents: documents in the stream.
      bytes: bytes of their text in UTF-8.
      empty: documents left out because they have no text.
      left_out: reason -> documents left out because they cannot be read.
      places: reason -> where the first of them is.
      digest: identifies the source of the text, how it was split, and the tokenizer.
      content: identifies the tokens.
    """

    tokens: np.ndarray
    hashes: np.ndarray
    documents: int
    bytes: int
    empty: int
    left_out: dict[str, int]
    places: dict[str, str]
    digest: str
    content: str

    @property
    def targets(self) -> int:
        """Tokens to predict: every one but the first `bos`."""
        return len(self.tokens) - 1

    @property
    def repeated(self) -> int:
        """Documents that are equal to an earlier one."""
        return self.documents - len(np.unique(self.hashes))

    def rows(self, sequence_length: int, drop_remainder: bool) -> int:
        """Rows of `sequence_length` tokens; a last, shorter one can be dropped unless it is the only one."""
        full, rest = divmod(self.targets, sequence_length)
        return full + bool(rest and not (drop_remainder and full))


class _Damaged(Exception):
    """A cached stream that is not as it was written."""


def stream_digest(split: Split, tokenizer: Tokenizer) -> str:
    """Identifies the stream of `split` under `tokenizer`."""
    return digest("stream", FORMAT, split.digest, tokenizer.fingerprint)


def open_stream(
    split: Split, tokenizer: Tokenizer, cache_dir: epath.Path, label: str, show_progress: bool = True
) -> TokenStream:
    """The stream of `split`, tokenised on the first call and memory-mapped from `cache_dir` after that.

    A copy that is not as it was written is said on stderr and made again. Several processes may call this at once: each builds
    its own copy, the first one done is kept.

    Raises:
      ConfigError: `cache_dir` cannot be written; a text cannot be read.
    """
    key = stream_digest(split, tokenizer)
    folder = cache_dir / "streams" / key
    try:
        if os.path.lexists(folder):
            try:
                return _load(folder, key, tokenizer)
            except _Damaged as problem:
                say(f"{label}: its tokens in {folder} are damaged ({problem}) and are made again")
                remove(folder)
        _build(split, tokenizer, folder, label, show_progress)
        return _load(folder, key, tokenizer)
    except OSError as error:
        fix = "make room there, or name another folder"
        raise ConfigError("data.cache_dir", str(cache_dir), f"cannot be written: {error.strerror or error}", fix) from error
    except _Damaged as problem:
        raise ConfigError(
            "data.cache_dir", str(cache_dir), f"does not keep what is written: {problem}", "name another folder"
        ) from problem


def _load(folder: epath.Path, key: str, tokenizer: Tokenizer) -> TokenStream:
    """The stream in `folder`, its sizes and digests compared with those that were written."""
    try:
        if (folder / "facts.json").exists():
            facts, hashes = _compared(folder)
        else:
            facts, hashes = _describe_older(folder, tokenizer)
            with contextlib.suppress(OSError):  # a cache that cannot be written is read all the same
                _write_facts(folder, facts, hashes)
        tokens = np.memmap(folder / "tokens.bin", dtype=facts.pop("dtype"), mode="r")
        content = facts.pop("digests")["tokens.bin"]
        return TokenStream(tokens=tokens, hashes=hashes, digest=key, content=content, **facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error


def _compared(folder: epath.Path) -> tuple[dict, np.ndarray]:
    facts = json.loads((folder / "facts.json").read_text())
    sizes = {"tokens.bin": facts.pop("tokens") * np.dtype(facts["dtype"]).itemsize, "hashes.bin": facts["documents"] * 8}
    for name, size in sizes.items():
        if (found := os.path.getsize(folder / name)) != size:
            raise _Damaged(f"{name} has {found:,} bytes, not {size:,}")
        if _file_digest(folder / name) != facts["digests"][name]:
            raise _Damaged(f"{name} has other bytes than were written")
    return facts, np.fromfile(folder / "hashes.bin", np.uint64)


def _build(split: Split, tokenizer: Tokenizer, folder: epath.Path, label: str, show_progress: bool) -> None:
    building = folder.with_name(f".building-{uuid.uuid4().hex}")
    building.mkdir(parents=True)
    try:
        _write_stream(split, tokenizer, building, label, show_progress)
        for path in (*building.iterdir(), building):
            sync(path)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(building, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_stream(split: Split, tokenizer: Tokenizer, folder: epath.Path, label: str, show_progress: bool):
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    facts = {"documents": 0, "bytes": 0, "empty": 0, "left_out": dict(split.left_out), "places": {}}
    hashes = array.array("Q")
    bar = tqdm(desc=f"tokenising {label}", unit="B", unit_scale=True, delay=2, disable=not show_progress)
    with bar, (folder / "tokens.bin").open("wb") as f:
        for texts in _groups(split.documents(), facts):
            for ids in tokenizer.encode_batch(texts):
                data = np.concatenate([[tokenizer.bos], ids]).astype(dtype).tobytes()
                hashes.append(hash64(data))
                f.write(data)
            size = sum(len(text.encode()) for text in texts)
            facts["documents"] += len(texts)
            facts["bytes"] += size
            bar.update(size)
        f.write(np.array([tokenizer.bos], dtype).tobytes())
    facts |= {"dtype": dtype.name, "digests": {"tokens.bin": _file_digest(folder / "tokens.bin")}}
    _write_facts(folder, facts, np.array(hashes, np.uint64))


def _write_facts(folder: epath.Path, facts: dict, hashes: np.ndarray) -> None:
    """Adds hashes.bin and facts.json to the tokens; the second one makes the stream complete."""
    count = os.path.getsize(folder / "tokens.bin") // np.dtype(facts["dtype"]).itemsize
    write_whole(folder / "hashes.bin", hashes.tobytes())
    digests = facts["digests"] | {"hashes.bin": _file_digest(folder / "hashes.bin")}
    write_whole(folder / "facts.json", json.dumps(facts | {"tokens": count, "digests": digests}).encode())


def _describe_older(folder: epath.Path, tokenizer: Tokenizer) -> tuple[dict, np.ndarray]:
    """Facts and hashes of a stream from before they were kept, where its tokens are those that were counted.

    The tokens themselves hold the counts of documents and bytes: one `bos` a document, and the bytes behind each id.
    """
    facts = json.loads((folder / "stream.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r")
    starts, size = [], 0
    for first in range(0, len(tokens), COUNTED_AT_ONCE):
        some = tokens[first : first + COUNTED_AT_ONCE]
        starts += (first + np.flatnonzero(some == tokenizer.bos)).tolist()
        size += int(tokenizer.token_bytes[some].sum(dtype=np.int64))
    if (len(starts), size) != (facts["documents"] + 1, facts["bytes"]) or (starts[0], starts[-1]) != (0, len(tokens) - 1):
        raise _Damaged("the tokens are not those that were counted")
    hashes = np.array([hash64(tokens[a:b].tobytes()) for a, b in zip(starts[:-1], starts[1:])], np.uint64)
    undecodable = facts.pop("undecodable")
    facts |= {"left_out": {"not UTF-8 or not JSON": undecodable} if undecodable else {}, "places": {}}
    return facts | {"digests": {"tokens.bin": _file_digest(folder / "tokens.bin")}}, hashes


def _groups(texts: Iterable[str | LeftOut], facts: dict) -> Iterator[list[str]]:
    """Texts in groups worth encoding at once; counts in `facts` what is left out."""
    group, size = [], 0
    for text in texts:
        if isinstance(text, LeftOut):
            facts["left_out"][text.reason] = facts["left_out"].get(text.reason, 0) + 1
            facts["places"].setdefault(text.reason, text.place)
            continue
        if not text:
            facts["empty"] += 1
            continue
        group.append(text)
        size += len(text)
        if size >= ENCODED_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _file_digest(path: epath.Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
