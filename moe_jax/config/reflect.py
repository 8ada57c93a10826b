"""A config as a tree: its leaves by dotted path, as nested dicts, and where two differ."""

import dataclasses
import difflib
import importlib
import itertools
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from moe_jax.config.leaf import ConfigError
from moe_jax.config.run import Config


def item_type(leaf: dataclasses.Field) -> type | None:
    """The dataclass of the items of a tuple field; None: not a tuple."""
    return typing.get_args(leaf.type)[0] if typing.get_origin(leaf.type) is tuple else None


def leaves(section: Any, path: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """All leaves of a config or section as (dotted path, the object that holds it, field), in file order."""
    for entry in dataclasses.fields(section):
        name, value = f"{path}{entry.name}", getattr(section, entry.name)
        if item_type(entry):
            for i, item in enumerate(value):
                yield from leaves(item, f"{name}[{i}].")
        elif dataclasses.is_dataclass(entry.type):
            yield from leaves(value, f"{name}.")
        else:
            yield name, section, entry


def leaf_fields(section: type = Config, path: str = "") -> dict[str, dataclasses.Field]:
    """Dotted path -> field of all leaves there can be, with '[]' for any item of a tuple."""
    leaves = {}
    for entry in dataclasses.fields(section):
        if item := item_type(entry):
            leaves |= leaf_fields(item, f"{path}{entry.name}[].")
        elif dataclasses.is_dataclass(entry.type):
            leaves |= leaf_fields(entry.type, f"{path}{entry.name}.")
        else:
            leaves[f"{path}{entry.name}"] = entry
    return leaves


def role(path: str) -> str:
    """The role of the field at a path such as 'data.sources[0].weight'; "" also of a whole section or item."""
    leaf = leaf_fields().get(re.sub(r"\[\d+\]", "[]", path))
    return leaf.metadata["role"] if leaf else ""


def nearest(path: str, known: Iterable[str]) -> str:
    """The known dotted path most like `path`, by its last name first; empty: none is close."""

    def likeness(candidate: str) -> tuple[float, float]:
        last, whole = path.rpartition(".")[2], difflib.SequenceMatcher(None, path, candidate).ratio()
        return difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio(), whole

    best = max(known, key=likeness, default="")
    return best if best and max(likeness(best)) >= 0.6 else ""


def unknown_field(path: str, value: Any, known: Iterable[str]) -> ConfigError:
    """The error for a field that does not exist, with the nearest one that does."""
    near = nearest(path, known)
    fix = f"did you mean config.{near}?" if near else "--config.help lists all fields"
    return ConfigError(path, value, "no such field", fix)


def to_dict(config: Any) -> Any:
    """A config, or a section of one, as nested dicts, lists and plain values, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {entry.name: to_dict(getattr(config, entry.name)) for entry in dataclasses.fields(config)}
    return [to_dict(item) for item in config] if isinstance(config, tuple) else config


def from_dict(tree: dict[str, Any]) -> Config:
    """The config that `to_dict` wrote. Fields that are missing take their defaults, so older files load.

    Raises:
      ConfigError: `tree` has a field that does not exist, or no section where one is due. Leaf values are left
        to `moe_jax.config.validate.validate`.
    """
    if isinstance(tree, dict) and isinstance(plugins := tree.get("plugins", ""), str):
        import_plugins(plugins)
    return _section_from_dict(Config, tree, "")


def import_plugins(names: str) -> None:
    """Imports the modules of `config.plugins`, so that the routers that they register are there.

    Raises:
      ConfigError: one cannot be imported.
    """
    for name in filter(None, names.split(",")):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module raises
            limit = f"cannot be imported ({type(error).__name__}: {error})"
            raise ConfigError("plugins", name, limit, "name a module on PYTHONPATH, or mend it") from error


def _section_from_dict(section: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(path.rstrip(".") or "config", tree, "not a section", "give its fields as a JSON object")
    entries = {entry.name: entry for entry in dataclasses.fields(section)}
    made = section()
    for name, value in tree.items():
        if name not in entries:
            raise unknown_field(f"{path}{name}", value, [f"{path}{known}" for known in entries])
        if item := item_type(entries[name]):
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{path}{name}", value, "not a list", "give its items as a JSON list")
            value = tuple(_section_from_dict(item, x, f"{path}{name}[{i}].") for i, x in enumerate(value))
        elif dataclasses.is_dataclass(entries[name].type):
            value = _section_from_dict(entries[name].type, value, f"{path}{name}.")
        setattr(made, name, value)
    return made


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old value, new value) of all fields that differ.

    Tuples are compared item by item ('data.sources[0].weight'); an item that only one side has is one entry,
    its fields in a dict against None.
    """
    return _differences(to_dict(old), to_dict(new), "")


def _differences(old: Any, new: Any, path: str) -> dict[str, tuple[Any, Any]]:
    changed = {}
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            changed |= _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(itertools.zip_longest(old, new)):
            changed |= _differences(a, b, f"{path}[{i}]")
    elif old != new:
        changed[path] = (old, new)
    return changed
