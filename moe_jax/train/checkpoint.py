"""Checkpoints: one atomic save of the training state and its description, restored onto any mesh.

The only file that knows Orbax. A state is saved as nested dicts under the 'a/b/c' paths of its leaves, so
that tuples, NamedTuples and empty subtrees (optax has many) need no special care: they come back from the
structure of the target. Beside the arrays each checkpoint holds the caller's `meta` and, for every leaf,
shape, dtype and a fingerprint of its bits. Orbax 0.12 notices truncated files but reads most flipped bits in
silence; the fingerprints do not.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from moe_jax.config import Config, ConfigError, differences, one_line, role


class Restored(NamedTuple):
    """A restored checkpoint.

    step: when it was saved. state: the structure of the target, of jax.Arrays. meta: what `save` was given.
    damaged: newer steps that could not be read.
    """

    step: int
    state: Any
    meta: dict
    damaged: tuple[int, ...] = ()


class DamagedCheckpointError(RuntimeError):
    """A checkpoint whose bytes are not those that were saved."""


class Checkpoints:
    """The checkpoints of a run, in `workdir/checkpoints`.

    Args:
      workdir: local or gs:// path.
      max_to_keep: newest checkpoints kept; an older one is deleted only after a newer one is complete.
      asynchronous: `save` returns once the arrays are copied to the host, and a thread writes them. An error
        in that thread is raised by the next `save`, `wait` or `close`.
      read_only: for evaluation and generation: creates, deletes and renames nothing.
    """

    def __init__(self, workdir, *, max_to_keep: int = 1, asynchronous: bool = True, read_only: bool = False):
        self.workdir = str(workdir)
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(max_to_keep),
            enable_async_checkpointing=asynchronous and not read_only,
            create=not read_only,
            # What a killed process left of an uncommitted save.
            cleanup_tmp_directories=not read_only,
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(_directory(workdir), options=options, item_handlers=handlers)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest saved step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: dict) -> bool:
        """Saves a pytree of jax.Arrays and a JSON-able `meta`, all or nothing; False if `step` is there."""
        if step in self.steps():
            return False
        leaves = _flatten(state)
        prints = jax.device_get(_fingerprints(leaves))
        table = {
            path: {"shape": list(x.shape), "dtype": str(x.dtype), "fingerprint": int(prints[path])}
            for path, x in leaves.items()
        }
        # As it will be read back: keys that are strings, lists for tuples.
        record = json.loads(json.dumps({"meta": meta, "leaves": table}))
        record["sha256"] = _digest(record)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(_nest(leaves)), meta=ocp.args.JsonSave(record))
        return self._manager.save(step, args=items, force=True)

    def restore_meta(self, step: int | None = None) -> dict:
        """The `meta` of `step`, or of the newest checkpoint whose description can be read."""
        return self._first_readable(step, lambda s: self._record(s)["meta"])[1]

    def restore(self, target: Any, step: int | None = None, *, partial: bool = False) -> Restored:
        """Restores bit for bit onto the shardings of `target`, from any mesh.

        Args:
          target: pytree of jax.ShapeDtypeStruct with shardings, or of arrays; scalars replicated on the mesh.
          step: the step to restore; None: the newest. If that one is damaged the newest intact one is
            restored, with a warning, and the damaged ones are moved out of the way (unless read_only), so
            that training on from the older one can save the same steps again.
          partial: read only the top-level keys of `target`; the others' bytes are not read.

        Raises:
          ConfigError: there is no checkpoint, or its leaves are not those of `target`.
          DamagedCheckpointError: no checkpoint can be read.
          ValueError: a leaf of `target` has no sharding.
        """
        if bare := [path for path, x in _flatten(target).items() if getattr(x, "sharding", None) is None]:
            raise ValueError(f"target leaves without a sharding: {_shorten(bare)}")
        step, (state, meta), damaged = self._first_readable(step, lambda s: self._restore(s, target, partial))
        if damaged and not self._read_only:
            self._set_aside(damaged)
        return Restored(step, state, meta, damaged)

    def wait(self) -> None:
        """Blocks until a save in progress is complete; raises its error."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, raises the error of a failed save, and releases the threads."""
        self._manager.close()

    def _first_readable(self, step: int | None, read: Callable[[int], Any]) -> tuple[int, Any, tuple]:
        """The newest step for which `read(step)` succeeds, its result, and the newer, damaged ones."""
        saved = self.steps()
        steps = saved[::-1] if step is None else [step]
        if not steps or steps[0] not in saved:
            limit = "no checkpoint" if step is None else f"no checkpoint of step {step}, only of {saved}"
            raise ConfigError("--workdir", self.workdir, limit, "name the workdir of a run that saved one")
        damaged, errors = [], []
        for candidate in steps:
            try:
                return candidate, read(candidate), tuple(damaged)
            except ConfigError:
                raise
            # A broken file makes the readers raise anything: ValueError, KeyError, OSError, TypeError, ...
            except Exception as error:
                errors.append(error)
                damaged.append(candidate)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                logging.warning("Checkpoint %d in %s cannot be read: %s", candidate, self.workdir, reason)
        if self._read_only and step is None:
            # A run that is still training may have deleted them, after it saved newer ones.
            self._manager.reload()
            if max(self.steps(), default=-1) > saved[-1]:
                return self._first_readable(None, read)
        raise DamagedCheckpointError(f"{self.workdir}: none of steps {steps} can be read") from errors[0]

    def _record(self, step: int) -> dict:
        record = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        digest = record.pop("sha256")
        if digest != _digest(record):
            raise DamagedCheckpointError("the description was changed after it was saved")
        return record | {"sha256": digest}

    def _restore(self, step: int, target: Any, partial: bool) -> tuple[Any, dict]:
        record = self._record(step)
        targets = _flatten(target)
        tops = {path.split("/")[0] for path in targets}
        saved = {p: leaf for p, leaf in record["leaves"].items() if not partial or p.split("/")[0] in tops}
        problems = [f"{p} {problem}" for p in targets if (problem := _misfit(targets[p], saved.get(p)))]
        problems += [f"{p} is not in the model" for p in saved if p not in targets]
        if problems:
            raise ConfigError(
                "--workdir",
                self.workdir,
                f"its checkpoint of step {step} does not fit: {_shorten(problems)}",
                "use the config it was saved with, or another --workdir",
            )
        leaves = self._read(step, targets, record["leaves"])
        return jax.tree.unflatten(jax.tree.structure(target), [leaves[p] for p in targets]), record["meta"]

    def _read(self, step: int, targets: dict[str, Any], saved: dict[str, dict]) -> dict[str, jax.Array]:
        """The leaves at the paths of `targets`, on their shardings, fingerprints compared."""
        if not targets:
            return {}
        tree = _nest({p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for p, x in targets.items()})
        arguments = ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=arguments)).state
        leaves = flax.traverse_util.flatten_dict(restored, sep="/")
        prints = jax.device_get(_fingerprints({path: leaves[path] for path in targets}))
        bad = [path for path in targets if int(prints[path]) != saved[path]["fingerprint"]]
        if bad:
            raise DamagedCheckpointError(f"changed after they were saved: {_shorten(bad)}")
        return leaves

    def _set_aside(self, steps: tuple[int, ...]) -> None:
        """Renames damaged steps to damaged_<step>; object stores cannot rename, there they are deleted."""
        for step in steps:
            if _is_local(self.workdir):
                if jax.process_index() == 0:
                    directory = epath.Path(self._manager.directory)
                    moved = directory / f"damaged_{step}"
                    if moved.exists():
                        moved.rmtree()
                    (directory / str(step)).rename(moved)
            else:
                self._manager.delete(step)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()


