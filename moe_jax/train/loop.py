"""The run: how it begins, the text, the model, the compiled step, and the loop with its rows, evaluations and checkpoints."""

import collections
import contextlib
import json
import logging
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from moe_jax.config import Config, ConfigError, from_dict, to_dict
from moe_jax.config.load import run_folder
from moe_jax.config.train import kept_steps
from moe_jax.config.validate import validate
from moe_jax.data import Curriculum, TextData, Tokenizer, check_same_text, open_data
from moe_jax.models import MODELS
from moe_jax.models.places import by_layer, places
from moe_jax.parallel.mesh import mesh_from_config, start_devices
from moe_jax.parallel.rules import local_rows, put_batch
from moe_jax.routing import ROUTERS
from moe_jax.train.checkpoint import Checkpoints, DamagedCheckpointError
from moe_jax.train.curriculum import open_curriculum, placed_curriculum
from moe_jax.train.evaluation import evaluate, make_evaluation_step
from moe_jax.train.interrupt import Interrupts, exit_code
from moe_jax.train.metrics import MetricsWriter, write_whole
from moe_jax.train.optimizer import check_groups, warmup_steps
from moe_jax.train.progress import ProgressBar
from moe_jax.train.reporter import Profile, Reporter
from moe_jax.train.routing_history import FILE_NAME as ROUTING
from moe_jax.train.routing_history import Recorder, due, fluctuation
from moe_jax.train.routing_metrics import describe_frozen
from moe_jax.train.start import begin, check_resume, resume, run_meta, way_of
from moe_jax.train.state import State, abstract_state, overlay, total_bytes
from moe_jax.train.step import compile_train_step
from moe_jax.train.workdir import check_free_space, own_workdir


def fit(config: Config, workdir) -> int:
    """Trains, or goes on where `workdir` stands; returns the exit code: 0 complete, 143 or 130 interrupted and saved, 1 stopped
    after too many non-finite steps.

    Raises:
      ConfigError: the config does not fit the devices, the data or the checkpoint in `workdir`; `workdir` cannot be
        written, or another run is there; no checkpoint in it, or in the run it starts from, can be read.
    """
    start_devices(config.mesh)
    show_log()
    validate(config, jax.device_count())
    mesh, folder, t = mesh_from_config(config.mesh), run_folder(workdir), config.train
    with Interrupts(every=min(t.log_every, 10)) as interrupts:
        try:
            with (
                own_workdir(folder),
                Checkpoints(
                    folder, max_to_keep=t.max_to_keep, keep=kept_steps(t), asynchronous=t.async_checkpoint
                ) as checkpoints,
                jax.set_mesh(mesh),
            ):
                code = train(config, folder, mesh, checkpoints, interrupts)
        except DamagedCheckpointError as error:
            fix = f"put back a copy of its files, or name another {error.field.removeprefix('--')}"
            raise ConfigError(error.field, error.workdir, str(error), fix) from error
        # After the last step, such as while the last checkpoint was written.
        if code == 0 and (signum := interrupts.agreed(0)):
            say("all steps are done and saved; run the same command for what comes after them")
            return exit_code(signum)
        return code


def train(config: Config, folder: epath.Path, mesh, checkpoints: Checkpoints, interrupts: Interrupts) -> int:
    """One run, from its beginning to its end; returns the exit code, as `fit`."""
    # How it begins: from its own newest checkpoint, or as config.init says. What cannot work is refused before the
    # text is read.
    saved = checkpoints.restore_meta() if checkpoints.steps() else None
    if saved:
        parameters = [path.removeprefix("params/") for path in checkpoints.restore_paths() if path.startswith("params/")]
        for warning in check_resume(from_dict(saved["config"]), config, parameters):
            say(f"warning: {warning}")
        # The description is an older step's where the newest one's cannot be read.
        if saved["step"] == checkpoints.latest_step() >= config.train.steps:
            fix = "raise --config.train.steps to go on, or use another --workdir"
            say(f"complete: {folder} has all {saved['step']} steps; {fix}")
            return 0
        tokenizer = Tokenizer.from_json(saved["tokenizer"])
    else:
        way_of(config).check(config)
        tokenizer = way_of(config).tokenizer(config)
    if (warmup := warmup_steps(config.optimizer, config.train)) < (asked := config.optimizer.warmup_steps):
        say(f"warning: config.optimizer.warmup_steps={asked} is more than the steps there are: the warm-up takes all {warmup}")

    if late := [step for step in kept_steps(config.train) if step > config.train.steps]:
        say(f"warning: config.train.keep_steps={config.train.keep_steps}: there is no step {late[0]}")

    # The text.
    data = open_data(config.data, tokenizer=tokenizer, show_progress=jax.process_index() == 0)
    for name, splits in data.report.items():
        for split, counts in splits.items():
            say(f"{name} {split}: " + ", ".join(f"{counts[key]:,} {key}" for key in counts if counts[key]))
    for warning in check_same_text(saved, data) if saved else ():
        say(f"warning: {warning}")

    # The model and its state.
    model = MODELS[config.model.name](config.model, data.tokenizer.vocab_size)
    curriculum = open_curriculum(config, data)
    shapes = abstract_state(model, config, mesh)
    check_groups(config.optimizer, shapes["params"])
    if saved:
        state, lines = resume(config, model, mesh, checkpoints, placed_curriculum(curriculum, mesh))
    else:
        check_free_space(folder, total_bytes(shapes), config.train.max_to_keep + len(kept_steps(config.train)))
        state, lines = begin(config, model, data, mesh)
    for line in lines:
        say(line)

    # The steps.
    trainer = Trainer(config, folder, mesh, checkpoints, data, model, state, curriculum)
    trainer.describe()
    return trainer.run(interrupts)


