"""Files that are whole or not there, and outlive a power cut."""

import contextlib
import os
import shutil
import uuid

from etils import epath


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a local file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: epath.Path) -> None:
    """Returns when a local file or folder is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: epath.Path) -> None:
    """Removes a local file or folder; at no time is a part of it under its name."""
    away = path.with_name(f".removed-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # another process was first
        os.rename(path, away)
        shutil.rmtree(away) if away.is_dir() else away.unlink()
