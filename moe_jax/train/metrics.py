"""Where a run's numbers go: workdir/metrics.jsonl and TensorBoard."""

import json
import math
import os
import time
from typing import Any

import jax
import numpy as np
import tensorboardX
from absl import logging
from etils import epath

from moe_jax.config import ConfigError
from moe_jax.config.load import run_folder
from moe_jax.train.workdir import is_local

FILE_NAME = "metrics.jsonl"
# An object store cannot append: there the whole file is written again, at most this often.
_REMOTE_SECONDS = 30.0


class MetricsWriter:
    """Appends rows to workdir/metrics.jsonl, one JSON object a line; their scalars to workdir/tensorboard.

    Only process 0 writes. On start the file is cut back to the rows of steps up to `resume_step`, atomically;
    a last line that a killed process left half-written goes too. On a local disk each row is flushed as it is
    written; on gs:// the file is rewritten at most every 30 seconds, on `flush` and on `close`, and
    TensorBoard is left out.

    Args:
      workdir: local or gs:// path.
      tensorboard: write TensorBoard events too.
      resume_step: the restored step; 0: a new run, which starts with an empty file.

    Attributes:
      nonfinite: NaN and infinite numbers met so far. JSON has no such numbers: they are written as null.
    """

    def __init__(self, workdir, *, tensorboard: bool = True, resume_step: int = 0):
        self.nonfinite = 0
        self._enabled = jax.process_index() == 0
        self._file = self._tensorboard = None
        if not self._enabled:
            return
        self._local = is_local(workdir)
        workdir = run_folder(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / FILE_NAME
        rows = read_metrics(workdir) if resume_step else []
        rows = [row for row in rows if row.get("step", 0) <= resume_step]
        self._lines = [json.dumps(row) + "\n" for row in rows]
        self._write_all()
        if self._local:
            self._lines = []
            self._file = open(self._path, "a", encoding="utf-8")
        self._written_at = time.monotonic()
        if tensorboard and self._local:
            # TensorBoard forgets the events of an earlier run from purge_step on.
            directory = str(workdir / "tensorboard")
            self._tensorboard = tensorboardX.SummaryWriter(directory, purge_step=resume_step + 1)
        elif tensorboard:
            logging.warning("TensorBoard events go to local disks only; %s has the same numbers", self._path)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one row of bools, ints, floats, strings, and arrays or (nested) lists of numbers.

        A float is written with the shortest digits that give the same float64: float32 values stay exact.
        """
        if not self._enabled:
            return
        values = jax.device_get(values)
        row = {"step": int(step), **{name: self._plain(value) for name, value in values.items()}}
        line = json.dumps(row, allow_nan=False) + "\n"
        if self._local:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._written_at >= _REMOTE_SECONDS:
                self.flush()
        if self._tensorboard:
            for name, value in values.items():
                if np.ndim(value) == 0 and not isinstance(value, str):
                    self._tensorboard.add_scalar(name, float(value), global_step=int(step))

    def flush(self) -> None:
        """Brings everything written so far to the disk or the object store."""
        if not self._enabled:
            return
        if self._local:
            self._file.flush()
        else:
            self._write_all()
            self._written_at = time.monotonic()
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flushes and closes; writing afterwards is an error. Closing twice is not."""
        if not self._enabled:
            return
        self.flush()
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        self._enabled = False

    def _write_all(self) -> None:
        write_whole(self._path, "".join(self._lines))

    def _plain(self, value: Any) -> Any:
        """`value` as JSON knows it."""
        if isinstance(value, dict):
            raise TypeError("values of a row are numbers, strings and lists of them; nest names with '/'")
        if isinstance(value, str):
            return value
        if isinstance(value, list | tuple):
            return [self._plain(item) for item in value]
        array = np.asarray(value)
        if array.ndim:
            return [self._plain(item) for item in array]
        if array.dtype == np.bool_:
            return bool(array)
        if np.issubdtype(array.dtype, np.integer):
            return int(array)
        number = float(array)
        if math.isfinite(number):
            return number
        self.nonfinite += 1
        return None


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all, whenever the process is killed."""
    content = content.encode() if isinstance(content, str) else content
    if not is_local(path):
        path.write_bytes(content)
        return
    unfinished = f"{path}.tmp"
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_metrics(workdir) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in order; [] without a file. A half-written last line is left out.

    Raises:
      ConfigError: it cannot be read, or another line is not JSON; with its number.
    """
    path = run_folder(workdir) / FILE_NAME
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        limit = f"{FILE_NAME} in it cannot be read: {error.strerror or error}"
        raise ConfigError("--workdir", str(workdir), limit, "move it away, or name another --workdir") from error
    # errors=: a kill can cut a character in half. split: splitlines would cut at characters JSON allows.
    lines = content.decode(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it
                break
            limit = f"{path} line {number}: {error}"
            raise ConfigError("--workdir", str(workdir), limit, "mend or delete that line") from error
    return rows
