"""Compares named arms over the same seeds: trains them all, and writes a table with intervals, and plots.

    python -m moe_jax.study --config=configs/studies/X.py --workdir=DIR
    python -m moe_jax.study --config=configs/studies/X.py --workdir=DIR --scale=full --jobs=2
    python -m moe_jax.study --workdir=DIR --summary

First the steps of all arms are timed in turns in one process, which predicts how long everything takes; then each arm
trains from each seed in DIR/runs/ARM/seed_N; then the steps of the trained arms are timed, whose numbers the table has.
Results: DIR/study.json, study.md and *.png, at the end and whenever --summary asks. Interrupted (Ctrl-C, SIGTERM), the
runs save, and the same command goes on. A run that fails is counted, those that need it are not run, the others go on, and
the exit code is 1; the same command tries it again. The study is fixed by the first command: later ones may only add arms and
seeds. --config.a.b=VALUE sets a field of the base that all arms share, and of those that arms have of their own.
"""

import contextlib
import json
import os
import pathlib
import shlex
import sys

from absl import flags as absl_flags

from moe_jax import cli
from moe_jax.config import ConfigError
from moe_jax.config.study import Arm, Study


def define_flags(values: absl_flags.FlagValues) -> None:
    """The command's own flags."""
    options = {"flag_values": values}
    text = "full adds the study's settings for it."
    absl_flags.DEFINE_enum("scale", "small", ["small", "full"], text, **options)
    text = "Runs side by side, each on its share of the cores. Times are measured apart and do not depend on it."
    absl_flags.DEFINE_integer("jobs", 1, text, lower_bound=1, **options)
    text = "Turns in which the steps of all arms are timed."
    absl_flags.DEFINE_integer("rounds", 12, text, lower_bound=3, **options)
    text = "Only write the results of what is in --workdir."
    absl_flags.DEFINE_boolean("summary", False, text, **options)


def main(study: Study | None, flags: absl_flags.FlagValues) -> int:
    """Runs the command."""
    if "://" in flags.workdir:
        raise ConfigError("--workdir", flags.workdir, "not on this machine", "name a local folder")
    from moe_jax.study.description import DESCRIPTION, check_unchanged, load_description, save_description
    from moe_jax.study.plan import prepare

    if flags.summary:
        if load_description(flags.workdir) is None:
            limit = f"no {DESCRIPTION} in it"
            raise ConfigError("--workdir", flags.workdir, limit, "name the folder of a study")
        return summarize(flags.workdir)
    if study is None:
        raise ConfigError("--config", None, "not given", "write --config=FILE, or --summary")
    study = prepare(study, flags.scale)
    from moe_jax.train.workdir import lock_workdir

    with contextlib.ExitStack() as stack:
        if problem := lock_workdir(flags.workdir, stack):
            raise problem
        if begun := load_description(flags.workdir):
            if (pathlib.Path(flags.workdir) / "runs").exists():  # else nothing has begun: it was refused
                check_unchanged(begun[0], study)
        save_description(flags.workdir, study, {"scale": flags.scale, "command": _command()})
        code = run(study, flags)
    return code


def _command() -> str:
    """What a person writes to get the study again."""
    return shlex.join(["python", "-m", "moe_jax.study", *sys.argv[1:]])


def run(study: Study, flags: absl_flags.FlagValues) -> int:
    """All phases of a study; returns the exit code."""
    from moe_jax.study import child
    from moe_jax.study.plan import run_folder
    from moe_jax.study.runs import Children, run_jobs

    with Children() as children:
        if code := _time_arms(study, flags, children, "before"):
            return code
        timing = _read_timing(flags.workdir, "before")
        for line in announcement(study, timing, flags.jobs):
            say(line)
        pairs = [(seed, arm) for seed in study.seeds for arm in study.arms]
        todo = [pair for pair in pairs if not (run_folder(flags.workdir, pair[1].name, pair[0]) / child.VALIDATION).exists()]
        jobs = [_job(study, flags.workdir, arm, seed, timing) for seed, arm in todo]
        codes = run_jobs(jobs, flags.jobs, children, len(pairs) - len(todo)) if jobs else {}
        failed = sum(code != 0 for code in codes.values())
        if not children.signum and child.finished_folders(study, flags.workdir):
            if code := _time_arms(study, flags, children, "after"):
                failed += 1
        if children.signum:
            summarize(flags.workdir)
            say("stopped and saved; run the same command to go on")
            return 128 + children.signum
    return summarize(flags.workdir) or int(failed > 0)


