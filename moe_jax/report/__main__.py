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
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags
from etils import epath

from moe_jax import cli
from moe_jax.config import Config, ConfigError
from moe_jax.evaluate.__main__ import define_text_flags, evaluation_sets, parse_sources

if TYPE_CHECKING:
    from moe_jax.report.collect import Observed
    from moe_jax.train.restore import LoadedRun

PAGE_BYTES = 2_000_000
DETAILED_LAYERS = 12
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
    from moe_jax.report.collect import make_recording_step, observe
    from moe_jax.report.page import frame
    from moe_jax.report.sections import Material, build, lead
    from moe_jax.train.metrics import read_metrics
    from moe_jax.train.restore import load_run

    rows = read_metrics(flags.workdir)
    if not rows:
        fix = "name the --workdir of a run that has logged a step"
        raise ConfigError("--workdir", flags.workdir, "no metrics.jsonl with a row in it", fix)
    run = load_run(flags.workdir, config, flags.step)
    sets = evaluation_sets(run, flags, sources)
    step = make_recording_step(run.model)
    observed = observe(run, sets, flags.tokens, _PASSAGE, label=f"step {run.step}", step=step)
    older, words, why = None, "", ""
    if observed.layers:
        folder, old_step, why = _against(flags, run)
        if folder:
            older, words = _observe_older(run, sets, flags, folder, old_step, observed, step)
    detailed = spread(list(observed.layers), DETAILED_LAYERS)
    facts = analyse(observed, older, detailed, pieces=12)
    material = Material(run, rows, observed, facts, detailed, words, why)
    title = f"Routers of {epath.Path(flags.workdir).name}" if facts else f"Run {epath.Path(flags.workdir).name}"
    head = lead(material, flags.workdir, "" if sources else flags.split)
    for scale in (1.0, 0.5, 0.25, 0.1):
        page = frame(title, head, build(material, scale))
        if len(page.encode()) <= PAGE_BYTES:
            break
    return page


def _against(flags: Any, run: "LoadedRun") -> tuple[str, int | None, str]:
    """(workdir, step or None for its newest, why there is nothing to compare with) of the older checkpoint."""
    from moe_jax.train.checkpoint import Checkpoints

    if flags.against and not flags.against.isdecimal():
        return flags.against, None, ""
    if flags.against:
        return flags.workdir, int(flags.against), ""
    with Checkpoints(flags.workdir, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    if steps[0] < run.step:
        return flags.workdir, steps[0], ""
    return "", None, "the run keeps no older checkpoint (config.train.max_to_keep), and --against names none"


def _observe_older(
    run: "LoadedRun", sets: dict, flags: Any, folder: str, old_step: int | None, observed: "Observed", step
) -> tuple["Observed", str]:
    """The same tokens under the other checkpoint, and what to call it."""
    from moe_jax.config_file import load_saved_config
    from moe_jax.report.collect import observe
    from moe_jax.train.restore import load_run

    config, same = run.config, folder == flags.workdir
    if not same:
        try:
            config = load_saved_config(folder)
        except ConfigError as error:
            raise ConfigError("--against", folder, str(error), "name a saved step or the folder of a run") from None
        config.mesh, config.data = run.config.mesh, run.config.data
    try:
        older = load_run(folder, config, old_step)
    except ConfigError as error:
        raise ConfigError("--against", flags.against or old_step, str(error), "name another step or run") from None
    if older.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise ConfigError("--against", folder, "it has another tokenizer", "name a run with the same one")
    # Recorded with the newer model's step where both are of one config: it is compiled already.
    seen = observe(older, sets, flags.tokens, 0, label=f"step {older.step}", step=step if same else None)
    shapes = [{name: layer.columns for name, layer in one.layers.items()} for one in (observed, seen)]
    if shapes[0] != shapes[1] or seen.batch != observed.batch:
        raise ConfigError("--against", folder, "it has other routed layers or experts", "name a run of the same model")
    return seen, f"step {older.step:,}" if same else f"step {older.step:,} of {folder}"


if __name__ == "__main__":
    cli.run(main, flags=define_flags, config_from="workdir")
