"""Splits of a source's documents: those that files are named for, and those held out by a hash."""

import array
import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moe_jax.config import ConfigError, SourceConfig
from moe_jax.data.files import Document, LeftOut, TextFiles
from moe_jax.data.globs import file_identity, find_files
from moe_jax.data.hashing import digest, hash64, hold_out

# The field of a source that names the files of each split.
GLOBS = {"train": "files", "validation": "validation_files", "test": "test_files"}


@dataclasses.dataclass
class Split:
    """Part of a source.

    Attributes:
      documents: starts a pass over the texts in a fixed order; a `LeftOut` for one that cannot be read.
      digest: identifies the texts.
      left_out: by reason, documents that were left out before `documents` could see them.
    """

    documents: Callable[[], Iterator[str | LeftOut]]
    digest: str
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sides:
    """Which hashes go to which split.

    Attributes:
      bounds: [low, high) of each split.
      first: hash of a text that several documents have -> the hash that decides for all of them, the first one's. Empty where
        each document is in the split of its own hash anyway.
    """

    bounds: dict[str, tuple[int, int]]
    first: dict[int, int] = dataclasses.field(default_factory=dict)

    def texts(self, split: str, documents: Iterator[Document]) -> Iterator[str | LeftOut]:
        """Those of `documents` that are in `split`."""
        low, high = self.bounds[split]
        for key, text in documents:
            if self.first and isinstance(text, str):
                key = self.first.get(hash64(text), key)
            if low <= key < high:
                yield text


def all_texts(documents: Callable[[], Iterator[Document]]) -> Iterator[str | LeftOut]:
    """The texts of all documents."""
    return (text for _, text in documents())


def file_splits(source: SourceConfig, fields: dict[str, str], percent: float) -> dict[str, Split]:
    """Splits of a source of local files.

    Args:
      source: its files, and how documents are cut from them.
      fields: field of `source` -> its config path or flag, for errors.
      percent: share of documents in each of validation and test that no files are named for; 0: none.

    Raises:
      ConfigError: no such files, none that can be read, or a held-out file that is a training file too.
    """
    files = {}
    for split, name in GLOBS.items():
        if getattr(source, name).strip(" ,"):
            found = find_files(fields[name], getattr(source, name))
            files[split] = TextFiles(found, source.document, source.text_feature, fields[name], fields["text_feature"])
    splits = {split: Split(functools.partial(all_texts, some.documents), some.digest) for split, some in files.items()}
    if "train" not in files:
        return splits
    if not source.weight:
        everything = splits.pop("train")
        return {"validation": everything, "test": everything} | splits
    training = {file_identity(path): path for _, path in files["train"].files}
    for split in [split for split in files if split != "train"]:
        for name, path in files[split].files:
            if same := training.get(file_identity(path)):
                limit = f"{name} is in files too, as {same}"
                raise ConfigError(fields[GLOBS[split]], getattr(source, GLOBS[split]), limit, "make the globs disjoint")
    missing = [split for split in ("validation", "test") if split not in files]
    train = files["train"]
    refuse = functools.partial(_refuse_files, source, train, missing, percent)
    return splits | held_out(train.documents, train.digest, missing, percent, refuse, train.split_by_name)


def held_out(
    documents: Callable[[], Iterator[Document]],
    whole: str,
    names: Sequence[str],
    percent: float,
    refuse: Callable[[ValueError], ConfigError],
    by_name: bool = False,
) -> dict[str, Split]:
    """Splits documents by their hashes into `names` and "train"; equal texts go to one side.

    Args:
      documents: starts a pass.
      whole: digest of all of them.
      names: splits to hold out.
      percent: share of each; 0: none is held out.
      refuse: the error for too few documents.
      by_name: the hash of a document may be that of a name, so that equal texts differ in it; else it is that of the text.
    """
    names = names if percent else ()

    @functools.cache
    def sides() -> Sides:
        try:
            return find_sides(documents(), names, percent, by_name)
        except ConfigError:  # is a ValueError
            raise
        except ValueError as e:
            raise refuse(e) from e

    # The digest stays what it was before equal texts were looked for, unless one of them moves.
    marks = ("equal texts on one side",) if names and by_name and sides().first else ()
    return {
        name: Split(
            lambda name=name: sides().texts(name, documents()), digest("held out", whole, list(names), percent, name, *marks)
        )
        for name in ("train", *names)
    }


def find_sides(documents: Iterator[Document], names: Sequence[str], percent: float, by_name: bool) -> Sides:
    """The ranges of `hold_out`, and where equal texts go that it would part.

    Raises:
      ValueError: a split would have no document.
    """
    keys, texts = array.array("Q"), array.array("Q")
    for key, text in documents:
        if isinstance(text, str) and text:
            keys.append(key)
            if by_name:
                texts.append(hash64(text))
    bounds = hold_out(keys, names, percent)
    if not by_name:
        return Sides(bounds)
    keys, texts = np.array(keys, np.uint64), np.array(texts, np.uint64)
    hashes, first, group, counts = np.unique(texts, return_index=True, return_inverse=True, return_counts=True)
    ends = np.array([bounds[name][1] for name in names], np.uint64)
    shared = keys[first][group]
    if (np.searchsorted(ends, shared, "right") == np.searchsorted(ends, keys, "right")).all():
        return Sides(bounds)
    repeated = counts > 1
    decides = dict(zip(hashes[repeated].tolist(), keys[first[repeated]].tolist()))
    return Sides(hold_out(shared, names, percent), decides)


def _refuse_files(
    source: SourceConfig, files: TextFiles, names: Sequence[str], percent: float, error: ValueError
) -> ConfigError:
    """The error for files with too few documents, with what would help."""
    left_out = collections.Counter(text.reason for _, text in files.documents() if isinstance(text, LeftOut))
    limit = f"{error} ({describe_left_out(left_out)})" if left_out else str(error)
    fixes = ["add documents", "name other files in validation_files and test_files"]
    kinds = ("file", "paragraph", "line")
    for kind in kinds[kinds.index(files.document) + 1 :]:
        finer = dataclasses.replace(files, document=kind)
        try:
            find_sides(finer.documents(), names, percent, False)
        except ValueError:
            continue
        field = files.field.removesuffix("files") + "document"
        fixes.insert(0, f"set {field}={kind}")
        break
    return ConfigError(files.field, source.files, limit, ", or ".join(fixes))


def describe_left_out(counts: dict[str, int], places: dict[str, str] | None = None) -> str:
    """Such as "left out: 2 not UTF-8 (the first: a.txt), 1 null text"."""
    parts = []
    for reason, count in counts.items():
        place = (places or {}).get(reason, "")
        parts.append(f"{count:,} {reason}" + (f" (the first: {place})" if place else ""))
    return f"left out: {', '.join(parts)}"