def _job(study: Study, workdir: str, arm: Arm, seed: int, timing: dict):
    from moe_jax.study.plan import run_folder, run_name
    from moe_jax.study.schedule import Job

    command = [sys.executable, "-m", "moe_jax.study.child", "train", workdir, arm.name, str(seed)]
    facts, folder = timing["arms"][arm.scores or arm.name], run_folder(workdir, arm.name, seed)
    seconds = predicted_seconds(facts, bool(arm.scores))
    after = (run_name(needed, seed),) if (needed := study.needs(arm)) else ()
    return Job(run_name(arm.name, seed), command, folder, facts["steps"], seconds, after)


def _time_arms(study: Study, flags, children, phase: str) -> int:
    """The timing of a phase in a process of its own, unless it is there; returns 0 or the exit code to stop with."""
    from moe_jax.study.child import timing_fingerprint

    kept = _read_timing(flags.workdir, phase)
    if kept and kept["fingerprint"] == timing_fingerprint(study, flags.workdir, phase, flags.rounds):
        return 0
    command = [sys.executable, "-m", "moe_jax.study.child", "time", flags.workdir, phase, str(flags.rounds)]
    say(f"timing the steps of {len(study.trained())} arms in turns, {phase} training")
    code = children.wait(children.start(command))
    return 128 + children.signum if children.signum else code


def _read_timing(workdir: str, phase: str) -> dict | None:
    try:
        return json.loads((pathlib.Path(workdir) / f"timing_{phase}.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def predicted_seconds(arm: dict, scores: bool = False) -> float:
    """Of one run of an arm: its steps, evaluations as forward passes of a third of a step, and starting up.

    Of one that is scored once more, the starting up and the last evaluation.
    """
    ms = arm.get("ms") or 0.0
    start = 15.0 + 2 * arm.get("compile_seconds", 0.0)
    if scores:
        return start + arm["last_evaluation_batches"] * ms / 3e3
    return arm["steps"] * ms / 1e3 + arm["evaluation_batches"] * ms / 3e3 + start


def announcement(study: Study, timing: dict, jobs: int) -> list[str]:
    """What will be trained and how long it will take, before it begins."""
    lines = [
        f"{len(study.arms)} arms x {len(study.seeds)} seeds {', '.join(map(str, study.seeds))}; "
        f"differences against {study.baseline}"
    ]
    total = 0.0
    for arm in study.arms:
        f = timing["arms"][arm.scores or arm.name]
        seconds = predicted_seconds(f, bool(arm.scores))
        total += seconds * len(study.seeds)
        if arm.scores:
            lines.append(f"  {arm.name}: the runs of {arm.scores}, scored once more")
            continue
        start = study.defined_by(arm).starts_from
        start = f"starts from {start}; " if start else ""
        step = f"cannot be timed ({f['error']})" if "error" in f else f"{f['ms']:.1f} ms a step"
        lines.append(
            f"  {arm.name}: {start}{f['tokens']:,} tokens, {f['epochs']:.2f} epochs; {f['training_flops_per_token'] / 1e6:.2f} "
            f"MFLOP a token in training, {f['router_flops_per_token'] / 1e6:.3f} of them routers; "
            f"{f['parameters']:,} parameters, {f['active_parameters']:,} active; {step}, "
            f"{_interval(seconds)} a run, {_interval(seconds * len(study.seeds))} for all seeds"
        )
    side = f", less with {jobs} runs side by side" if jobs > 1 else ""
    lines.append(f"predicted: {_interval(total)} one after the other{side}")
    return lines


def _interval(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def summarize(workdir: str) -> int:
    """Writes study.json, study.md and the plots; prints the tables."""
    from moe_jax.study.collect import collect
    from moe_jax.study.plots import draw
    from moe_jax.study.summary import to_markdown
    from moe_jax.train.metrics import write_whole

    folder = pathlib.Path(workdir)
    result = collect(workdir)
    write_whole(folder / "study.json", json.dumps(result, indent=1, allow_nan=False))
    pictures = draw(result, folder)
    text = to_markdown(result, pictures)
    write_whole(folder / "study.md", text)
    print(text, flush=True)
    say(f"written: {os.path.join(workdir, 'study.json')}, study.md" + "".join(f", {p}" for p in pictures))
    return 0


def say(line: str) -> None:
    """Prints a line on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, flags=define_flags, config_from="study")