def load_params(workdir, target: dict, step: int | None = None) -> Restored:
    """Restores only the top-level keys of `target`, such as {'params': ..., 'router_state': ...}.

    For evaluation and generation; see `Checkpoints.restore` for arguments and errors.
    """
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(target, step, partial=True)


def load_meta(workdir, step: int | None = None) -> dict:
    """The `meta` of a run's newest checkpoint; ConfigError if there is none."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore_meta(step)


def load_identity(workdir) -> str:
    """A hash of what a run's newest checkpoint holds, arrays included; ConfigError if there is none."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints._first_readable(None, lambda step: checkpoints._record(step)["sha256"])[1]


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
            text += "; not filled: " + _shorten([f"{p} {why}" for p, why in self.unfilled.items()], 20)
        if self.unused:
            text += "; not used: " + _shorten(self.unused, 20)
        return text


def fill_from(workdir, target: dict, include: tuple[str, ...] = ()) -> tuple[dict, FillReport]:
    """Fills parameters of a new run from the newest checkpoint of another.

    Args:
      workdir: the other run.
      target: {'params': tree, 'router_state': tree} of initialised arrays.
      include: prefixes of parameter paths below the top-level key, in whole parts: 'layers/moe' covers
        'layers/moe/router', not 'layers/moe_2'. Empty: everything.

    Returns:
      `target`, with the leaves replaced that are saved with the same shape and dtype, and the report.

    Raises:
      ConfigError: no checkpoint, a prefix that covers nothing in both, or nothing to fill.
    """
    with Checkpoints(workdir, read_only=True) as checkpoints:

        def fill(step):
            saved = checkpoints._record(step)["leaves"]
            wanted, report = _plan_fill(str(workdir), step, _flatten(target), saved, include)
            return checkpoints._read(step, wanted, saved), report

        _, (leaves, report), _ = checkpoints._first_readable(None, fill)
    flat = {path: leaves.get(path, x) for path, x in _flatten(target).items()}
    return jax.tree.unflatten(jax.tree.structure(target), list(flat.values())), report


