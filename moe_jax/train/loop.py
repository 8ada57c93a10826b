"""The run: set up or restore, then train with evaluation and checkpoints."""

import collections
import contextlib
import json
import logging
import platform
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from moe_jax.config import Config, ConfigError, from_dict, to_dict
from moe_jax.config.blocks import options_path
from moe_jax.config.validate import validate
from moe_jax.data import TextData, Tokenizer, check_same_text, open_data
from moe_jax.models import MODELS
from moe_jax.models.places import places
from moe_jax.parallel.mesh import mesh_from_config, start_devices
from moe_jax.parallel.rules import local_rows, put_batch
from moe_jax.routing import ROUTERS
from moe_jax.train.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    check_free_space,
    check_resume,
    fill_from,
    load_meta,
    state_bytes,
)
from moe_jax.train.evaluation import evaluate, make_evaluation_step
from moe_jax.train.interrupt import Interrupts, exit_code
from moe_jax.train.metrics import MetricsWriter, write_whole
from moe_jax.train.optimizer import check_groups
from moe_jax.train.progress import ProgressBar
from moe_jax.train.reporter import Profile, Reporter
from moe_jax.train.router_state import start_router_state
from moe_jax.train.state import abstract_state, place_state
from moe_jax.train.step import compile_train_step
from moe_jax.train.upcycle import check_dense_run, upcycle
from moe_jax.train.workdir import own_workdir


def fit(config: Config, workdir: str) -> int:
    """Trains, or goes on where `workdir` stands; returns the exit code: 0 complete, 143 or 130 interrupted and saved, 1 stopped
    after too many non-finite steps.

    Raises:
      ConfigError: the config does not fit the devices, the data or the checkpoint in `workdir`; `workdir` cannot be
        written, or another run is there; no checkpoint in it can be read.
    """
    start_devices(config.mesh)
    show_log()
    validate(config, jax.device_count())
    mesh = mesh_from_config(config.mesh)
    keep, asynchronous = config.train.max_to_keep, config.train.async_checkpoint
    with Interrupts(every=min(config.train.log_every, 10)) as interrupts:
        try:
            with (
                own_workdir(workdir),
                Checkpoints(workdir, max_to_keep=keep, asynchronous=asynchronous) as checkpoints,
                jax.set_mesh(mesh),
            ):
                code = _fit(config, workdir, mesh, checkpoints, interrupts)
        except DamagedCheckpointError as error:
            fix = "put back a copy, or use another --workdir"
            raise ConfigError("checkpoint files", None, str(error), fix) from error
        # After the last step, such as while the last checkpoint was written.
        if code == 0 and (signum := interrupts.agreed(0)):
            say("all steps are done and saved; run the same command for what comes after them")
            return exit_code(signum)
        return code


def _fit(config: Config, workdir: str, mesh, checkpoints: Checkpoints, interrupts: Interrupts) -> int:
    last = checkpoints.latest_step()
    saved = checkpoints.restore_meta() if last is not None else None
    if saved:
        for warning in check_resume(from_dict(saved["config"]), config):
            say(f"warning: {warning}")
        # The description is an older step's where the newest one's cannot be read.
        if saved["step"] == last >= config.train.steps:
            say(f"complete: {workdir} has all {last} steps; raise --config.train.steps to go on, or use another --workdir")
            return 0
    elif config.init.upcycle_from:
        check_dense_run(config)
    return Trainer(config, workdir, mesh, checkpoints, saved).run(interrupts)


def start_tokenizer(config: Config, saved: dict[str, Any] | None) -> Tokenizer | None:
    """The tokenizer that the run's first parameters were trained with; None: they are new, and the data's own is right.

    Args:
      config: the run's.
      saved: `meta` of its checkpoint to resume from, or None.

    Raises:
      ConfigError: the config asks for another one than that of `init.checkpoint` or `init.upcycle_from`, whose vocabulary it
        takes.
    """
    if saved:
        return Tokenizer.from_json(saved["tokenizer"])
    prefixes = [prefix.strip().strip("/") for prefix in config.init.include.split(",") if prefix]
    vocabulary = ("embed", "output")  # parameters with a row per token
    name = "checkpoint" if config.init.checkpoint else "upcycle_from"
    source = getattr(config.init, name)
    if not source or (prefixes and not any(prefix.split("/")[0] in vocabulary for prefix in prefixes)):
        return None
    meta = load_meta(source)
    theirs = from_dict(meta["config"]).data
    for field in ("tokenizer", "vocab_size") if config.data.tokenizer == "bpe" else ("tokenizer",):
        ours, its = getattr(config.data, field), getattr(theirs, field)
        if ours != its:
            fix = "set it to that"
            if config.init.checkpoint:
                fix += ", or list in init.include what to take without embed and output"
            raise ConfigError(f"data.{field}", ours, f"init.{name}={source} has {its}", fix)
    return Tokenizer.from_json(meta["tokenizer"])


