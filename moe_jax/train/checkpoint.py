"""Checkpoints: one atomic save of the training state and its description, restored onto any mesh.

The only file that knows Orbax. A state is saved as nested dicts under the 'a/b/c' paths of its leaves, so
that tuples, NamedTuples and empty subtrees (optax has many) need no special care: they come back from the
structure of the target. Beside the arrays each checkpoint holds the caller's `meta` and, for every leaf,
shape, dtype and a fingerprint of its bits. Orbax 0.12 notices truncated files but reads most flipped bits in
silence; the fingerprints do not.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from moe_jax.config import ConfigError, shorten_list
from moe_jax.train.workdir import checkpoint_directory, is_local


class Restored(NamedTuple):
    """A restored checkpoint.

    step: when it was saved. state: the structure of the target, of jax.Arrays. meta: what `save` was given.
    damaged: newer steps that could not be read. ignored: path -> shape of the saved leaves that the target lacks.
    """

    step: int
    state: Any
    meta: dict
    damaged: tuple[int, ...] = ()
    ignored: dict[str, tuple[int, ...]] = {}


class DamagedCheckpointError(RuntimeError):
    """A checkpoint whose bytes are not those that were saved.

    Args:
      message: what cannot be read.
      field: the flag or config field that names the run, as in `Checkpoints`.
      workdir: of the run.
    """

    def __init__(self, message: str, field: str = "--workdir", workdir: str = ""):
        super().__init__(message)
        self.field, self.workdir = field, workdir


class Checkpoints:
    """The checkpoints of a run, in `workdir/checkpoints`.

    Args:
      workdir: local or gs:// path.
      max_to_keep: newest checkpoints kept; an older one is deleted only after a newer one is complete.
      keep: steps that are kept beside them.
      asynchronous: `save` returns once the arrays are copied to the host, and a thread writes them. An error
        in that thread is raised by the next `save`, `wait` or `close`.
      read_only: for evaluation and generation: creates, deletes and renames nothing.
      field: the flag or config field that names the folder, for messages.
    """

    def __init__(
        self,
        workdir,
        *,
        max_to_keep: int = 1,
        keep: Sequence[int] = (),
        asynchronous: bool = True,
        read_only: bool = False,
        field: str = "--workdir",
    ):
        self.workdir, self.field = str(workdir), field
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [checkpoint_managers.LatestN(max_to_keep), checkpoint_managers.CustomSteps(keep)]
            ),
            enable_async_checkpointing=asynchronous and not read_only,
            create=not read_only,
            # What a killed process left of an uncommitted save.
            cleanup_tmp_directories=not read_only,
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(checkpoint_directory(workdir), options=options, item_handlers=handlers)
        # Orbax cleans up in a thread that outlives `close`: it would delete what the next manager of the folder is writing.
        if wait := getattr(self._manager, "_maybe_await_cleanup_tmp_directory", None):
            wait()

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
        leaves = leaves_by_path(state)
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

    def restore_paths(self) -> list[str]:
        """The paths of the leaves of the newest checkpoint whose description can be read."""
        return self._first_readable(None, lambda s: list(self._record(s)["leaves"]))[1]

    def restore_identity(self) -> str:
        """A hash of what the newest checkpoint holds, arrays included."""
        return self._first_readable(None, lambda s: self._record(s)["sha256"])[1]

    def restore(self, target: Any, step: int | None = None, *, ignore: Callable[[str], bool] = lambda path: False) -> Restored:
        """Restores bit for bit onto the shardings of `target`, from any mesh.

        Args:
          target: pytree of jax.ShapeDtypeStruct with shardings, or of arrays; scalars replicated on the mesh.
          step: the step to restore; None: the newest. If that one is damaged the newest intact one is
            restored, with a warning, and the damaged ones are moved out of the way (unless read_only), so
            that training on from the older one can save the same steps again.
          ignore: tells of the path of a saved leaf whether `target` may lack it; its bytes are then not read.

        Raises:
          ConfigError: there is no checkpoint, or its leaves are not those of `target`.
          DamagedCheckpointError: no checkpoint can be read.
          ValueError: a leaf of `target` has no sharding.
        """
        targets = leaves_by_path(target)
        if bare := [path for path, x in targets.items() if getattr(x, "sharding", None) is None]:
            raise ValueError(f"target leaves without a sharding: {shorten_list(bare)}")
        step, (leaves, record), damaged = self._first_readable(step, lambda s: self._restore(s, targets, ignore))
        if damaged and not self._read_only:
            self._set_aside(damaged)
        state = jax.tree.unflatten(jax.tree.structure(target), [leaves[path] for path in targets])
        ignored = {path: tuple(leaf["shape"]) for path, leaf in record["leaves"].items() if path not in targets}
        return Restored(step, state, record["meta"], damaged, ignored)

    def restore_leaves(self, choose: Callable[[int, dict[str, dict]], tuple[dict, Any]]) -> tuple[dict[str, jax.Array], Any]:
        """Reads some leaves of the newest checkpoint that can be read.

        Args:
          choose: (step, {path: {"shape": ..., "dtype": ...}} of all that is saved) -> ({path: leaf with shape, dtype and
            sharding} to read, anything).

        Returns:
          ({path: array}, what `choose` gave beside its choice).

        Raises:
          ConfigError, DamagedCheckpointError: as `restore`.
        """

        def read(step):
            saved = self._record(step)["leaves"]
            targets, other = choose(step, saved)
            return self._read(step, targets, saved), other

        return self._first_readable(None, read)[1]

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
            raise ConfigError(self.field, self.workdir, limit, "name the workdir of a run that saved one")
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
        raise DamagedCheckpointError(f"none of steps {steps} can be read", self.field, self.workdir) from errors[0]

    def _record(self, step: int) -> dict:
        record = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        digest = record.pop("sha256")
        if digest != _digest(record):
            raise DamagedCheckpointError("the description was changed after it was saved")
        return record | {"sha256": digest}

    def _restore(self, step: int, targets: dict[str, Any], ignore) -> tuple[dict[str, jax.Array], dict]:
        record = self._record(step)
        saved = record["leaves"]
        problems = [f"{p} {problem}" for p in targets if (problem := misfit(targets[p], saved.get(p)))]
        problems += [f"{p} is not in the model" for p in saved if p not in targets and not ignore(p)]
        if problems:
            raise ConfigError(
                self.field,
                self.workdir,
                f"its checkpoint of step {step} does not fit: {shorten_list(problems)}",
                f"use the config it was saved with, or another {self.field}",
            )
        return self._read(step, targets, saved), record

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
            raise DamagedCheckpointError(f"changed after they were saved: {shorten_list(bad)}")
        return leaves

    def _set_aside(self, steps: tuple[int, ...]) -> None:
        """Renames damaged steps to damaged_<step>; object stores cannot rename, there they are deleted."""
        for step in steps:
            if is_local(self.workdir):
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


def load_params(workdir, target: dict, step: int | None = None, *, field: str = "--workdir") -> Restored:
    """Restores only the top-level keys of `target`, such as {'params': ..., 'router_state': ...}.

    See `Checkpoints` for `field`, and `Checkpoints.restore` for the other arguments and errors.
    """
    with Checkpoints(workdir, read_only=True, field=field) as checkpoints:
        return checkpoints.restore(target, step, ignore=outside(target))


def outside(target: Iterable[str]) -> Callable[[str], bool]:
    """For `Checkpoints.restore`: ignores the leaves under other top-level keys than these."""
    return lambda path: path.split("/")[0] not in target


def load_meta(workdir, step: int | None = None, *, field: str = "--workdir") -> dict:
    """The `meta` of a run's newest checkpoint; ConfigError, which names `field`, if there is none."""
    with Checkpoints(workdir, read_only=True, field=field) as checkpoints:
        return checkpoints.restore_meta(step)


def load_identity(workdir) -> str:
    """A hash of what a run's newest checkpoint holds, arrays included; ConfigError if there is none."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore_identity()


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """{'a/b/c': leaf} in the order of jax.tree.leaves."""
    pairs = jax.tree.leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the state have the same path; keys must not contain '/'")
    return leaves


def _nest(leaves: dict[str, Any]) -> dict:
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def misfit(target, saved: dict | None) -> str:
    """Why a saved leaf cannot fill a target leaf; empty if it can."""
    if saved is None:
        return "is not in the checkpoint"
    has, needs = (tuple(saved["shape"]), saved["dtype"]), (tuple(target.shape), str(target.dtype))
    return "" if has == needs else f"is {has[1]} {list(has[0])}, needs {needs[1]} {list(needs[0])}"


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
