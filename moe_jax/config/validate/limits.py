"""The types and limits of a config's fields, each looked at alone."""

import dataclasses
import math
from typing import Any

from moe_jax.config.leaf import ConfigError
from moe_jax.config.reflect import item_type, unknown_field
from moe_jax.config.run import Config

# Steps compute in float32: a larger number would be infinite there.
FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127


def validate_types(config: Any) -> None:
    """Checks that every field exists and has its type; an int in a float field becomes a float, a list a tuple.

    Raises:
      ConfigError: one line with the field, its value, the limit and the fix.
    """
    if not isinstance(config, Config):
        raise ConfigError("config", repr(config), f"a {type(config).__name__}", "make a moe_jax.config.Config")
    _check_types(config, "")


def _check_types(section: Any, path: str) -> None:
    entries = {entry.name: entry for entry in dataclasses.fields(section)}
    for name in vars(section):
        if name not in entries:  # plain classes take any attribute, so a misspelt one would be without effect
            raise unknown_field(f"{path}{name}", getattr(section, name), [f"{path}{known}" for known in entries])
    for name, entry in entries.items():
        value = getattr(section, name)
        if item := item_type(entry):
            if not isinstance(value, list | tuple):
                raise ConfigError(path + name, repr(value), "not a tuple", f"write a tuple of {item.__name__}")
            setattr(section, name, tuple(value))
            for i, element in enumerate(value):
                _check_section(element, item, f"{path}{name}[{i}]")
        elif dataclasses.is_dataclass(entry.type):
            _check_section(value, entry.type, path + name)
        else:
            setattr(section, name, check_type(path + name, value, entry))


def check_type(path: str, value: Any, leaf: dataclasses.Field) -> Any:
    """`value`, an int as a float where the leaf has one."""
    if leaf.type is float and type(value) is int:
        return float(value)
    if not isinstance(value, leaf.type) or (isinstance(value, bool) and leaf.type is not bool):
        limit = f"a {type(value).__name__}, not {_with_article(leaf.type)}"
        raise ConfigError(path, repr(value), limit, f"write {example(leaf)}")
    return value


def _check_section(value: Any, kind: type, path: str) -> None:
    if type(value) is not kind:
        limit = f"a {type(value).__name__}, not a {kind.__name__}"
        raise ConfigError(path, repr(value), limit, "set its fields instead")
    _check_types(value, f"{path}.")


def _with_article(kind: type) -> str:
    return f"an {kind.__name__}" if kind is int else f"a {kind.__name__}"


def example(leaf: dataclasses.Field) -> str:
    """What to write into a leaf, for a message: '1 or more', 'true or false', 'one of gather, ring', ..."""
    low, high, choices = leaf.metadata["low"], leaf.metadata["high"], leaf.metadata["choices"]
    if choices:
        return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
    if leaf.type is bool:
        return "true or false"
    if low is not None and high is not None:
        return f"{_with_article(leaf.type)} from {low} to {high}"
    if low is not None:
        return f"{_with_article(leaf.type)} of {low} or more"
    return f"{_with_article(leaf.type)} of {high} or less" if high is not None else _with_article(leaf.type)


def check_limits(path: str, value: Any, limits: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(path, value, "not a finite number", "write a finite number")
    if isinstance(value, float) and abs(value) > FLOAT32_MAX:
        fix = f"lower it to {FLOAT32_MAX:.2g} or less"
        raise ConfigError(path, value, f"at most {FLOAT32_MAX:.2g}, the largest float32", fix)
    low, high, choices = limits["low"], limits["high"], limits["choices"]
    if choices and value not in choices:
        raise ConfigError(path, value, "not a choice", f"choose {' or '.join(map(str, choices))}")
    if low is not None and value < low:
        raise ConfigError(path, value, f"at least {low}", f"raise it to {low} or more")
    if high is not None and value > high:
        raise ConfigError(path, value, f"at most {high}", f"lower it to {high} or less")
