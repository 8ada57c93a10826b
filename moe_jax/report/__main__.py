"""Writes one HTML page that shows what a run's routers do.

    python -m moe_jax.report --workdir=runs/quickstart
    python -m moe_jax.report --workdir=runs/quickstart --against=500 --output=report.html
    python -m moe_jax.report --workdir=runs/books --source=code='src/**/*.py' --source=notes='notes/*.txt'

From metrics.jsonl: losses, speed, the load of every expert over time. From the checkpoint, on held-out text: which token
pieces and which sources go to which expert, which experts are chosen together, what changed since an older checkpoint, and
passages of text coloured by expert. The page needs no network and no other file.
"""

import contextlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags as absl_flags
from etils import epath

from moe_jax import cli
from moe_jax.config import Config, ConfigError
from moe_jax.evaluate.__main__ import define_text_flags, evaluation_sets, parse_sources

if TYPE_CHECKING:
    from moe_jax.train.restore import LoadedRun

PAGE_BYTES = 1_900_000
# With pieces, pairs and passages: few layers of many experts, or all of few.
DETAILED_COLUMNS, DETAILED_LAYERS = 1024, (3, 12)
_PASSAGE = 600


def define_flags(values: absl_flags.FlagValues) -> None:
    """The command's own flags."""
    options = {"flag_values": values}
    absl_flags.DEFINE_string("output", "", "The page; empty: report.html in --workdir.", **options)
    text = "Compare the choices with this step's, or with the newest of another run's folder; empty: the oldest kept step."
    absl_flags.DEFINE_string("against", "", text, **options)
    text = "Take about so many tokens of each source, in whole batches."
    absl_flags.DEFINE_integer("tokens", 20_000, text, lower_bound=1, **options)
    define_text_flags(values)


def main(config: Config, flags: absl_flags.FlagValues) -> None:
    """Runs the command."""
    sources = parse_sources(flags.source or [])
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library has to say
        page = _page(config, flags, sources)
    import jax

    if jax.process_index() == 0:
        output = epath.Path(flags.output).expanduser() if flags.output else epath.Path(flags.workdir) / "report.html"
        try:
            output.write_text(page)
        except OSError as error:
            raise ConfigError("--output", str(output), str(error), "name a file that can be written") from None
        print(output, flush=True)


def _page(config: Config, flags: Any, sources: dict[str, str]) -> str:
    from moe_jax.report.analysis import analyse, spread
    from moe_jax.report.collect import column_names, make_recording_step, observe, routed_layers
    from moe_jax.report.overview import Material, lead
    from moe_jax.report.page import frame
    from moe_jax.report.sections import build
    from moe_jax.train.metrics import read_metrics
    from moe_jax.train.restore import load_run
    from moe_jax.train.routing_history import read_history

    rows = read_metrics(flags.workdir)
    if not rows:
        fix = "name the --workdir of a run that has logged a step"
        raise ConfigError("--workdir", flags.workdir, "no metrics.jsonl with a row in it", fix)
    run = load_run(flags.workdir, config, flags.step)
    older, why = _older(flags, run) if routed_layers(config.model) else (None, "")
    sets = evaluation_sets(run, flags, sources)
    step = make_recording_step(run.model)
    observed = observe(run, sets, flags.tokens, _PASSAGE, label=f"step {run.step}", step=step)
    before, words = None, ""
    if older:
        loaded = load_run(older.workdir, older.config, older.step)
        words = f"step {loaded.step:,}" + ("" if older.workdir == flags.workdir else f" of {older.workdir}")
        # Of one config the step is compiled already.
        step = step if older.config is config else None
        before = observe(loaded, sets, flags.tokens, 0, label=f"step {loaded.step}", step=step)
    few, many = DETAILED_LAYERS
    columns = max(map(len, column_names(config.model).values()), default=1)
    detailed = spread(list(observed.layers), min(max(DETAILED_COLUMNS // columns, few), many))
    analyses = analyse(observed, before, detailed, pieces=12)
    material = Material(run, rows, observed, analyses, detailed, words, why, read_history(flags.workdir))
    title = f"Routers of {epath.Path(flags.workdir).name}" if analyses else f"Run {epath.Path(flags.workdir).name}"
    head = lead(material, flags.workdir, "" if sources else flags.split)
    return frame(title, head, build(material, PAGE_BYTES))


class _Older(NamedTuple):
    """A checkpoint to compare with. step: None is the newest."""

    workdir: str
    config: Config
    step: int | None


def _older(flags: Any, run: "LoadedRun") -> tuple[_Older | None, str]:
    """What --against names, and why there is nothing to compare with where there is not; nothing is computed yet.

    Raises:
      ConfigError: no such checkpoint, or one of another tokenizer, other layers or other experts.
    """
    from moe_jax.config.load import load_saved_config
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.report.collect import column_names
    from moe_jax.train.checkpoint import Checkpoints, load_meta

    if not flags.against or flags.against.isdecimal():
        with Checkpoints(flags.workdir, read_only=True) as checkpoints:
            steps = checkpoints.steps()
        step = int(flags.against) if flags.against else steps[0]
        if step not in steps:
            raise ConfigError("--against", step, f"no checkpoint of this step, only of {steps}", "name one of these")
        if not flags.against and step >= run.step:
            why = "the run keeps no older checkpoint (config.train.max_to_keep), and --against names none"
            return None, why
        return _Older(flags.workdir, run.config, step), ""
    fix = "name a saved step, or the folder of a run of the same model"
    try:
        config = load_saved_config(flags.against)
        tokenizer = Tokenizer.from_json(load_meta(flags.against)["tokenizer"])
    except ConfigError as error:
        raise ConfigError("--against", flags.against, str(error), fix) from None
    if tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise ConfigError("--against", flags.against, "it has another tokenizer", fix)
    ours, theirs = (column_names(c.model) for c in (run.config, config))
    if ours != theirs:
        raise ConfigError("--against", flags.against, "it has other routed layers or experts", fix)
    # The same rows go through both, on the same devices.
    config.mesh, config.data = run.config.mesh, run.config.data
    return _Older(flags.against, config, None), ""


if __name__ == "__main__":
    cli.run(main, flags=define_flags, config_from="workdir")
