"""Compares named arms over the same seeds: trains them all, and writes a table with intervals, and plots.

    python -m moe_jax.study --config=configs/studies/X.py --workdir=DIR
    python -m moe_jax.study --config=configs/studies/X.py --workdir=DIR --scale=full --jobs=2
    python -m moe_jax.study --workdir=DIR --summary

First the steps of all arms are timed in turns in one process, which predicts how long everything takes, and says how many
steps an arm of equal time has; with a grid, each arm is then trained with every candidate from the tuning seeds in
DIR/tuning/ARM/CANDIDATE/seed_N; then each arm trains from each seed in DIR/runs/ARM/seed_N; then the steps of the trained arms
are timed, whose numbers the table has. What is predicted to take more than the study's hours_limit is refused.
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
    text = (
        "Runs side by side, each on its share of the cores. Times are measured apart and do not depend on it. Reported "
        "runs of a study with arms of equal time go one after the other all the same."
    )
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
        if (begun := load_description(flags.workdir)) and _has_runs(flags.workdir):  # else it was refused
            check_unchanged(begun[0], study)
        save_description(flags.workdir, study, {"scale": flags.scale, "command": _command()})
        code = run(study, flags)
    return code


def _has_runs(workdir: str) -> bool:
    return any((pathlib.Path(workdir) / name).exists() for name in ("runs", "tuning"))


def _command() -> str:
    """What a person writes to get the study again."""
    return shlex.join(["python", "-m", "moe_jax.study", *sys.argv[1:]])


def run(study: Study, flags: absl_flags.FlagValues) -> int:
    """All phases of a study; returns the exit code."""
    from moe_jax.study import child
    from moe_jax.study.fixed import load_fixed
    from moe_jax.study.runs import Children
    from moe_jax.study.work import announcement, check_hours, reported_runs, stages, tuning_runs, unfinished

    with Children() as children:
        if code := _time_arms(study, flags, children, "before"):
            return code
        timing, fixed = _read_timing(flags.workdir, "before"), load_fixed(flags.workdir)
        searched = [arm for stage in stages(study, fixed) for arm in stage]
        left = unfinished(flags.workdir, tuning_runs(study, searched) + reported_runs(study))
        for line in announcement(study, left, timing, flags.jobs, fixed):
            say(line)
        check_hours(study, left, timing)
        for arms in stages(study, fixed):
            if not children.signum:
                _tune(study, arms, flags, timing, children)
        runs, jobs = reported_runs(study), 1 if study.trains_alone() else flags.jobs
        codes = {} if children.signum else _run(study, runs, flags, timing, children, jobs)
        failed = sum(code != 0 for code in codes.values())
        if not children.signum and child.finished_folders(study, flags.workdir):
            if code := _time_arms(study, flags, children, "after"):
                failed += 1
        if children.signum:
            summarize(flags.workdir)
            say("stopped and saved; run the same command to go on")
            return 128 + children.signum
    return summarize(flags.workdir) or int(failed > 0)


def _tune(study: Study, arms: list[Arm], flags, timing: dict, children) -> None:
    """Trains arms with every candidate of the grid, and fixes the winners that can be told."""
    from moe_jax.study.fixed import load_fixed, save_fixed
    from moe_jax.study.tuning import decide
    from moe_jax.study.work import tuning_runs

    say(f"tuning {', '.join(arm.name for arm in arms)}: {len(study.grid)} candidates each")
    _run(study, tuning_runs(study, arms), flags, timing, children, flags.jobs)
    fixed = load_fixed(flags.workdir)
    for arm in arms:
        found = decide(study, arm, flags.workdir, fixed)
        if found and found["winner"]:
            fixed.tuning[arm.name] = found
            say(f"{arm.name}: {found['winner']} wins, {found['candidates'][found['winner']]['loss']:.4f} nats per token")
        elif found:
            say(f"{arm.name}: no candidate finished with every tuning seed")
    save_fixed(flags.workdir, fixed)


def _run(study: Study, runs: list[tuple[Arm, int, str]], flags, timing: dict, children, parallel: int) -> dict[str, int]:
    """Does those of the runs that are not finished, `parallel` at a time; returns the exit codes of those that began."""
    from moe_jax.study.fixed import load_fixed
    from moe_jax.study.runs import run_jobs
    from moe_jax.study.work import make_job, unfinished

    fixed, todo = load_fixed(flags.workdir), unfinished(flags.workdir, runs)
    jobs = [make_job(study, flags.workdir, _CHILD, run, timing, fixed) for run in todo]
    return run_jobs(jobs, parallel, children, len(runs) - len(todo)) if jobs else {}


_CHILD = [sys.executable, "-m", "moe_jax.study.child"]


def _time_arms(study: Study, flags, children, phase: str) -> int:
    """The timing of a phase in a process of its own, unless it is there; returns 0 or the exit code to stop with."""
    from moe_jax.study.child import timing_fingerprint
    from moe_jax.study.fixed import FIXED, load_fixed

    kept, fixed = _read_timing(flags.workdir, phase), load_fixed(flags.workdir)
    whole = phase == "after" or all(fixed.steps(study, arm) for arm in study.arms if arm.equal_time_to)
    if kept and whole and kept["fingerprint"] == timing_fingerprint(study, flags.workdir, phase, flags.rounds):
        return 0
    if not _has_runs(flags.workdir):  # what an earlier command fixed was for other times, and for no run
        (pathlib.Path(flags.workdir) / FIXED).unlink(missing_ok=True)
    command = [*_CHILD, "time", flags.workdir, phase, str(flags.rounds)]
    say(f"timing the steps of {len(study.trained())} arms in turns, {phase} training")
    code = children.wait(children.start(command))
    return 128 + children.signum if children.signum else code


def _read_timing(workdir: str, phase: str) -> dict | None:
    try:
        return json.loads((pathlib.Path(workdir) / f"timing_{phase}.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


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
