"""Parameters of a new run from the newest checkpoint of another, by path prefixes."""

import dataclasses
from typing import Any

import jax

from moe_jax.config import ConfigError, shorten_list
from moe_jax.train.checkpoint import Checkpoints, leaves_by_path, misfit


@dataclasses.dataclass(frozen=True)
class FillReport:
    """What `fill_from` did. Paths include the top-level key, such as 'params/embed/embedding'.

    filled: leaves taken from the checkpoint. unfilled: the other leaves of the target, and why. unused:
    leaves of the checkpoint, under the same top-level keys, that went nowhere.
    """

    workdir: str
    step: int
    filled: tuple[str, ...]
    unfilled: dict[str, str]
    unused: tuple[str, ...]

    def __str__(self):
        total = len(self.filled) + len(self.unfilled)
        text = f"filled {len(self.filled)} of {total} leaves from {self.workdir} step {self.step}"
        if self.unfilled:
            text += "; not filled: " + shorten_list([f"{p} {why}" for p, why in self.unfilled.items()], 20)
        if self.unused:
            text += "; not used: " + shorten_list(self.unused, 20)
        return text


def fill_from(workdir, target: dict, include: tuple[str, ...] = ()) -> tuple[dict, FillReport]:
    """Fills parameters of a new run from the newest checkpoint of another.

    Args:
      workdir: the other run, of `init.checkpoint`.
      target: {'params': tree, 'router_state': tree} of initialised arrays.
      include: prefixes of parameter paths below the top-level key, in whole parts: 'layers/moe' covers
        'layers/moe/router', not 'layers/moe_2'. Empty: everything.

    Returns:
      `target`, with the leaves replaced that are saved with the same shape and dtype, and the report.

    Raises:
      ConfigError: no checkpoint, a prefix that covers nothing in both, or nothing to fill.
    """
    targets = leaves_by_path(target)
    with Checkpoints(workdir, read_only=True, field="init.checkpoint") as checkpoints:
        leaves, report = checkpoints.restore_leaves(lambda step, saved: _plan(str(workdir), step, targets, saved, include))
    return jax.tree.unflatten(jax.tree.structure(target), [leaves.get(path, x) for path, x in targets.items()]), report


def _plan(workdir: str, step: int, targets: dict, saved: dict, include: tuple[str, ...]) -> tuple[dict[str, Any], FillReport]:
    """Which target leaves to read, and the report."""
    prefixes = [prefix.strip().strip("/") for prefix in include]
    tops = {path.split("/")[0] for path in targets}

    def covers(prefix, path):
        return f"{path.split('/', 1)[-1]}/".startswith(f"{prefix}/")

    wanted, unfilled = {}, {}
    for path, x in targets.items():
        if prefixes and not any(covers(prefix, path) for prefix in prefixes):
            unfilled[path] = "is not in init.include"
        elif problem := misfit(x, saved.get(path)):
            unfilled[path] = problem
        else:
            wanted[path] = x
    for prefix in prefixes:
        if not any(covers(prefix, path) for path in wanted):
            reasons = [f"{path} {why}" for path, why in unfilled.items() if covers(prefix, path)]
            limit = f"fills nothing from {workdir}: " + (shorten_list(reasons) or "no parameter has this prefix")
            names = sorted({path.split("/", 1)[-1].split("/")[0] for path in targets if path in saved})
            fix = f"first parts of shared paths: {', '.join(names) or 'none'}"
            raise ConfigError("init.include", prefix, limit, fix)
    if not wanted:
        reasons = shorten_list([f"{path} {why}" for path, why in unfilled.items()])
        limit = f"fills nothing: {reasons}"
        raise ConfigError("init.checkpoint", workdir, limit, "name a run of a similar model")
    unused = tuple(p for p in saved if p.split("/")[0] in tops and p not in wanted)
    return wanted, FillReport(workdir, step, tuple(wanted), unfilled, unused)
