"""Reading a config: from a Python file with `get_config()`, or from the folder of a run."""

import difflib
import inspect
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any

from etils import epath

from moe_jax.config.leaf import ConfigError, one_line
from moe_jax.config.reflect import from_dict
from moe_jax.config.run import Config
from moe_jax.config.study import Study
from moe_jax.config.validate.limits import validate_types


def run_folder(workdir: epath.PathLike) -> epath.Path:
    """The folder of a run, from the name that a user, a command or a config gives it: a leading ~ is the user's home.

    Every entry that takes a `workdir` goes through here, so that all parts of a run lie in one folder.
    """
    return epath.Path(os.path.expanduser(str(workdir)))


def load_saved_config(workdir: epath.PathLike) -> Config:
    """The config of a training run, from `workdir`/config.json. It is not validated.

    Raises:
      ConfigError: there is none, or it cannot be read.
    """
    path = run_folder(workdir) / "config.json"
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError("--workdir", str(workdir), "no config.json in it", "name a training run's folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError("--workdir", str(workdir), f"config.json: {describe(error)}", "restore the file") from None
    config = from_dict(tree)
    validate_types(config)
    return config


def load_config(path: str | None) -> Config:
    """What `get_config()` in a Python file returns, not validated; 'FILE.py:TEXT' calls `get_config(TEXT)`.

    Raises:
      ConfigError: the file is missing or fails, or returns something else.
    """
    config = _load(path, Config)
    validate_types(config)
    return config


def load_study(path: str) -> Study:
    """`load_config` for a file whose `get_config()` returns a `Study`. Of its arms only their own bases are looked at.

    Raises:
      ConfigError: the file is missing or fails, or returns something else.
    """
    study = _load(path, Study)

    def checked(base: Config) -> Config:
        validate_types(base)
        return base

    return study.with_bases(checked)


def _load(path: str | None, kind: type) -> Any:
    if not path:
        fix = "write --config=FILE, such as --config=configs/quickstart.py"
        raise ConfigError("--config", path, "not given", fix)
    match = re.fullmatch(r"(.*\.py):(.*)", path, re.DOTALL)
    file, arguments = (match[1], [match[2]]) if match else (path, [])
    try:
        source = epath.Path(file).read_text()
    except FileNotFoundError:
        raise ConfigError("--config", path, "no such file", _nearest_file(file)) from None
    except Exception as error:  # whatever the backend of gs:// raises
        raise ConfigError("--config", path, describe(error), "name a readable Python file") from None
    config = _execute(path, file, source, arguments)
    if not isinstance(config, kind):
        limit = f"get_config() returns a {type(config).__name__}"
        fix = f"return a moe_jax.config.{kind.__name__}"
        if isinstance(config, Study):
            fix = "run it with python -m moe_jax.study"
        raise ConfigError("--config", path, limit, fix)
    return config


def _execute(path: str, file: str, source: str, arguments: Sequence[str]) -> Any:
    """What `get_config(*arguments)` of a file returns.

    The loader of ml_collections runs the next file in the same module, where the names of the last remain.
    """
    module = types.ModuleType("moe_jax_config_file")
    module.__file__ = file
    previous = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    try:
        exec(compile(source, file, "exec"), vars(module))
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ConfigError("--config", path, "has no function get_config", "define get_config()")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            limit = "get_config takes no argument" if arguments else "get_config needs an argument"
            fix = "remove the ':TEXT' after the file" if arguments else "write FILE:TEXT"
            raise ConfigError("--config", path, limit, fix) from None
        return get_config(*arguments)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError("--config", path, describe(error, file), "mend the config file") from error
    finally:
        sys.modules.pop(module.__name__)
        if previous is not None:
            sys.modules[module.__name__] = previous


def describe(error: Exception, file: str | None = None) -> str:
    """The type and message of an error, and where in `file` it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f"{file}:{frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {one_line(error, 200)}"


def _nearest_file(file: str) -> str:
    folder = epath.Path(file).parent
    try:
        names = [entry.name for entry in folder.iterdir() if entry.suffix == ".py"]
    except Exception:  # the folder is missing too
        names = []
    near = difflib.get_close_matches(epath.Path(file).name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else "name a Python file with get_config()"
