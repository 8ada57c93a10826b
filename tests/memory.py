"""Memory of a test run: freed after each file, and the peak of all its processes together, from /proc (Linux)."""

import ctypes
import gc
import os
import pathlib
import threading

import jax

PAGE = os.sysconf("SC_PAGE_SIZE")


def free() -> None:
    """Drops all compiled programs, and gives freed memory back to the system: malloc keeps what lies between arrays in use."""
    jax.clear_caches()
    gc.collect()
    if pathlib.Path("/proc/self").exists():
        ctypes.CDLL(None).malloc_trim(0)


def held() -> int:
    """Bytes of this process in memory; 0 where that is not known."""
    path = pathlib.Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * PAGE if path.exists() else 0


def resident(root: int) -> int:
    """Bytes in memory of a process and of all below it; a page that several of them share counts in each."""
    parents, sizes = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(path.parent.name)
        parents[pid], sizes[pid] = int(fields[1]), int(fields[21]) * PAGE
    family = [root]
    for pid in family:  # grows on the way
        family += [child for child, parent in parents.items() if parent == pid]
    return sum(sizes.get(pid, 0) for pid in family)


class Peak(threading.Thread):
    """The largest `resident` of this process so far, in bytes, looked at five times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self._stop_now = 0, threading.Event()

    def run(self):
        while not self._stop_now.wait(0.2):
            self.bytes = max(self.bytes, resident(os.getpid()))

    def stop(self) -> int:
        self._stop_now.set()
        self.join()
        return self.bytes
