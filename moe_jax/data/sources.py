"""Named sources of text: local files and TFDS datasets, each with its splits."""

import dataclasses

from etils import epath

from moe_jax.config import ConfigError, DataConfig, SourceConfig
from moe_jax.data.datasets import dataset_splits
from moe_jax.data.splits import Split, file_splits

SPLITS = ("train", "validation", "test")


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
        splits = dataset_splits(source, field, float(config.held_out_percent), cache_dir)
    else:
        fields = {entry.name: f"{field}.{entry.name}" for entry in dataclasses.fields(source)}
        splits = file_splits(source, fields, float(config.held_out_percent))
    if source.weight and "train" not in splits:
        raise ConfigError(f"{field}.weight", source.weight, "the source has no training text", "set weight to 0")
    return Source(source.name, source.weight, splits)
