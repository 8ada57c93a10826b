"""Files that match globs, each once."""

import fnmatch
import os
import re
from collections.abc import Iterator

from etils import epath

from moe_jax.config import ConfigError
from moe_jax.data.say import say

_WILDCARD = re.compile(r"[*?\[]")

# A file of a source: its name below the part of the glob that has no wildcard, and its path.
File = tuple[str, epath.Path]


def find_files(field: str, globs: str) -> list[File]:
    """The files that match comma-separated globs, sorted by name, each once.

    `**` matches any local folders. A folder or file whose name has a wildcard in it is found by that name. As in a shell, a
    wildcard matches no hidden name (one that starts with a dot) unless the pattern starts with a dot too. A name is the path
    below the part of its glob that has no wildcard, so it stays when a folder moves.

    Args:
      field: config path or flag of `globs`, for errors.
      globs: `~` is expanded.

    Raises:
      ConfigError: a glob matches no file, is malformed, has `**` in a remote path, or leads through a folder that
        cannot be read.
    """
    found: dict[str, File] = {}
    for pattern in filter(None, (part.strip() for part in globs.split(","))):
        matches = _match(field, pattern)
        if not matches:
            fix = "give a path or a glob such as 'folder/**/*.txt'"
            if len(globs.split(",")) > 1:
                fix += "; a comma separates globs, so write ? for one in a name"
            raise ConfigError(field, pattern, "matches no file", fix)
        found |= {str(path): (name, path) for name, path in matches}
    return _each_once(field, sorted(found.values(), key=lambda item: (item[0], str(item[1]))))


def file_identity(path: epath.Path) -> tuple | str:
    """Equal for paths of one file: relative or absolute, by a symbolic or a hard link."""
    if "://" in str(path):
        return str(path)
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _each_once(field: str, files: list[File]) -> list[File]:
    kept = {}
    for file in files:
        kept.setdefault(file_identity(file[1]), file)
    if again := len(files) - len(kept):
        say(f"warning: {again:,} paths of {field} lead to a file that it has already; each file is read once")
    return list(kept.values())


def _match(field: str, pattern: str) -> list[File]:
    wildcard = _WILDCARD.search(pattern)
    folder, slash, _ = pattern[: wildcard.start() if wildcard else len(pattern)].rpartition("/")
    tail = pattern[len(folder + slash) :]
    try:
        root = epath.Path(folder + slash or ".").expanduser()
        if "://" in pattern:
            paths = _match_remote(field, pattern, root, tail)
        else:
            _check_stars(field, pattern, tail)
            skipped: list[str] = []
            paths = [epath.Path(path) for path in _walk(os.fspath(root), tail.split("/"), skipped)]
            if skipped:
                hidden = f"{len(skipped):,} hidden files and folders, such as {skipped[0]}"
                say(f"warning: {field} leaves out {hidden}; a name or glob that starts with a dot finds them")
        files = [path for path in paths if path.is_file()]
        if lost := [path for path in paths if not path.exists()]:
            say(f"warning: {field} leaves out {len(lost):,} links that lead nowhere, such as {lost[0]}")
        return [(path.relative_to(root).as_posix(), path) for path in files]
    except ConfigError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        limit = f"cannot be searched: {error.strerror or error}{where}"
        raise ConfigError(field, pattern, limit, "make the folder readable, or name another one") from error
    except (ValueError, RuntimeError) as error:  # a null byte; ~nobody
        raise ConfigError(field, pattern, f"is no path: {error}", "give a path or a glob such as 'folder/**/*.txt'") from error


def _match_remote(field: str, pattern: str, root: epath.Path, tail: str) -> list[epath.Path]:
    if "**" in tail:
        raise ConfigError(field, pattern, "has ** in a remote path", "name the folders, or use * for each")
    if (root / tail).exists():
        return [root / tail]
    return list(root.glob(tail)) if root.is_dir() else []


def _check_stars(field: str, pattern: str, tail: str) -> None:
    for part in tail.split("/"):
        if "**" in part and part != "**":
            good = pattern.replace(part, "**/" + re.sub(r"\*+", "*", part))
            raise ConfigError(field, pattern, "has ** beside other characters of a name", f"write {good}")


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _walk(folder: str, parts: list[str], skipped: list[str], literal: bool = True) -> Iterator[str]:
    """Paths below `folder` that match the `parts` of a pattern; appends to `skipped` the hidden ones that would.

    `literal`: all parts so far were names, so the next one is taken as a name where there is such a file or folder.
    """
    first, rest = parts[0], parts[1:]
    path = os.path.join(folder, first)
    if first in ("", ".", "..") or (literal and _exists(path)):
        yield from _walk(path, rest, skipped) if rest else [path]
        return
    if not _WILDCARD.search(first):
        if _exists(path):
            yield from _walk(path, rest, skipped, literal=False) if rest else [path]
        return
    if literal and not os.path.isdir(folder):
        return
    if first == "**" and rest:
        yield from _walk(folder, rest, skipped, literal=False)
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        # As pathlib's **, this one goes into no linked folder, which could lead round in a circle.
        deeper = first == "**" and entry.is_dir(follow_symlinks=False)
        if not deeper and (first == "**" or not fnmatch.fnmatchcase(entry.name, first) or (rest and not entry.is_dir())):
            continue
        if entry.name.startswith(".") and not first.startswith("."):
            skipped.append(entry.path)
        elif deeper:
            yield from _walk(entry.path, parts, skipped, literal=False)
        else:
            yield from _walk(entry.path, rest, skipped, literal=False) if rest else [entry.path]
