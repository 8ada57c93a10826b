"""Overrides of single fields, such as '--config.model.moe.top_k=1'."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import config_flags

from moe_jax.config.leaf import ConfigError
from moe_jax.config.reflect import import_plugins, leaves, unknown_field
from moe_jax.config.run import Config
from moe_jax.config.validate.limits import example

OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
ILLEGAL_VALUE = re.compile(r"flag --([^=]*)=(.*?): (.*)", re.DOTALL)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of `config` with overrides such as '--config.seed=3' or '--noconfig.model.scan', not validated.

    Raises:
      ConfigError: no such field, or a value of another type.
    """
    texts = {}
    for override in overrides:
        if (match := OVERRIDE.fullmatch(override)) and match[2] == "plugins":
            import_plugins(match[3] or "")
    fields = {path: leaf for path, _, leaf in leaves(config)}
    for override in overrides:  # ml_collections would raise a KeyError while parsing
        match = OVERRIDE.fullmatch(override)
        if not match:
            raise ConfigError(f"argument {override!r}", None, "not an override", "write --config.a.b=VALUE")
        negated, path, text = match.groups()
        if path not in fields:
            raise _not_a_leaf(path, text, fields, config)
        if negated and (fields[path].type is not bool or text is not None):
            raise ConfigError(f"--noconfig.{path}", text, "only switches a bool off", f"write --config.{path}=VALUE")
        texts[path] = text
    argv, values = ["", *overrides], absl_flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except absl_flags.IllegalFlagValueError as error:
        path = ILLEGAL_VALUE.fullmatch(str(error))[1].removeprefix("config.")
        kind = "an int" if fields[path].type is int else f"a {fields[path].type.__name__}"
        raise ConfigError(path, texts[path], f"not {kind}", f"write {example(fields[path])}") from None
    return holder.value


def _not_a_leaf(path: str, text: str | None, fields: dict[str, Any], config: Config) -> ConfigError:
    match = re.fullmatch(r"([\w.]*)(?:\[(\d*)\].*)?", path)
    try:
        items = functools.reduce(getattr, match[1].split("."), config) if match else None
    except AttributeError:
        items = None
    if isinstance(items, tuple) and not (match[2] and int(match[2]) < len(items)):
        limit = f"{match[1]} has {len(items)} item{'s' if len(items) != 1 else ''}, counted from [0]"
        return ConfigError(path, text, limit, "set a field of one, or add items in the config file")
    inside = [field for field in fields if field.startswith(f"{path}.")]
    if inside:
        return ConfigError(path, text, "a section, not a field", f"set one field, such as config.{inside[0]}")
    return unknown_field(path, text, fields)
