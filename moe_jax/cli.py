"""The command line of every command: one parser, and one line with exit code 2 for everything it cannot use.

A command is a function `main(config, flags)` in a module whose docstring is its help:

    def main(config, flags):
        import jax  # after the flags are known to be good, so that --help and a typo answer at once
        ...

    if __name__ == "__main__":
        cli.run(main)

`--config=FILE` names a Python file with `get_config()`; `--config=FILE:TEXT` calls `get_config(TEXT)`.
Any field is set by `--config.model.moe.top_k=1` or `--config.data.sources[0].weight=3`;
`--config.help` lists all fields.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags
from etils import epath

from moe_jax.config import Config, ConfigError, leaf_fields, nearest
from moe_jax.config.flags import ILLEGAL_VALUE, OVERRIDE, apply_overrides
from moe_jax.config.help import command_help, config_help
from moe_jax.config.load import describe, load_config, load_saved_config, load_study, run_folder
from moe_jax.config.study import Study
from moe_jax.config.validate import validate

_HELP = re.compile(r"--?(h|help|helpshort|helpfull)")
_CONFIG_HELP = re.compile(r"--?config\.help")
_CONFIG = re.compile(r"--?config(?:=(.*))?", re.DOTALL)
_BOOLEANS = ("true", "false", "t", "f", "1", "0")


def run(
    main: Callable[[Any, absl_flags.FlagValues], int | None],
    argv: Sequence[str] | None = None,
    *,
    flags: Callable[[absl_flags.FlagValues], None] | None = None,
    config_from: str = "file",
    workdir: bool = True,
) -> NoReturn:
    """Parses and validates the command line, calls `main(config, flags)`, exits with its result (None: 0).

    A `ConfigError`, from here or from `main`, is one line on stderr and exit code 2, Ctrl-C is 130; any other
    exception is a bug and keeps its traceback.

    Args:
      main: the command. The docstring of its module is the text of `--help`.
      argv: as `sys.argv`, program name first; None: `sys.argv`.
      flags: defines the command's own flags on the `absl.flags.FlagValues` it is given, such as
        `lambda values: absl.flags.DEFINE_string("prompt", "", "Text to continue.", flag_values=values)`.
      config_from: "file": --config is required; "workdir": the config is the one saved in --workdir; "study":
        `main` gets the `Study` of the --config file with the overrides in its bases, or None without --config.
      workdir: whether there is a --workdir. It is required, and need not exist where `config_from` is "file".

    Raises:
      SystemExit: always.
    """
    argv = list(sys.argv if argv is None else argv)
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()  # libraries such as grain read global flags of their own
    try:
        if any(_HELP.fullmatch(argument) for argument in argv[1:]):
            doc = sys.modules[main.__module__].__doc__ or ""
            _show(command_help(doc, own_flags(flags, workdir), config_from))
            code = 0
        elif any(_CONFIG_HELP.fullmatch(argument) for argument in argv[1:]):
            _show(config_help(_config_to_list(argv, own_flags(flags, workdir), config_from)))
            code = 0
        else:
            code = main(*parse(argv, flags=flags, config_from=config_from, workdir=workdir)) or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(
    argv: Sequence[str],
    *,
    flags: Callable[[absl_flags.FlagValues], None] | None = None,
    config_from: str = "file",
    workdir: bool = True,
) -> tuple[Any, absl_flags.FlagValues]:
    """The validated config (or the study) and the command's own flags; the arguments are those of `run`.

    Raises:
      ConfigError: anything on the command line, or in the file it names, that cannot be used.
    """
    values = own_flags(flags, workdir)
    arguments, overrides, file = _split(argv, values)
    _parse_flags(arguments, values)
    if config_from == "file":
        if not file:
            raise ConfigError("--config", None, "not given", "write --config=FILE, such as configs/quickstart.py")
    elif config_from == "workdir" and file is not None:
        limit = "this command reads the config that training saved in --workdir"
        raise ConfigError("--config", file, limit, "change single fields with --config.a.b=VALUE")
    if workdir and values.workdir:
        values.workdir = str(run_folder(values.workdir))  # no shell expands the ~ of --workdir=~/run
    folder = _check_workdir(values.workdir, must_exist=config_from == "workdir") if workdir else None
    if config_from == "study":
        return _open_study(file, overrides), values
    config = load_config(file) if config_from == "file" else load_saved_config(folder)
    config = apply_overrides(config, overrides)
    validate(config)
    return config, values


def _open_study(file: str | None, overrides: Sequence[str]) -> Study | None:
    if not file:
        if overrides or file is not None:
            fix = "write --config=FILE, such as configs/studies/routers.py"
            raise ConfigError("--config", None, "not given", fix)
        return None
    study = load_study(file)
    paths = {OVERRIDE.fullmatch(text)[2] for text in overrides}
    full = {path: value for path, value in study.full.items() if path not in paths}
    return dataclasses.replace(study.with_bases(lambda base: apply_overrides(base, overrides)), full=full)


def own_flags(define: Callable[[absl_flags.FlagValues], None] | None, workdir: bool = True) -> absl_flags.FlagValues:
    """The flags of one command, unparsed and private: commands share none, and may run twice in a process."""
    values = absl_flags.FlagValues()
    values.set_gnu_getopt()
    if workdir:
        doc = "Folder of the run: config, checkpoints, metrics. Local or gs://."
        absl_flags.DEFINE_string("workdir", None, doc, flag_values=values)
    if define:
        define(values)
    return values


def _split(argv: Sequence[str], values: absl_flags.FlagValues) -> tuple[list[str], list[str], str | None]:
    """The command's own arguments, program name first; overrides as '--config.a.b=value'; and --config."""
    try:
        rest = values.read_flags_from_files(list(argv[1:]))
    except absl_flags.Error as error:
        raise ConfigError("--flagfile", None, str(error), "name a readable file of flags") from None
    own, overrides, file, fields = [argv[0]], [], None, leaf_fields()
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*own, argument, *rest], overrides, file
        if match := _CONFIG.fullmatch(argument):
            file = match[1] if match[1] is not None else rest.pop(0) if rest else ""
        elif match := OVERRIDE.fullmatch(argument):
            negated, path, text = match.groups()
            if negated:
                overrides.append(argument)
                continue
            if text is None:
                text = _next_value(path, fields.get(re.sub(r"\[\d+\]", "[]", path)), rest)
            overrides.append(f"--config.{path}={text}")
        else:
            own.append(argument)
            name = argument.lstrip("-")
            if argument.startswith("-") and name in values and not values[name].boolean and rest:
                own.append(rest.pop(0))
    return own, overrides, file