def show_log() -> None:
    """Shows this package's log, such as which kernels run, on stderr of the first process."""
    log = logging.getLogger("moe_jax")
    if not log.handlers and jax.process_index() == 0:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
        log.propagate = False  # some libraries give the root logger a handler of its own


def say(line: str) -> None:
    """Prints a line once, not once per process."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


class Trainer:
    """One run from its first or restored step to its end."""

    def __init__(self, config: Config, workdir: str, mesh, checkpoints: Checkpoints, saved: dict | None):
        self.config, self.workdir, self.mesh, self.checkpoints = config, workdir, mesh, checkpoints
        self.data: TextData = open_data(
            config.data, tokenizer=start_tokenizer(config, saved), show_progress=jax.process_index() == 0
        )
        for name, splits in self.data.report.items():
            for split, counts in splits.items():
                say(f"{name} {split}: " + ", ".join(f"{counts[key]:,} {key}" for key in counts if counts[key]))
        for warning in check_same_text(saved, self.data) if saved else ():
            say(f"warning: {warning}")
        self.model = MODELS[config.model.name](config.model, self.data.tokenizer.vocab_size)
        self.state = self._restore() if saved else self._start()
        check_groups(config.optimizer, self.state["params"])
        self.step = int(self.state["step"])
        self.evaluation_step = make_evaluation_step(self.model, self.data.tokenizer.token_bytes)
        if jax.process_index() == 0:
            path = epath.Path(workdir)
            write_whole(path / "config.json", json.dumps(to_dict(config), indent=1))
            if self.step == 0:
                (path / "results.json").unlink(missing_ok=True)

    def _start(self):
        target = abstract_state(self.model, self.config, self.mesh)
        check_free_space(self.workdir, state_bytes(target), self.config.train.max_to_keep)
        state = place_state(self.model, self.config, self.mesh)
        state["router_state"] = start_router_state(
            state["router_state"], self.data.token_shares, self.config.model, self.data.tokenizer.vocab_size
        )
        if self.config.init.checkpoint:
            include = tuple(prefix for prefix in self.config.init.include.split(",") if prefix)
            part = {name: state[name] for name in ("params", "router_state")}
            if reason := self._other_routers():
                say(f"the routers' state starts fresh: {reason}")
                del part["router_state"]
            filled, report = fill_from(self.config.init.checkpoint, part, include)
            say(str(report))
            state |= filled
        elif self.config.init.upcycle_from:
            state["params"], report = upcycle(self.config, state["params"], self.model.vocab_size, self.mesh)
            say(str(report))
            for warning in report.warnings:
                say(f"warning: at step 0 the model is not the dense one: {warning}")
        if "ema" in state and (self.config.init.checkpoint or self.config.init.upcycle_from):
            state["ema"] = jax.jit(lambda params: jax.tree.map(jnp.copy, params))(state["params"])
        return state

    def _other_routers(self) -> str:
        """Why the routers' state of `init.checkpoint` is not for this model: ids in a table mean other tokens or experts."""
        model = from_dict(load_meta(self.config.init.checkpoint)["config"]).model
        theirs = {place.name: place.ffn.moe for place in places(model, "routed")}
        new_tokens = start_tokenizer(self.config, None) is None
        for place in places(self.config.model, "routed"):
            ours, path = place.ffn.moe, options_path(self.config.model, place.ffn)
            if new_tokens and ROUTERS[ours.router].start:
                return "its tokens are those of another tokenizer"
            for name in ("router", "experts", "virtual_experts") if place.name in theirs else ():
                if (old := getattr(theirs[place.name], name)) != getattr(ours, name):
                    return f"{path}moe.{name} is {getattr(ours, name)}, and {old} in init.checkpoint"
        return ""

    def _restore(self):
        restored = self.checkpoints.restore(abstract_state(self.model, self.config, self.mesh))
        say(f"resumed at step {restored.step}")
        return restored.state

    def variables(self) -> dict[str, Any]:
        """What evaluation uses: the averaged parameters where the config keeps them, and the routers' state."""
        return {
            "params": self.state.get("ema", self.state["params"]),
            "router_state": self.state["router_state"],
        }

    def save(self) -> None:
        """Saves the state after `self.step` steps, unless it is there."""
        meta = {
            "config": to_dict(self.config),
            "tokenizer": self.data.tokenizer.to_json(),
            "data_fingerprint": self.data.fingerprint,
            "text": self.data.identity,
            "step": self.step,
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
        }
        self.checkpoints.save(self.step, self.state, meta)

    def compile(self, batch) -> Any:
        """The compiled step; donates the state."""
        return compile_train_step(self.model, self.config, self.mesh, self.state, batch)

    def evaluate(self, writer: MetricsWriter, bar: ProgressBar) -> None:
        """Writes loss and bits per byte of every validation source."""
        row = {}
        for name, source in self.data.evaluation("validation").items():
            scores = evaluate(
                self.evaluation_step,
                self.variables(),
                source,
                self.mesh,
                self.config.data.batch_size,
                limit=self.config.train.eval_batches,
            )
            kept = ("loss", "perplexity", "bits_per_byte", "router/usage", "router/unevenness")
            row |= {f"eval/{name}/{key}": scores[key] for key in kept if key in scores}
            bar.write(
                f"step {self.step}: {name} validation loss {scores['loss']:.4f}, {scores['bits_per_byte']:.4f} bits per byte"
            )
        writer.write(self.step, row)

    def run(self, interrupts: Interrupts) -> int:
        """Trains to the last step; returns the exit code."""
        c, t = self.config, self.config.train
        parameters = sum(a.size for a in jax.tree.leaves(self.state["params"]))
        say(
            f"{parameters:,} parameters, {jax.device_count()} {jax.devices()[0].device_kind} devices, mesh "
            + ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
            + f"; {self.data.train_tokens:,} training tokens, {t.steps * c.data.batch_size * c.data.sequence_length:,} to train on"
        )
        rows = local_rows(self.mesh, c.data.batch_size)
        first = self.data.train_batch(c.seed, c.data.batch_size, self.step, rows)
        if signum := interrupts.agreed(0):
            return self._stop_before_training(signum)
        started = time.perf_counter()
        compiled = self.compile(put_batch(first, self.mesh, c.data.batch_size))
        say(f"compiled in {time.perf_counter() - started:.1f} s")
        if signum := interrupts.agreed(0):
            return self._stop_before_training(signum)
        with (
            contextlib.closing(self.data.train_batches(c.seed, c.data.batch_size, start_step=self.step, rows=rows)) as batches,
            MetricsWriter(self.workdir, tensorboard=t.tensorboard, resume_step=self.step) as writer,
            ProgressBar(t.steps, self.step, enabled=jax.process_index() == 0) as bar,
            Profile(t.profile_steps, self.workdir) as profile,
        ):
            reporter = Reporter(c, self.data.tokenizer.vocab_size, self.step, writer, bar)
            return self._loop(compiled, batches, interrupts, reporter, profile)

    def _loop(self, compiled, batches, interrupts, reporter: Reporter, profile: Profile) -> int:
        c, t = self.config, self.config.train
        waiting = collections.deque()
        reporter.start()
        while self.step < t.steps:
            profile.before(self.step + 1)
            batch = put_batch(next(batches), self.mesh, c.data.batch_size)
            with reporter.inside_step():
                self.state, metrics = compiled(self.state, batch)
                self.step += 1
                waiting.append(metrics)
                # One step stays queued, so that the device has work while the host prepares the next batch; none at the end.
                while len(waiting) > (self.step < t.steps):
                    if int(waiting.popleft()["skipped_in_row"]) >= t.max_skipped:
                        return self._stop_skipping(reporter, self.step - len(waiting))
            profile.after(self.step, metrics)
            due = {
                "log": self.step % t.log_every == 0 or self.step == t.steps,
                "save": (t.checkpoint_every and self.step % t.checkpoint_every == 0) or self.step == t.steps,
                "eval": (t.eval_every and self.step % t.eval_every == 0) or self.step == t.steps,
            }
            if any(due.values()):
                with reporter.inside_step():  # or the wait would count as time outside
                    jax.block_until_ready(metrics)
            if due["log"]:
                reporter.log(self.step, jax.device_get(metrics))
            signum = interrupts.agreed(self.step)
            with reporter.outside():
                if signum:  # before an evaluation, which may take longer than whoever sent the signal waits
                    self.save()
                    self.checkpoints.wait()
                    reporter.bar.write(f"saved step {self.step}; run the same command to go on")
                # Else evaluated before it is saved: a row of a saved step is never missing after a restart.
                if due["eval"]:
                    self.evaluate(reporter.writer, reporter.bar)
                if due["save"]:
                    self.save()
            reporter.bar.update(self.step)
            if signum:
                return exit_code(signum)
        self.checkpoints.wait()
        return 0

    def _stop_before_training(self, signum: int) -> int:
        say(f"stopped at step {self.step}, before the first step; run the same command to go on")
        return exit_code(signum)

    def _stop_skipping(self, reporter: Reporter, step: int) -> int:
        lower = "optimizer.learning_rate"
        if self.checkpoints.steps():  # which may be resumed with its own learning rate only
            fix = f"start in another --workdir with a lower {lower} and init.checkpoint={self.workdir}"
        else:
            fix = f"lower {lower}"
        reporter.bar.write(
            f"error: {self.config.train.max_skipped} steps in a row up to step {step} had a non-finite loss or "
            f"gradient; {fix}, or raise train.max_skipped"
        )
        return 1
