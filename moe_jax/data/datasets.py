"""Splits of TFDS datasets, prepared where need be."""

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from etils import epath
from tensorflow_datasets.core.download import downloader

from moe_jax.config import ConfigError, SourceConfig
from moe_jax.config.leaf import one_line
from moe_jax.data.files import Document, LeftOut
from moe_jax.data.hashing import digest, hash64
from moe_jax.data.say import say
from moe_jax.data.splits import GLOBS, Split, all_texts, held_out
from moe_jax.data.stdlib import PythonStdlib, PythonStdlibConfig, python_stdlib_config

# TFDS tries each download 10 times by itself, which takes 3.4 minutes where there is no network.
DOWNLOAD_RETRIES = 3

# What array_record and TFDS raise for files that were cut or overwritten.
_DAMAGED = (RuntimeError, ValueError, IndexError, OSError)


def dataset_splits(source: SourceConfig, field: str, percent: float, cache_dir: epath.Path) -> dict[str, Split]:
    """Splits of a TFDS dataset: its own, and those held out of its training split.

    Args:
      source: its `tfds`.
      field: config path of the source, for errors.
      percent: share of documents in each of validation and test where the dataset has none; 0: none.
      cache_dir: folder of prepared data; of python_stdlib alone, others are where TFDS keeps them.

    Raises:
      ConfigError: no such dataset, no such feature, or it cannot be prepared.
    """
    builder = _prepared_builder(source, field, percent, cache_dir)

    def documents(split: str) -> Iterator[Document]:
        rows = builder.as_data_source(split)
        for start in range(0, len(rows), 256):
            try:
                some = rows.__getitems__(range(start, min(start + 256, len(rows))))
            except _DAMAGED as error:
                raise _damaged_files(builder, source, field) from error
            for row in some:
                yield _document(row[source.text_feature], source, field)

    splits = {}
    for name in GLOBS:
        info = builder.info.splits.get(name)
        if info and info.num_examples:
            texts = functools.partial(all_texts, functools.partial(documents, name))
            identity = (builder.info.full_name, name, info.num_examples, info.num_bytes, source.text_feature)
            splits[name] = Split(texts, digest(*identity))
    if "train" not in splits:
        return splits
    if source.tfds == "python_stdlib":
        if undecodable := int(builder.info.metadata["undecodable"]):
            splits["train"].left_out["not UTF-8"] = undecodable
    missing = [split for split in ("validation", "test") if split not in splits]
    if not source.weight:
        everything = splits.pop("train")
        return splits or {"validation": everything, "test": everything}
    if source.tfds == "python_stdlib" or not missing or not percent:
        return splits
    whole = functools.partial(documents, "train")

    def refuse(error: ValueError) -> ConfigError:
        return ConfigError(
            f"{field}.tfds", source.tfds, str(error), "take a dataset with more documents, or with splits of its own"
        )

    return splits | held_out(whole, splits["train"].digest, missing, percent, refuse)


def _document(text, source: SourceConfig, field: str) -> Document:
    if isinstance(text, str):
        return hash64(text), text
    if text is None:
        return 0, LeftOut("null text", source.tfds)
    if not isinstance(text, bytes):
        limit = f"is no text but {type(text).__name__}"
        raise ConfigError(f"{field}.text_feature", source.text_feature, limit, "choose a feature of text")
    try:
        return hash64(text), text.decode()
    except UnicodeDecodeError:
        return hash64(text), LeftOut("not UTF-8", source.tfds)


