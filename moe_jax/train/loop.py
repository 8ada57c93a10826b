"""The run: set up or restore, then train with evaluation and checkpoints."""

import collections
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
from moe_jax.data import TextData, Tokenizer, open_data
from moe_jax.models import MODELS
from moe_jax.models.flops import training_flops_per_token
from moe_jax.models.stack import by_layer
from moe_jax.parallel.mesh import mesh_from_config, start_devices
from moe_jax.parallel.rules import batch_sharding, local_rows, put_batch, replicated
from moe_jax.train.checkpoint import Checkpoints, check_free_space, check_resume, fill_from, state_bytes
from moe_jax.train.evaluation import evaluate, make_evaluation_step
from moe_jax.train.interrupt import Interrupts, exit_code
from moe_jax.train.metrics import MetricsWriter, peak_flops, routing_metrics
from moe_jax.train.progress import ProgressBar
from moe_jax.train.state import abstract_state, place_state, state_shardings
from moe_jax.train.step import make_train_step
from moe_jax.validation import validate


def fit(config: Config, workdir: str) -> int:
    """Trains, or goes on where `workdir` stands; returns the exit code: 0 complete, 143 or 130 interrupted and saved, 1 stopped
    after too many non-finite steps.

    Raises:
      ConfigError: the config does not fit the devices, the data or the checkpoint in `workdir`.
    """
    start_devices(config.mesh)
    show_log()
    validate(config, jax.device_count())
    mesh = mesh_from_config(config.mesh)
    with (
        Interrupts(every=min(config.train.log_every, 10)) as interrupts,
        Checkpoints(
            workdir, max_to_keep=config.train.max_to_keep, asynchronous=config.train.async_checkpoint
        ) as checkpoints,
        jax.set_mesh(mesh),
    ):
        last = checkpoints.latest_step()
        saved = checkpoints.restore_meta() if last is not None else None
        if saved:
            for warning in check_resume(from_dict(saved["config"]), config):
                say(f"warning: {warning}")
        if last is not None and last >= config.train.steps:
            say(
                f"complete: {workdir} has all {last} steps; raise --config.train.steps to go on, or use another --workdir"
            )
            return 0
        return Trainer(config, workdir, mesh, checkpoints, saved).run(interrupts)


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
        tokenizer = Tokenizer.from_json(saved["tokenizer"]) if saved else None
        self.data: TextData = open_data(
            config.data, tokenizer=tokenizer, show_progress=jax.process_index() == 0
        )
        for name, splits in self.data.report.items():
            for split, counts in splits.items():
                say(
                    f"{name} {split}: " + ", ".join(f"{counts[key]:,} {key}" for key in counts if counts[key])
                )
        if saved and saved["data_fingerprint"] != self.data.fingerprint:
            raise ConfigError(
                "data.sources", self.data.fingerprint, f"the checkpoint was trained on {saved['data_fingerprint']}",
                "put the text back as it was, or use another --workdir",
            )  # fmt: skip
        self.model = MODELS[config.model.name](config.model, self.data.tokenizer.vocab_size)
        self.state = self._restore() if saved else self._start()
        self.step = int(self.state["step"])
        self.evaluation_step = make_evaluation_step(self.model, self.data.tokenizer.token_bytes)
        if jax.process_index() == 0:
            path = epath.Path(workdir)
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json").write_text(json.dumps(to_dict(config), indent=1))

    def _start(self):
        target = abstract_state(self.model, self.config, self.mesh)
        check_free_space(self.workdir, state_bytes(target), self.config.train.max_to_keep)
        state = place_state(self.model, self.config, self.mesh)
        if self.config.init.checkpoint:
            include = tuple(prefix for prefix in self.config.init.include.split(",") if prefix)
            part = {name: state[name] for name in ("params", "router_state")}
            filled, report = fill_from(self.config.init.checkpoint, part, include)
            say(str(report))
            state |= filled
            if "ema" in state:
                state["ema"] = jax.jit(lambda params: jax.tree.map(jnp.copy, params))(state["params"])
        return state

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
            "step": self.step,
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
        }
        self.checkpoints.save(self.step, self.state, meta)

    def compile(self, batch) -> Any:
        """The compiled step; donates the state."""
        state = state_shardings(self.model, self.config, self.mesh)
        rows = batch_sharding(self.mesh, self.config.data.batch_size)
        step = jax.jit(
            make_train_step(self.model, self.config),
            in_shardings=(state, rows),
            out_shardings=(state, replicated(self.mesh)),
            donate_argnums=0,
        )
        # XLA may keep bfloat16 values in float32 across what it fuses, and would round differently with scan or remat.
        exact = {"xla_allow_excess_precision": False} if self.config.model.dtype == "bfloat16" else None
        return step.lower(self.state, batch).compile(compiler_options=exact)

    def evaluate(self, writer: MetricsWriter, bar: ProgressBar) -> None:
        """Writes loss and bits per byte of every validation source."""
        row = {}
        for name, source in self.data.evaluation("validation").items():
            scores = evaluate(
                self.evaluation_step, self.variables(), source, self.mesh, self.config.data.batch_size,
                limit=self.config.train.eval_batches,
            )  # fmt: skip
            row |= {f"eval/{name}/{key}": scores[key] for key in ("loss", "perplexity", "bits_per_byte")}
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
        batches = self.data.train_batches(c.seed, c.data.batch_size, start_step=self.step, rows=rows)
        first = self.data.train_batch(c.seed, c.data.batch_size, self.step, rows)
        started = time.perf_counter()
        compiled = self.compile(put_batch(first, self.mesh, c.data.batch_size))
        say(f"compiled in {time.perf_counter() - started:.1f} s")
        writer = MetricsWriter(self.workdir, tensorboard=t.tensorboard, resume_step=self.step)
        with writer, ProgressBar(t.steps, self.step, enabled=jax.process_index() == 0) as bar:
            try:
                return self._loop(compiled, batches, interrupts, Reporter(self, writer, bar))
            finally:
                batches.close()

    def _loop(self, compiled, batches, interrupts, reporter) -> int:
        c, t = self.config, self.config.train
        profile = [int(number) for number in t.profile_steps.split(":")] if t.profile_steps else [0, 0]
        waiting = collections.deque()
        reporter.start()
        while self.step < t.steps:
            if self.step + 1 == profile[0]:
                jax.profiler.start_trace(str(epath.Path(self.workdir) / "profile"))
            batch = put_batch(next(batches), self.mesh, c.data.batch_size)
            with reporter.inside_step():
                self.state, metrics = compiled(self.state, batch)
                waiting.append(metrics)
                # One step stays queued, so that the device has work while the host prepares the next batch.
                if len(waiting) > 1 and int(waiting.popleft()["skipped_in_row"]) >= t.max_skipped:
                    return self._stop_skipping(reporter)
            self.step += 1
            if self.step + 1 == profile[1]:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
            due = {
                "log": self.step % t.log_every == 0 or self.step == t.steps,
                "save": (t.checkpoint_every and self.step % t.checkpoint_every == 0) or self.step == t.steps,
                "eval": (t.eval_every and self.step % t.eval_every == 0) or self.step == t.steps,
            }
            if due["log"]:
                with reporter.inside_step():
                    metrics = jax.device_get(metrics)
                reporter.log(self.step, metrics)
            with reporter.outside():
                # Evaluated before it is saved: a row of a saved step is never missing after a restart.
                if due["eval"]:
                    self.evaluate(reporter.writer, reporter.bar)
                if due["save"]:
                    self.save()
            reporter.bar.update(self.step)
            if signum := interrupts.agreed(self.step):
                self.save()
                self.checkpoints.wait()
                reporter.bar.write(f"saved step {self.step}; run the same command to go on")
                return exit_code(signum)
        self.checkpoints.wait()
        return 0

    def _stop_skipping(self, reporter) -> int:
        limit = self.config.train.max_skipped
        reporter.bar.write(
            f"error: {limit} steps in a row up to step {self.step} had a non-finite loss or gradient; lower "
            "optimizer.learning_rate, or raise train.max_skipped"
        )
        return 1