def _plan_fill(workdir: str, step: int, targets: dict, saved: dict, include) -> tuple[dict, FillReport]:
    """Which target leaves to read, and the report."""
    prefixes = [prefix.strip().strip("/") for prefix in include]
    tops = {path.split("/")[0] for path in targets}

    def covers(prefix, path):
        return f"{path.split('/', 1)[-1]}/".startswith(f"{prefix}/")

    wanted, unfilled = {}, {}
    for path, x in targets.items():
        if prefixes and not any(covers(prefix, path) for prefix in prefixes):
            unfilled[path] = "is not in init.include"
        elif problem := _misfit(x, saved.get(path)):
            unfilled[path] = problem
        else:
            wanted[path] = x
    for prefix in prefixes:
        if not any(covers(prefix, path) for path in wanted):
            reasons = [f"{path} {why}" for path, why in unfilled.items() if covers(prefix, path)]
            limit = f"fills nothing from {workdir}: " + (_shorten(reasons) or "no parameter has this prefix")
            names = sorted({path.split("/", 1)[-1].split("/")[0] for path in targets if path in saved})
            fix = f"first parts of shared paths: {', '.join(names) or 'none'}"
            raise ConfigError("init.include", prefix, limit, fix)
    if not wanted:
        reasons = _shorten([f"{path} {why}" for path, why in unfilled.items()])
        limit = f"fills nothing: {reasons}"
        raise ConfigError("init.checkpoint", workdir, limit, "name a run of a similar model")
    unused = tuple(p for p in saved if p.split("/")[0] in tops and p not in wanted)
    return wanted, FillReport(workdir, step, tuple(wanted), unfilled, unused)


def check_resume(saved: Config, new: Config) -> list[str]:
    """Compares a run's saved config with the one it is resumed with.

    Returns:
      Warnings: one if the schedule stretches, one if the numbers will differ in rounding.

    Raises:
      ConfigError: naming the first fields that may not differ.
    """
    changed = differences(saved, new)
    refused = {f: values for f, values in changed.items() if role(f) not in ("runtime", "rounding")}
    if refused:
        changes = [f"{f} {one_line(old, 40)} -> {one_line(now, 40)}" for f, (old, now) in refused.items()]
        field, (_, value) = next(iter(refused.items()))
        limit = f"may not change on resume; differing: {_shorten(changes)}"
        raise ConfigError(field, value, limit, "set these fields back, or start in another --workdir")
    warnings = []
    if "train.steps" in changed:
        old, now = changed["train.steps"]
        warnings.append(f"config.train.steps {old} -> {now}: the schedule stretches to the new length")
    rounding = [f"config.{f}" for f in changed if role(f) == "rounding"]
    if rounding:
        warnings.append(f"{', '.join(rounding)} changed: equal to the uninterrupted run except for rounding")
    return warnings


def state_bytes(tree: Any) -> int:
    """Bytes of all leaves (arrays or ShapeDtypeStructs), over all devices, each counted once."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def check_free_space(workdir, bytes_per_checkpoint: int, max_to_keep: int) -> None:
    """Refuses to start when the disk cannot hold max_to_keep checkpoints and the one being written.

    Checkpoints that are there already count as written. gs:// paths are not checked.

    Raises:
      ConfigError: with the free and the needed space.
    """
    if not _is_local(workdir):
        return
    directory = _directory(workdir)
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


def _is_local(workdir) -> bool:
    return "://" not in str(workdir)


def _directory(workdir) -> epath.Path:
    path = epath.Path(workdir).expanduser() if _is_local(workdir) else epath.Path(workdir)
    # Orbax refuses relative paths.
    return (path.resolve() if _is_local(workdir) else path) / "checkpoints"


def _flatten(tree: Any) -> dict[str, Any]:
    """{'a/b/c': leaf} in the order of jax.tree.leaves."""
    pairs = jax.tree.leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the state have the same path; keys must not contain '/'")
    return leaves


def _nest(leaves: dict[str, Any]) -> dict:
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def _misfit(target, saved: dict | None) -> str:
    """Why a saved leaf cannot fill a target leaf; empty if it can."""
    if saved is None:
        return "is not in the checkpoint"
    has, needs = (tuple(saved["shape"]), saved["dtype"]), (tuple(target.shape), str(target.dtype))
    return "" if has == needs else f"is {has[1]} {list(has[0])}, needs {needs[1]} {list(needs[0])}"


def _shorten(items, limit: int = 4) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`_fingerprint` of each leaf, in one program: a burst of small ones, each with an all-reduce, fills XLA's queue of
    launched programs, and emulated CPU devices then wait for each other for ever.
    """
    return {path: _fingerprint(x) for path, x in leaves.items()}


def _fingerprint(x: jax.Array) -> jax.Array:
    """uint32 scalar of the bits of x and their positions; integer sums make it the same on every mesh.

    Each word is mixed with its index by the finalizer of MurmurHash3, a bijection, before the sum: any one
    changed element changes the result for certain, several do with probability 1 - 2^-32.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    h = bits ^ (index * jnp.uint32(0x9E3779B9))
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(multiplier)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
