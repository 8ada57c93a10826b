"""Rows of metrics with where the time went, the progress bar, and the profiler's trace of some steps."""

import contextlib
import time
from typing import Any

import jax
from etils import epath

from moe_jax.config import Config
from moe_jax.models.flops import experts_run, training_flops_per_token
from moe_jax.models.places import by_layer
from moe_jax.train.metrics import MetricsWriter
from moe_jax.train.peaks import peak_flops
from moe_jax.train.progress import ProgressBar
from moe_jax.train.routing_metrics import routing_metrics


class Reporter:
    """Rows of metrics and the progress bar, and where the time goes.

    Args:
      config: the run's.
      vocab_size: V of its tokenizer.
      step: the last step before the first row.
      writer, bar: where rows and lines go.
    """

    def __init__(self, config: Config, vocab_size: int, step: int, writer: MetricsWriter, bar: ProgressBar):
        self.config, self.writer, self.bar, self.last_logged = config, writer, bar, step
        self.tokens_per_step = config.data.batch_size * config.data.sequence_length
        self.vocab_size = vocab_size
        known = peak_flops(jax.devices()[0].device_kind) or 0.0
        self.peak = (config.train.peak_tflops * 1e12 or known) * jax.device_count()
        self.start()

    def start(self) -> None:
        """Starts the clock of the next row."""
        self.began, self.paused, self.stepping = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def inside_step(self):
        """Time spent in the jitted step or waiting for it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stepping += time.perf_counter() - began

    @contextlib.contextmanager
    def outside(self):
        """Time that is neither: evaluation and checkpoints."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - began

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes the row of `step`; `metrics` are the step's, on the host."""
        stats = by_layer(metrics["stats"], self.config.model)
        experts = experts_run(self.config.model, stats)
        model, length = self.config.model, self.config.data.sequence_length
        flops_per_token = training_flops_per_token(model, self.vocab_size, length, experts)
        seconds = max(time.perf_counter() - self.began - self.paused, 1e-9)
        speed = (step - self.last_logged) * self.tokens_per_step / seconds
        row = {
            "loss": metrics["loss"],
            "tokens_per_second": speed,
            "gradient_norm": metrics["gradient_norm"],
            "learning_rate": metrics["learning_rate"],
            "skipped": metrics["skipped"],
            "tflops_per_second": speed * flops_per_token / 1e12,
            "step_share": self.stepping / seconds,
        }
        if self.peak:
            row["mfu"] = speed * flops_per_token / self.peak
        row |= {f"router/{name}_loss": value for name, value in metrics["losses"].items()}
        row |= {f"router/{name}/experts_per_token": value for name, value in experts.items()}
        if experts:
            row["router/experts_per_token"] = sum(experts.values()) / len(experts)
            row["flops_per_token"] = flops_per_token
        row |= routing_metrics(stats)
        self.writer.write(step, row)
        self.bar.update(step, float(metrics["loss"]), speed)
        self.last_logged = step
        self.start()


class Profile:
    """Context manager: the profiler's trace of some steps, in workdir/profile, whole also where the run ends among them.

    Args:
      steps: "first:end", the steps first..end-1 counted from 1; empty: none. A run that starts among them traces the rest.
      workdir: of the run.
    """

    def __init__(self, steps: str, workdir):
        self.first, self.end = (int(number) for number in steps.split(":")) if steps else (0, 0)
        self.directory, self.tracing = str(epath.Path(workdir) / "profile"), False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._stop()

    def before(self, step: int) -> None:
        """Call it before `step` is started."""
        if self.first <= step < self.end and not self.tracing:
            jax.profiler.start_trace(self.directory)
            self.tracing = True

    def after(self, step: int, metrics: Any) -> None:
        """Call it once `step` is started; waits for its `metrics` if it is the last to trace."""
        if self.tracing and step + 1 == self.end:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self):
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
