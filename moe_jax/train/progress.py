"""One line that says how far training is."""

import sys

import tqdm


class ProgressBar:
    """Steps done, loss, tokens per second and time left, on stderr.

    On a terminal and in a notebook a tqdm bar; elsewhere (a log file) a plain line at each `update`, as a
    bar's control characters would fill the log. Use as a context manager.

    Args:
      total: steps of the run. initial: steps done before, by an earlier run.
      enabled: False on all but one process: every method then does nothing.
    """

    def __init__(self, total: int, initial: int = 0, enabled: bool = True):
        self.total, self.enabled = total, enabled
        # A notebook's stderr is no terminal, but it obeys the carriage return. ipykernel is loaded only in a
        # kernel.
        self._live = enabled and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        # Plain lines want tqdm's clock and count, not its drawing.
        file = sys.stderr if self._live else _Nowhere()
        self._bar = tqdm.tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, disable=not enabled, file=file)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def update(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Moves to `step`; without a loss only a live bar moves, with one the text changes too."""
        if not self.enabled:
            return
        text = {}
        if loss is not None:
            text["loss"] = f"{loss:.4f}"
        if tokens_per_second is not None:
            text["tokens/s"] = f"{tokens_per_second:,.0f}"
        if text:
            self._bar.set_postfix(text, refresh=False)
        self._bar.update(step - self._bar.n)
        if text and not self._live:
            left = tqdm.tqdm.format_interval(self._seconds_left())
            words = "  ".join(f"{name} {value}" for name, value in text.items())
            print(f"step {step}/{self.total}  {words}  left {left}", file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._live:
            self._bar.write(line, file=sys.stderr)
        elif self.enabled:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()

    def _seconds_left(self) -> float:
        numbers = self._bar.format_dict
        done = numbers["n"] - numbers["initial"]
        return (self.total - numbers["n"]) * numbers["elapsed"] / done if done > 0 else 0.0


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, text):
        return len(text)

    def flush(self):
        pass
