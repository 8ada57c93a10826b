"""The texts of `--help` and `--config.help`."""

import dataclasses
import textwrap
from typing import Any

from absl import flags as absl_flags

from moe_jax.config.leaf import one_line
from moe_jax.config.reflect import item_type
from moe_jax.config.run import Config

_COLUMNS = 120


def command_help(doc: str, values: absl_flags.FlagValues, config_from: str) -> str:
    """A command's help: the docstring of its module, its own flags, and how to set a field of the config."""
    names = {name: f"--[no]{name}" if values[name].boolean else f"--{name}=VALUE" for name in values}
    lines = [_row(names[name], _flag_text(values[name])) for name in values]
    if config_from != "workdir":
        lines.insert(0, _row("--config=FILE", "Python file with get_config(); FILE:TEXT calls get_config(TEXT)."))
    lines.append(_row("--config.a.b=VALUE", "Sets one field of the config, such as --config.model.moe.top_k=1."))
    lines.append(_row("--config.help", "Lists every field of the config with its value and documentation."))
    lines.append(_row("--help", "Shows this."))
    return "\n".join([doc.strip(), "", "Flags:", *lines])


def _flag_text(flag: absl_flags.Flag) -> str:
    text = flag.help or ""
    if getattr(flag.parser, "enum_values", None):
        text += f" One of {', '.join(flag.parser.enum_values)}."
    return text if flag.default in (None, "", False) else f"{text} Default: {one_line(flag.default)}."


def _row(name: str, text: str, indent: int = 24) -> str:
    head = f"  {name}"
    head = head + " " * (indent - len(head)) if len(head) < indent else f"{head}\n{' ' * indent}"
    body = textwrap.wrap(text, _COLUMNS - indent)
    return (head + f"\n{' ' * indent}".join(body)).rstrip()


def config_help(config: Config) -> str:
    """Every field of a config, by section, with its value, type, documentation, choices and range."""
    return "\n".join(_section_help(config, "config.", {}))


def _section_help(section: Any, path: str, shown: dict[type, str], note: str = "") -> list[str]:
    """The lines of a section and of those in it. A note says that the section is absent; types in `shown` are only named."""
    shown = {type(section): path.rstrip("."), **shown}
    rows, sections = [], []
    for entry in dataclasses.fields(section):
        name, value = f"{path}{entry.name}", getattr(section, entry.name)
        if item := item_type(entry):
            for i, element in enumerate(value):
                sections += _section_help(element, f"{name}[{i}].", shown)
            if not value:
                sections += _section_help(item(), f"{name}[i].", shown, " There is none; add items in the config file.")
        elif note and entry.type in shown:
            sections += [f"{name}: with the fields of {shown[entry.type]}.", ""]
        elif dataclasses.is_dataclass(entry.type):
            sections += _section_help(value, f"{name}.", shown)
            shown.setdefault(entry.type, name)
        else:
            rows.append((f"{name} = {_shown(value)}", entry.type.__name__, _doc(entry.metadata)))
    width = max((len(name) for name, _, _ in rows), default=0)
    indent = 2 + width + 2 + 6
    title = (type(section).__doc__ or "").strip().splitlines()[0]
    lines = textwrap.wrap(f"{path.rstrip('.')}: {title}{note}", _COLUMNS)
    for name, kind, doc in rows:
        body = textwrap.wrap(doc, max(_COLUMNS - indent, 40))
        lines.append(f"  {name:{width}}  {kind:5} " + f"\n{' ' * indent}".join(body))
    return [*lines, "", *sections]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return one_line(value if isinstance(value, str) and value else repr(value), 32)


def _doc(metadata: Any) -> str:
    low, high = metadata["low"], metadata["high"]
    if metadata["choices"]:
        return f"{metadata['doc']} ({' | '.join(map(str, metadata['choices']))})"
    if low is not None and high is not None:
        return f"{metadata['doc']} ({low} to {high})"
    if low is not None:
        return f"{metadata['doc']} ({low} or more)"
    return metadata["doc"] if high is None else f"{metadata['doc']} ({high} or less)"