def _next_value(path: str, leaf: dataclasses.Field | None, rest: list[str]) -> str:
    """The value after a lone `--config.a.b`, taken from `rest`. absl reads `--config.a.b false` as true."""
    if leaf and leaf.type is bool:
        return rest.pop(0) if rest and rest[0].lower() in _BOOLEANS else "true"
    if not rest:
        raise ConfigError(path, None, "no value", f"write --config.{path}=VALUE")
    return rest.pop(0)


def _parse_flags(arguments: Sequence[str], values: absl_flags.FlagValues) -> None:
    try:
        rest = values(arguments)[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, arguments, values) from None
    except absl_flags.Error as error:
        match = ILLEGAL_VALUE.fullmatch(str(error))
        if not match:
            raise ConfigError("command line", None, str(error), "--help lists the flags") from None
        value = None if match[2] == "None" else match[2]
        raise ConfigError(f"--{match[1]}", value, match[3].rstrip("."), "--help lists the flags") from None
    if rest:
        raise ConfigError(f"argument {rest[0]!r}", None, "not a flag", "write --name=VALUE")


def _unknown_flag(name: str, arguments: Sequence[str], values: absl_flags.FlagValues) -> ConfigError:
    written = next((argument for argument in arguments if argument.lstrip("-").startswith(f"{name}=")), "")
    near = difflib.get_close_matches(name, [*values, "config"], n=1)
    field = nearest(name, leaf_fields())
    if near:
        fix = f"did you mean --{near[0]}?"
    else:
        fix = f"did you mean --config.{field}?" if field else "--help lists the flags"
    return ConfigError(f"--{name}", written.partition("=")[2] if written else None, "no such flag", fix)


def _check_workdir(path: str | None, must_exist: bool) -> epath.Path:
    if not path:
        raise ConfigError("--workdir", None, "not given", "write --workdir=DIR, such as --workdir=runs/first")
    try:
        folder = epath.Path(path)
        exists, is_folder = folder.exists(), folder.is_dir()
    except Exception as error:  # whatever the backend of gs:// raises
        raise ConfigError("--workdir", path, describe(error), "name a folder that can be opened") from None
    if exists and not is_folder:
        raise ConfigError("--workdir", path, "a file, not a folder", "name a folder")
    if must_exist and not exists:
        raise ConfigError("--workdir", path, "no such folder", "name the --workdir of a training run")
    return folder


def _config_to_list(argv: Sequence[str], values: absl_flags.FlagValues, config_from: str) -> Config:
    """The config of a command line with --config.help: the defaults where no file or folder is named."""
    arguments, overrides, file = _split([a for a in argv if not _CONFIG_HELP.fullmatch(a)], values)
    _parse_flags(arguments, values)
    if file:
        config = load_study(file).base if config_from == "study" else load_config(file)
    elif config_from == "workdir" and values.workdir:
        config = load_saved_config(_check_workdir(values.workdir, must_exist=True))
    else:
        config = Config()
    return apply_overrides(config, overrides)
