"""The folder of a run: one run at a time in it, and room for its checkpoints."""

import contextlib
import errno
import fcntl
import shutil
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from moe_jax.config import ConfigError
from moe_jax.config.load import run_folder
from moe_jax.train.interrupt import largest

# What a run writes.
FILES = ("config.json", "metrics.jsonl", "results.json", "routing.npz", ".lock")
FOLDERS = ("checkpoints", "tensorboard", "profile")
# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def is_local(workdir) -> bool:
    """Whether a folder is on a disk, not in an object store."""
    return "://" not in str(workdir)


def checkpoint_directory(workdir) -> epath.Path:
    """Where the checkpoints of a run are."""
    folder = run_folder(workdir)
    # Orbax refuses relative paths.
    return (folder.resolve() if is_local(folder) else folder) / "checkpoints"


@contextlib.contextmanager
def own_workdir(workdir) -> Iterator[None]:
    """Makes `workdir` and, on a local disk, keeps other runs out of it until the exit.

    Process 0 holds a lock on workdir/.lock for all processes. The system releases it however the process ends.

    Raises:
      ConfigError: in every process: another run is there, the folder cannot be written, or a folder is in the place
        of one of its files.
    """
    with contextlib.ExitStack() as stack:
        problem = lock_workdir(workdir, stack) if jax.process_index() == 0 else None
        if largest(problem is not None):
            raise problem or ConfigError("--workdir", str(workdir), "process 0 cannot write there", "see its message")
        yield


def lock_workdir(workdir, stack: contextlib.ExitStack) -> ConfigError | None:
    """One process's part of `own_workdir`, until `stack` closes; the problem, or None. Asks JAX nothing."""
    path = run_folder(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if is_local(path) and (problem := _misplaced(path)):
            return problem
        if is_local(path):
            file = stack.enter_context(open(path / ".lock", "a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fix = "wait for it, stop it, or name another --workdir"
        return ConfigError("--workdir", str(workdir), "another run is writing there", fix)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            return ConfigError("--workdir", str(workdir), str(error), "name a folder that can be written")
        logging.warning("%s cannot be locked: do not start a second run there", workdir)
    return None


def _misplaced(path: epath.Path) -> ConfigError | None:
    """The first of the run's files that is a folder, or of its folders that is a file."""
    for names, folders in ((FILES, False), (FOLDERS, True)):
        for name in names:
            entry = path / name
            if entry.exists() and entry.is_dir() != folders:
                limit = f"{name} in it is {'a file, not a folder' if folders else 'a folder, not a file'}"
                return ConfigError("--workdir", str(path), limit, "move it away, or name another --workdir")
    return None


def check_free_space(workdir, bytes_per_checkpoint: int, max_to_keep: int) -> None:
    """Refuses to start when the disk cannot hold max_to_keep checkpoints and the one being written.

    Checkpoints that are there already count as written. gs:// paths are not checked.

    Raises:
      ConfigError: with the free and the needed space.
    """
    if not is_local(workdir):
        return
    directory = checkpoint_directory(workdir)
    saved = [d for d in directory.iterdir() if d.name.isdigit()] if directory.exists() else []
    needed = max(1, max_to_keep + 1 - len(saved)) * bytes_per_checkpoint
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            "--workdir",
            str(workdir),
            f"{free / 1e9:.2f} GB are free, its checkpoints need {needed / 1e9:.2f} GB",
            "free some space, name another --workdir or lower config.train.max_to_keep",
        )
