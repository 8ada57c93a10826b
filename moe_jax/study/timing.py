"""Times of several functions, interleaved in one process, and what they were measured on."""

import datetime
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata

import jax
from tqdm import tqdm

# A function this many times slower than the fastest runs in fewer rounds, at least MIN_RUNS of them.
SLOW = 6
MIN_RUNS = 3
PLATFORMS = {"cpu": "CPU", "gpu": "NVIDIA GPU", "tpu": "TPU"}
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    label: str = "",
    progress: bool = True,
    minimum: int = MIN_RUNS,
    settle: bool = False,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Runs all functions in turn, so that a slow moment of the machine falls on all of them.

    Args:
      functions: by name, without arguments; JAX arrays that they return are waited for.
      rounds: turns. The order is reversed in every other one.
      label, progress: of the progress bar on stderr, which only a terminal gets.
      minimum: runs of each function at least, however slow it is.
      settle: run it once untimed before every timed run: a function pays for the memory that a very different one before it has
        left behind, which it would not in a training run, where it follows itself.

    Returns:
      Milliseconds of every run, after one to compile and one to warm up; for functions that cannot run here,
      out of memory or not implemented, the first line of the reason instead.
    """
    errors, warm = {}, {}
    bar = tqdm(total=len(functions) + rounds, desc=label, disable=None if progress else True)
    for name, function in functions.items():
        bar.set_postfix_str(f"compile {name}", refresh=False)
        try:
            _milliseconds(function)
            warm[name] = _milliseconds(function)
        except RuntimeError as error:  # JAX's and torch's out of memory, NotImplementedError
            errors[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
        bar.update()
    times: dict[str, list[float]] = {name: [] for name in warm}
    # One run in every `stride` rounds.
    fastest = min(warm.values(), default=0.0)
    most = max(rounds // minimum, 1)
    stride = {name: min(max(int(ms / (SLOW * fastest)), 1), most) for name, ms in warm.items()}
    for i in range(rounds):
        for name in list(warm) if i % 2 == 0 else reversed(warm):
            if i % stride[name] == 0:
                bar.set_postfix_str(str(name), refresh=False)
                if settle:
                    _milliseconds(functions[name])
                times[name].append(_milliseconds(functions[name]))
        bar.update()
    bar.close()
    return times, errors


def _milliseconds(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return 1e3 * (time.perf_counter() - start)


def median(times: list[float]) -> float:
    """The median of a list that is not empty."""
    return statistics.median(times)


def environment(packages: tuple[str, ...] = PACKAGES) -> dict:
    """What was measured on and when: device, machine, versions, revision, UTC date, load average of a minute."""
    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        **place(packages),
        "revision": _revision(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "load_before": load(),
    }


def conditions(environment: dict) -> str:
    """One sentence of an `environment`: on what, with which versions, when."""
    e = environment
    where = e["machine"] if e["platform"] == "cpu" else f"{e['device']} ({e['machine']})"
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    load = f", load average before {e['load_before']}" if e.get("load_before") is not None else ""
    name = PLATFORMS.get(e["platform"], e["platform"])
    return f"{name}: {where}, {e['cores']} cores, {e['date']}, Python {e['python']}, {versions}{load}"


def place(packages: tuple[str, ...] = PACKAGES) -> dict:
    """The part of `environment` that needs no device: machine, cores, versions."""
    return {
        "machine": _machine(),
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages if _version(name)},
    }


def load() -> float | None:
    """Runnable processes, averaged over the last minute; None where the system does not count them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _machine() -> str:
    """The processor's name and instruction set, as far as the system tells."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'unknown'}, {platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str:
    """The checkout's short commit, with a + where files differ from it; empty without git."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        run = lambda *args: subprocess.run(git + list(args), capture_output=True, text=True, check=True).stdout.strip()
        return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
