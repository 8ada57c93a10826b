"""The arguments of the library's layers, held to the limits of the config's fields."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.config.validate.limits import check_limits, check_type


def limited_fields(section: type, without: Sequence[str] = ()) -> dict[str, tuple[type, str]]:
    """The leaves of a section, under their own names, for `check_arguments`."""
    entries = (entry for entry in dataclasses.fields(section) if "choices" in entry.metadata)
    return {entry.name: (section, entry.name) for entry in entries if entry.name not in without}


def check_arguments(what: str, arguments: Mapping[str, Any], fields: Mapping[str, tuple[type, str]]) -> None:
    """Refuses an argument whose type or value the config refuses.

    Args:
      what: the layer's name, which stands before the argument's in the message.
      arguments: name -> value. A scalar of NumPy counts as Python's; None counts as "auto" where that is a choice.
      fields: name -> (section of the config, its field of the same meaning) of those that are looked at.

    Raises:
      ConfigError: a ValueError of one line with the argument, its value, the limit and the fix.
    """
    for name, (section, entry) in fields.items():
        value, leaf = arguments[name], section.__dataclass_fields__[entry]
        value = value.item() if hasattr(value, "item") else value
        if value is None and "auto" in leaf.metadata["choices"]:
            continue
        check_limits(f"{what} {name}", check_type(f"{what} {name}", value, leaf), leaf.metadata)