def _prepared_builder(source: SourceConfig, field: str, percent: float, cache_dir: epath.Path) -> tfds.core.DatasetBuilder:
    """The builder of a TFDS dataset, its data prepared in a format with random access."""
    local = f"export the text to files and set {field}.files"
    try:
        if source.tfds == "python_stdlib":
            builder = _prepared_stdlib(python_stdlib_config(percent, source.installed_packages), cache_dir)
            _check_feature(builder.info.features, source, field)
            return builder
        make_builder = functools.partial(tfds.builder, source.tfds)
        builder = make_builder()
        if isinstance(builder, PythonStdlib):
            limit = "names a version or a spelling of python_stdlib, which is what this Python has and no other"
            raise ConfigError(f"{field}.tfds", source.tfds, limit, "write python_stdlib")
        _check_feature(builder.info.features, source, field)
        builder = prepare(make_builder)
    except ConfigError:
        raise
    except tfds.core.DatasetNotFoundError as e:
        raise ConfigError(f"{field}.tfds", source.tfds, "is no TFDS dataset", f"check the name, or {local}") from e
    except ImportError as e:
        needs = (e.name or str(e)).partition(".")[0]
        fix = f"{local}, or install {needs}"
        raise ConfigError(f"{field}.tfds", source.tfds, f"TFDS needs {needs} to prepare it", fix) from e
    except (AssertionError, ValueError) as e:
        fix = "write python_stdlib" if source.tfds.strip().startswith("python_stdlib") else local
        raise ConfigError(f"{field}.tfds", source.tfds, f"TFDS refuses it: {e}", fix) from e
    except OSError as e:
        raise ConfigError(f"{field}.tfds", source.tfds, f"cannot be fetched or written: {e}", local) from e
    try:
        _read_ends(builder)
    except NotImplementedError as e:
        limit = f"is prepared in {builder.data_dir} in a format without random access"
        raise ConfigError(f"{field}.tfds", source.tfds, limit, f"delete it, or {local}") from e
    except _DAMAGED as e:
        raise _damaged_files(builder, source, field) from e
    return builder


def _prepared_stdlib(config: PythonStdlibConfig, cache_dir: epath.Path) -> PythonStdlib:
    """The builder of python_stdlib, prepared in `cache_dir`: again where its files there are damaged."""
    make_builder = functools.partial(PythonStdlib, config=config, data_dir=cache_dir / "tfds")
    folder = cache_dir / "tfds" / "python_stdlib" / config.name
    with _quiet():
        for attempt in range(2):
            try:
                builder = prepare(make_builder)
                _read_ends(builder)
                return builder
            except OSError as e:
                fix = "make room there, or name another folder"
                raise ConfigError("data.cache_dir", str(cache_dir), f"cannot be written: {e.strerror or e}", fix) from e
            except Exception as e:  # whatever TFDS makes of files that are not what it wrote
                if attempt or not folder.exists():
                    raise
                say(f"python_stdlib in {folder} is damaged and is prepared again: {one_line(e, 200)}")
                folder.rmtree()


def _read_ends(builder: tfds.core.DatasetBuilder) -> None:
    """Reads the last row of each split, which a file that was cut has lost: it raises, or gives a row of nothing."""
    for name, info in builder.info.splits.items():
        if info.num_examples:
            row = builder.as_data_source(name)[info.num_examples - 1]
            if all(value is None for value in row.values()):
                raise ValueError(f"row {info.num_examples - 1} of {name} is lost")


def _damaged_files(builder: tfds.core.DatasetBuilder, source: SourceConfig, field: str) -> ConfigError:
    limit = f"its prepared files in {builder.data_dir} are damaged"
    return ConfigError(f"{field}.tfds", source.tfds, limit, "delete that folder, and it is prepared again")


def _check_feature(features, source: SourceConfig, field: str) -> None:
    if source.text_feature not in features:
        texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
        fix = f"choose one of its texts: {', '.join(texts) or 'it has none'}"
        raise ConfigError(f"{field}.text_feature", source.text_feature, f"is no feature of {source.tfds}", fix)


def prepare(make_builder: Callable[[], tfds.core.DatasetBuilder]) -> tfds.core.DatasetBuilder:
    """Prepares a TFDS dataset and returns its builder; another process may prepare the same one meanwhile."""
    builder = make_builder()
    try:
        with _few_retries():
            builder.download_and_prepare(file_format="array_record")
    except OSError:
        # The loser of a race cannot rename its folder over the winner's, which holds the same data.
        builder = make_builder()
        if not builder.is_prepared():
            raise
    return builder


@contextlib.contextmanager
def _few_retries():
    kept, log = downloader.MAX_RETRIES, logging.getLogger("urllib3")
    level = log.level
    downloader.MAX_RETRIES = min(DOWNLOAD_RETRIES, kept)
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        downloader.MAX_RETRIES = kept
        log.setLevel(level)


@contextlib.contextmanager
def _quiet():
    """Holds back what TFDS prints about a dataset that takes a second to prepare."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        absl_logging.set_verbosity(verbosity)
