"""Named sources of text: local files and TFDS datasets, each with its splits."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Sequence

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from moe_jax.config import ConfigError, DataConfig, SourceConfig
from moe_jax.data.files import Document, file_documents, files_digest, find_files
from moe_jax.data.hashing import HASHES, digest, hash64, hold_out
from moe_jax.data.stdlib import PythonStdlib, python_stdlib_config

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass
class Split:
    """Part of a source.

    Attributes:
      documents: starts a pass over the texts in a fixed order; None for one that is no UTF-8.
      digest: identifies the texts.
      undecodable: documents that were left out before `documents` could see them.
    """

    documents: Callable[[], Iterator[str | None]]
    digest: str
    undecodable: int = 0


@dataclasses.dataclass
class Source:
    """A named source, its weight in training (0: evaluation only) and its splits by name."""

    name: str
    weight: float
    splits: dict[str, Split]


def open_sources(config: DataConfig, cache_dir: epath.Path) -> list[Source]:
    """The sources of `config`, in order: datasets are prepared, files found and hashed, nothing tokenised.

    Raises:
      ConfigError: a source that does not exist, has no text, or cannot be split.
    """
    names = [source.name for source in config.sources]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"data.sources[{i}].name", name, "is the name of another source", "choose another")
    return [_open_source(source, f"data.sources[{i}]", config, cache_dir) for i, source in enumerate(config.sources)]


def _open_source(source: SourceConfig, field: str, config: DataConfig, cache_dir: epath.Path) -> Source:
    has_files = bool(source.files or source.validation_files or source.test_files)
    if bool(source.tfds) == has_files:
        limit = "is set beside `files`" if has_files else "is empty, and so is `files`"
        raise ConfigError(f"{field}.tfds", source.tfds, limit, "set one of tfds and files")
    if source.installed_packages and source.tfds != "python_stdlib":
        raise ConfigError(f"{field}.installed_packages", True, "is for tfds=python_stdlib only", "set it to False")
    if source.tfds:
        splits = _tfds_splits(source, field, float(config.held_out_percent), cache_dir)
    else:
        splits = file_splits(source, field, float(config.held_out_percent))
    if source.weight and "train" not in splits:
        raise ConfigError(f"{field}.weight", source.weight, "the source has no training text", "set weight to 0")
    return Source(source.name, source.weight, splits)


def file_splits(source: SourceConfig, field: str, percent: float) -> dict[str, Split]:
    """Splits of a source of local files; `field` is its config path, for errors."""
    read = functools.partial(file_documents, document=source.document, text_feature=source.text_feature, field=field)
    settings = (source.document, source.text_feature)

    globs = {"train": source.files, "validation": source.validation_files, "test": source.test_files}
    fields = {
        "train": f"{field}.files",
        "validation": f"{field}.validation_files",
        "test": f"{field}.test_files",
    }
    files = {split: find_files(fields[split], glob) for split, glob in globs.items() if glob.strip(" ,")}
    splits = {}
    for split, found in files.items():
        whole = functools.partial(read, found)
        splits[split] = Split(functools.partial(_texts, whole), digest(files_digest(found), settings))
    if "train" not in files:
        return splits
    if not source.weight:
        everything = splits.pop("train")
        return {"validation": everything, "test": everything} | splits
    training = {str(path) for _, path in files["train"]}
    for split in ("validation", "test"):
        shared = [name for name, path in files.get(split, ()) if str(path) in training]
        if shared:
            raise ConfigError(fields[split], globs[split], f"{shared[0]} is in files too", "make the globs disjoint")
    missing = [split for split in ("validation", "test") if split not in files]
    whole = functools.partial(read, files["train"])
    return splits | _held_out(whole, splits["train"].digest, missing, percent, f"{field}.files", source.files)


def _texts(documents: Callable[[], Iterator[Document]], bounds=lambda: (0, HASHES)) -> Iterator[str | None]:
    low, high = bounds()
    return (text for key, text in documents() if low <= key < high)


def _held_out(
    documents: Callable[[], Iterator[Document]],
    whole: str,
    names: Sequence[str],
    percent: float,
    field: str,
    value: str,
) -> dict[str, Split]:
    """Splits `documents`, which have the digest `whole`, into `names` and "train"."""
    names = names if percent else ()

    @functools.cache
    def bounds() -> dict[str, tuple[int, int]]:
        try:
            return hold_out((key for key, text in documents() if text), names, percent)
        except ValueError as e:
            undecodable = sum(text is None for _, text in documents())
            limit = f"{e} ({undecodable} more are no UTF-8)" if undecodable else str(e)
            fix = "add documents, give validation_files and test_files, or set data.held_out_percent to 0"
            raise ConfigError(field, value, limit, fix) from e

    return {
        name: Split(
            functools.partial(_texts, documents, lambda name=name: bounds()[name]),
            digest("held out", whole, list(names), percent, name),
        )
        for name in ("train", *names)
    }


def _tfds_splits(source: SourceConfig, field: str, percent: float, cache_dir: epath.Path) -> dict[str, Split]:
    builder = _prepared_builder(source, field, percent, cache_dir)

    def documents(split: str) -> Iterator[Document]:
        rows = builder.as_data_source(split)
        for start in range(0, len(rows), 256):
            for row in rows.__getitems__(range(start, min(start + 256, len(rows)))):
                yield _tfds_document(row[source.text_feature], field, source.text_feature)

    splits = {}
    for name in SPLITS:
        info = builder.info.splits.get(name)
        if info and info.num_examples:
            texts = functools.partial(_texts, functools.partial(documents, name))
            identity = (builder.info.full_name, name, info.num_examples, info.num_bytes, source.text_feature)
            splits[name] = Split(texts, digest(*identity))
    if "train" not in splits:
        return splits
    if source.tfds == "python_stdlib":
        splits["train"].undecodable = int(builder.info.metadata["undecodable"])
    missing = [split for split in ("validation", "test") if split not in splits]
    if not source.weight:
        everything = splits.pop("train")
        return splits or {"validation": everything, "test": everything}
    if source.tfds == "python_stdlib" or not missing or not percent:
        return splits
    whole = functools.partial(documents, "train")
    return splits | _held_out(whole, splits["train"].digest, missing, percent, f"{field}.tfds", source.tfds)


def _tfds_document(text, field: str, text_feature: str) -> Document:
    if isinstance(text, str):
        return hash64(text), text
    if not isinstance(text, bytes):
        limit = f"is no text but {type(text).__name__}"
        raise ConfigError(f"{field}.text_feature", text_feature, limit, "choose a feature of text")
    try:
        return hash64(text), text.decode()
    except UnicodeDecodeError:
        return hash64(text), None


def _prepared_builder(source: SourceConfig, field: str, percent: float, cache_dir: epath.Path):
    """The builder of a TFDS dataset, its data prepared in a format with random access."""
    local = f"export the text to files and set {field}.files"
    try:
        if source.tfds == "python_stdlib":
            config = python_stdlib_config(percent, source.installed_packages)
            make_builder = functools.partial(PythonStdlib, config=config, data_dir=cache_dir / "tfds")
        else:
            make_builder = functools.partial(tfds.builder, source.tfds)
        with _quiet() if source.tfds == "python_stdlib" else contextlib.nullcontext():
            _check_feature(make_builder().info.features, source, field)
            builder = prepare(make_builder)
        builder.as_data_source(next(iter(builder.info.splits)))
    except ConfigError:
        raise
    except tfds.core.DatasetNotFoundError as e:
        raise ConfigError(f"{field}.tfds", source.tfds, "is no TFDS dataset", f"check the name, or {local}") from e
    except ImportError as e:
        needs = (e.name or str(e)).partition(".")[0]
        fix = f"{local}, or install {needs}"
        raise ConfigError(f"{field}.tfds", source.tfds, f"TFDS needs {needs} to prepare it", fix) from e
    except NotImplementedError as e:
        limit = f"is prepared in {builder.data_dir} in a format without random access"
        raise ConfigError(f"{field}.tfds", source.tfds, limit, f"delete it, or {local}") from e
    except (AssertionError, ValueError) as e:
        raise ConfigError(f"{field}.tfds", source.tfds, f"TFDS refuses it: {e}", local) from e
    except OSError as e:
        raise ConfigError(f"{field}.tfds", source.tfds, f"cannot be fetched or written: {e}", local) from e
    return builder


def _check_feature(features, source: SourceConfig, field: str) -> None:
    if source.text_feature not in features:
        texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
        fix = f"choose one of its texts: {', '.join(texts) or 'it has none'}"
        raise ConfigError(f"{field}.text_feature", source.text_feature, f"is no feature of {source.tfds}", fix)


def prepare(make_builder: Callable[[], tfds.core.DatasetBuilder]) -> tfds.core.DatasetBuilder:
    """Prepares a TFDS dataset and returns its builder; another process may prepare the same one meanwhile."""
    builder = make_builder()
    try:
        builder.download_and_prepare(file_format="array_record")
    except OSError:
        # The loser of a race cannot rename its folder over the winner's, which holds the same data.
        builder = make_builder()
        if not builder.is_prepared():
            raise
    return builder


@contextlib.contextmanager
def _quiet():
    """Holds back what TFDS prints about a dataset that takes a second to prepare."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        logging.set_verbosity(verbosity)
