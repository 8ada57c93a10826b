"""One run at a time in a folder."""

import contextlib
import errno
import fcntl
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from moe_jax.config import ConfigError
from moe_jax.train.interrupt import largest

# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def own_workdir(workdir) -> Iterator[None]:
    """Makes `workdir` and, on a local disk, keeps other runs out of it until the exit.

    Process 0 holds a lock on workdir/.lock for all processes. The system releases it however the process ends.

    Raises:
      ConfigError: in every process: another run is there, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        problem = take(workdir, stack) if jax.process_index() == 0 else None
        if largest(problem is not None):
            raise problem or ConfigError("--workdir", str(workdir), "process 0 cannot write there", "see its message")
        yield


def take(workdir, stack: contextlib.ExitStack) -> ConfigError | None:
    """One process's part of `own_workdir`, until `stack` closes; the problem, or None. Asks JAX nothing."""
    path = epath.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if "://" not in str(workdir):
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
