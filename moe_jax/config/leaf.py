"""A leaf of the configuration, and the error of one that cannot work."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

# What a field may change in a run that has begun. "start": nothing, it shapes the first parameters of a new one. "runtime": how
# it runs, no number. "rounding": the last bits of numbers too. "scoring": what evaluation computes, but no shape of what was
# trained. The first three may change on resume.
ROLES = ("start", "runtime", "rounding", "scoring")
ON_RESUME = ROLES[:3]  # may change


def field(
    default: Any, doc: str, *, choices: Sequence = (), low: float | None = None, high: float | None = None, role: str = ""
) -> Any:
    """A config leaf with its documentation, limits (`low` and `high` are inclusive) and role.

    role: one of `ROLES`; "": another value makes another run.
    """
    assert role in ("", *ROLES), role
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high, "role": role})


class ConfigError(ValueError):
    """A setting that cannot work: which field, its value, the limit it breaks and what to do, in one line.

    Args:
      field: dotted path of the field, with or without the leading `config.`; or a flag such as `--workdir`.
      value: the offending value, shortened where long; None: there is none to show.
      limit: what the value breaks.
      fix: what to do instead.
    """

    def __init__(self, field: str, value: Any, limit: str, fix: str):
        self.field, self.value, self.limit, self.fix = field, value, limit, fix
        is_path = field.split(".")[0] != "config" and not field.startswith("-") and " " not in field
        name = f"config.{field}" if is_path else field
        text = one_line(value if isinstance(value, str) and value else repr(value))
        head = one_line(name, 200) if value is None else f"{one_line(name, 200)}={text}"
        super().__init__(f"{head}: {one_line(limit, 400)}; {one_line(fix, 400)}")

    def __reduce__(self):  # an exception with its own arguments does not otherwise survive a worker process
        return type(self), (self.field, self.value, self.limit, self.fix)


def one_line(value: Any, width: int = 80) -> str:
    """`value` as text on one line: control characters escaped, the middle of a long text left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    return text if len(text) <= width else f"{text[: width // 2]}...{text[len(text) - width // 2 + 3 :]}"


def shorten_list(items: Iterable[str], limit: int = 4) -> str:
    """The first `limit` items with commas between them, and how many more there are."""
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