class Reporter:
    """Rows of metrics and the progress bar, and where the time goes."""

    def __init__(self, trainer: Trainer, writer: MetricsWriter, bar: ProgressBar):
        c = trainer.config
        self.config, self.writer, self.bar, self.last_logged = c, writer, bar, trainer.step
        self.tokens_per_step = c.data.batch_size * c.data.sequence_length
        vocab = trainer.data.tokenizer.vocab_size
        self.flops_per_token = training_flops_per_token(c.model, vocab, c.data.sequence_length)
        known = peak_flops(jax.devices()[0].device_kind) or 0.0
        self.peak = (c.train.peak_tflops * 1e12 or known) * jax.device_count()
        self.start()

    def start(self) -> None:
        """Starts the clock of the next row."""
        self.began, self.paused, self.stepping = time.perf_counter(), 0.0, 0.0

    def inside_step(self):
        """Time spent in the jitted step or waiting for it."""
        return _Stopwatch(self, "stepping")

    def outside(self):
        """Time that is neither: evaluation and checkpoints."""
        return _Stopwatch(self, "paused")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes the row of `step`; `metrics` are the step's, on the host."""
        seconds = max(time.perf_counter() - self.began - self.paused, 1e-9)
        speed = (step - self.last_logged) * self.tokens_per_step / seconds
        row = {
            "loss": metrics["loss"],
            "tokens_per_second": speed,
            "gradient_norm": metrics["gradient_norm"],
            "learning_rate": metrics["learning_rate"],
            "skipped": metrics["skipped"],
            "tflops_per_second": speed * self.flops_per_token / 1e12,
            "step_share": self.stepping / seconds,
        }
        if self.peak:
            row["mfu"] = speed * self.flops_per_token / self.peak
        row |= {f"router/{name}_loss": value for name, value in metrics["losses"].items()}
        row |= routing_metrics(by_layer(metrics["stats"], self.config.model))
        self.writer.write(step, row)
        self.bar.update(step, float(metrics["loss"]), speed)
        self.last_logged = step
        self.start()


class _Stopwatch:
    def __init__(self, reporter: Reporter, name: str):
        self.reporter, self.name = reporter, name

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *exception):
        setattr(
            self.reporter, self.name, getattr(self.reporter, self.name) + time.perf_counter() - self.began
        )
