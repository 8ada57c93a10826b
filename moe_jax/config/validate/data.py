"""Sources of text."""

import re

from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.config.leaf import ConfigError

SMALLEST_SHARE = 1e-9
_SOURCE_NAME = re.compile(r"[\w.-]+", re.ASCII)


def check_data(data: DataConfig) -> None:
    if not data.sources:
        raise ConfigError("data.sources", data.sources, "there is no source", "add a SourceConfig")
    names = [source.name for source in data.sources]
    for i, source in enumerate(data.sources):
        if names.index(source.name) != i:
            limit = f"the name of data.sources[{names.index(source.name)}] too"
            raise ConfigError(f"data.sources[{i}].name", source.name, limit, "rename one")
        _check_source(f"data.sources[{i}].", source, data.held_out_percent)
    if not any(source.weight for source in data.sources):
        raise ConfigError("data.sources[0].weight", 0.0, "all weights are 0", "give one source a weight above 0")
    largest = max(source.weight for source in data.sources)
    for i, source in enumerate(data.sources):
        if 0 < source.weight < SMALLEST_SHARE * largest:
            limit = f"less than {SMALLEST_SHARE} of the largest weight, {largest}: no row of it would be drawn"
            raise ConfigError(f"data.sources[{i}].weight", source.weight, limit, "raise it, or use 0 for evaluation only")


def _check_source(path: str, source: SourceConfig, held_out_percent: float) -> None:
    if not _SOURCE_NAME.fullmatch(source.name):
        raise ConfigError(path + "name", source.name, "not a label", "use letters, digits, '_', '-' and '.'")
    for name in ("files", "validation_files", "test_files"):
        globs = getattr(source, name)
        if globs and not all(glob.strip() for glob in globs.split(",")):
            raise ConfigError(path + name, globs, "an empty glob between commas", "remove the extra comma")
    held_out = source.validation_files, source.test_files
    if source.tfds and source.files:
        raise ConfigError(path + "files", source.files, f"excludes {path}tfds={source.tfds}", "empty one of them")
    if not source.tfds and not source.files and (source.weight or not any(held_out)):
        limit = f"the source {source.name} has no text, and neither has {path}tfds"
        raise ConfigError(path + "files", source.files, limit, "set one of them")
    if source.files and source.weight and not all(held_out) and not held_out_percent:
        empty = "test_files" if source.validation_files else "validation_files"
        limit = f"holds nothing out for {path}{empty}, which is empty"
        raise ConfigError("data.held_out_percent", held_out_percent, limit, "raise it or name the files")
    if source.installed_packages and source.tfds != "python_stdlib":
        limit = f"only for python_stdlib, not {path}tfds={source.tfds!r}"
        raise ConfigError(path + "installed_packages", True, limit, "switch it off")
    if not source.text_feature.strip():
        raise ConfigError(path + "text_feature", source.text_feature, "no name", "name the text, such as 'text'")