class Trainer:
    """The steps of a run, from the state that it begins with to its last."""

    def __init__(
        self,
        config: Config,
        folder: epath.Path,
        mesh,
        checkpoints: Checkpoints,
        data: TextData,
        model: nn.Module,
        state: State,
        curriculum: Curriculum | None = None,
    ):
        self.config, self.folder, self.mesh, self.checkpoints = config, folder, mesh, checkpoints
        self.data, self.model, self.state, self.step = data, model, state, int(state["step"])
        if curriculum and "curriculum" in state:
            curriculum.load(jax.device_get(self.state.pop("curriculum")), self.step)
        self.curriculum = curriculum
        self.evaluation_step = make_evaluation_step(model, data.tokenizer.token_bytes)
        snapshots = config.train.routing_snapshots and places(config.model, "routed")
        self.frozen = 0
        self.recorder = Recorder(config, folder, mesh, data, model, self.step) if snapshots else None

    def describe(self) -> None:
        """Writes config.json and says how large the run is."""
        c = self.config
        if jax.process_index() == 0:
            write_whole(self.folder / "config.json", json.dumps(to_dict(c), indent=1))
            if self.step == 0:
                for left in ("results.json", ROUTING):  # of a run that began here before
                    (self.folder / left).unlink(missing_ok=True)
        parameters = sum(a.size for a in jax.tree.leaves(self.state["params"]))
        to_train = c.train.steps * c.data.batch_size * c.data.sequence_length
        say(
            f"{parameters:,} parameters, {jax.device_count()} {jax.devices()[0].device_kind} devices, mesh "
            + ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
            + f"; {self.data.train_tokens:,} training tokens, {to_train:,} to train on"
        )

    def run(self, interrupts: Interrupts) -> int:
        """Compiles the step and trains to the last one; returns the exit code."""
        c, t = self.config, self.config.train
        rows = local_rows(self.mesh, c.data.batch_size)
        first = self.data.train_batch(c.seed, c.data.batch_size, self.step, rows, self.curriculum)
        if signum := interrupts.agreed(0):
            return self._stop_before_training(signum)
        started = time.perf_counter()
        compiled = self.compile(put_batch(first, self.mesh, c.data.batch_size))
        say(f"compiled in {time.perf_counter() - started:.1f} s")
        if signum := interrupts.agreed(0):
            return self._stop_before_training(signum)
        with (
            contextlib.closing(self.data.train_batches(c.seed, c.data.batch_size, self.step, rows, self.curriculum)) as batches,
            MetricsWriter(self.folder, tensorboard=t.tensorboard, resume_step=self.step) as writer,
            ProgressBar(t.steps, self.step, enabled=jax.process_index() == 0) as bar,
            Profile(t.profile_steps, self.folder) as profile,
        ):
            reporter = Reporter(c, self.data.tokenizer.vocab_size, self.step, writer, bar)
            return self._loop(compiled, batches, interrupts, reporter, profile)

    def compile(self, batch) -> Any:
        """The compiled step; donates the state."""
        return compile_train_step(self.model, self.config, self.mesh, self.state, batch)

    def _loop(self, compiled, batches, interrupts, reporter: Reporter, profile: Profile) -> int:
        c, t = self.config, self.config.train
        waiting, kept = collections.deque(), kept_steps(t)
        reporter.start()
        while self.step < t.steps:
            # Train.
            profile.before(self.step + 1)
            batch = put_batch(next(batches), self.mesh, c.data.batch_size)
            with reporter.inside_step():
                self.state, metrics = compiled(self.state, batch)
                self.step += 1
                waiting.append(metrics)
                # One step stays queued, so that the device has work while the host prepares the next batch; none at the end.
                if self._finish(waiting, int(self.step < t.steps), reporter):
                    return self._stop_skipping(reporter, self.step - len(waiting))
            profile.after(self.step, metrics)
            # Log.
            log, evaluation, save = (self._due(every) for every in (t.log_every, t.eval_every, t.checkpoint_every))
            save = save or self.step in kept
            record = self.recorder and due(self.step, t)
            if log or evaluation or save or record:
                with reporter.inside_step():  # or the wait would count as time outside
                    jax.block_until_ready(metrics)
            if log:
                reporter.log(self.step, jax.device_get(metrics))
            # Evaluate and save.
            signum = interrupts.agreed(self.step)
            # A checkpoint has the rows of all steps up to its own.
            if (signum or save) and self._finish(waiting, 0, reporter):
                return self._stop_skipping(reporter, self.step - len(waiting))
            with reporter.outside():
                if signum:  # before an evaluation, which may take longer than whoever sent the signal waits
                    self.save()
                    self.checkpoints.wait()
                    reporter.bar.write(f"saved step {self.step}; run the same command to go on")
                # Else evaluated before it is saved: a row of a saved step is never missing after a restart.
                if evaluation:
                    self.evaluate(reporter.writer, reporter.bar)
                if record:
                    self.record_routing(reporter.writer)
                if save:
                    self.save()
            reporter.bar.update(self.step)
            if signum:
                return exit_code(signum)
        self.checkpoints.wait()
        return 0

    def _finish(self, waiting, left: int, reporter: Reporter) -> bool:
        """Waits for the steps in `waiting` but the last `left`, and takes them off; whether too many in a row were skipped."""
        while len(waiting) > left:
            done = waiting.popleft()
            step = self.step - len(waiting)
            if int(done["skipped_in_row"]) >= self.config.train.max_skipped:
                return True
            if self.curriculum:
                self.curriculum.report(step - 1, np.stack(list(jax.device_get(done["rows"]).values()), axis=1))
            self._say_frozen(done, step, reporter.bar)
        return False

    def _say_frozen(self, metrics, step: int, bar: ProgressBar) -> None:
        """One line for the first step in which routers keep leaves frozen that learned before, or since the run goes on."""
        if (count := int(metrics["frozen"])) > self.frozen:
            stats = by_layer(jax.device_get(metrics["stats"]), self.config.model)
            blocks = places(self.config.model, "routed")
            stats = {p.name: stats[p.name] for p in blocks if ROUTERS[p.ffn.moe.router].frozen}
            bar.write(f"step {step}: {describe_frozen(stats)}")
        self.frozen = count

    def _due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is done now; 0: only after the last one."""
        return self.step == self.config.train.steps or bool(every) and self.step % every == 0

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

    def record_routing(self, writer: MetricsWriter) -> None:
        """Records the routing of the parameters as they are; after the last step writes how long it fluctuated."""
        history = self.recorder.record(self.step, {name: self.state[name] for name in ("params", "router_state")})
        if self.step == self.config.train.steps:
            layers = fluctuation(history, self.step)
            known = [name for name, share in next(iter(layers.values())).items() if share is not None]
            row = {f"router/{layer}/{name}": shares[name] for layer, shares in layers.items() for name in known}
            row |= {f"router/{name}": float(np.mean([shares[name] for shares in layers.values()])) for name in known}
            writer.write(self.step, row)

    def variables(self) -> dict[str, Any]:
        """What evaluation uses: the averaged parameters where the config keeps them, and the routers' state."""
        return {
            "params": overlay(self.state["params"], self.state.get("ema", {})),
            "router_state": self.state["router_state"],
        }

    def save(self) -> None:
        """Saves the state after `self.step` steps, unless it is there."""
        meta = run_meta(self.config, self.data, self.step)
        self.checkpoints.save(self.step, self.state | placed_curriculum(self.curriculum, self.mesh), meta)

    def _stop_before_training(self, signum: int) -> int:
        say(f"stopped at step {self.step}, before the first step; run the same command to go on")
        return exit_code(signum)

    def _stop_skipping(self, reporter: Reporter, step: int) -> int:
        lower = "optimizer.learning_rate"
        if self.checkpoints.steps():  # which may be resumed with its own learning rate only
            fix = f"start in another --workdir with a lower {lower} and init.checkpoint={self.folder}"
        else:
            fix = f"lower {lower}"
        reporter.bar.write(
            f"error: {self.config.train.max_skipped} steps in a row up to step {step} had a non-finite loss or "
            f"gradient; {fix}, or raise train.max_skipped"
        )
        return 1


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
