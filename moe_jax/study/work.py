"""The runs that a study still has to do, and how long they will take."""

import itertools
from collections.abc import Iterator

from moe_jax.config import ConfigError
from moe_jax.config.study import Arm, Study
from moe_jax.study.child import VALIDATION
from moe_jax.study.fixed import Fixed
from moe_jax.study.plan import run_folder, run_name
from moe_jax.study.schedule import Job


def stages(study: Study, fixed: Fixed) -> Iterator[list[Arm]]:
    """The arms that still need a winner of the grid: those that start from others after these have one."""
    arms = [arm for arm in study.searched() if not fixed.winner(study, arm)]
    for _, group in itertools.groupby(arms, key=lambda arm: len(study.ancestors(arm))):
        yield list(group)


def tuning_runs(study: Study, arms: list[Arm]) -> list[tuple[Arm, int, str]]:
    """(arm, seed, candidate) of every run that tunes one of the arms."""
    return [(arm, seed, candidate) for arm in arms for candidate in study.grid for seed in study.tuning_seeds]


def reported_runs(study: Study) -> list[tuple[Arm, int, str]]:
    """(arm, seed, "") of every run that is reported."""
    return [(arm, seed, "") for seed in study.seeds for arm in study.arms]


def unfinished(workdir: str, runs: list[tuple[Arm, int, str]]) -> list[tuple[Arm, int, str]]:
    """Those of the runs that have no scores."""
    return [run for run in runs if not (run_folder(workdir, run[0].name, *run[1:]) / VALIDATION).exists()]


def make_job(study: Study, workdir: str, command: list[str], run: tuple[Arm, int, str], timing: dict, fixed: Fixed) -> Job:
    """The job of a run; command: the beginning of every child's."""
    arm, seed, candidate = run
    facts = facts_of(arm, timing)
    after, needed = (), study.needs(arm)
    if needed:
        after = (run_name(needed, seed, candidate and fixed.winner(study, study.arm(needed))),)
    return Job(
        run_name(arm.name, seed, candidate),
        [*command, "train", workdir, arm.name, str(seed), *([candidate] if candidate else [])],
        run_folder(workdir, arm.name, seed, candidate),
        facts["steps"],
        predicted_seconds(facts, bool(arm.scores)),
        after,
        facts.get("first_step", 0),
    )


def facts_of(arm: Arm, timing: dict) -> dict:
    """What a timing has of the arm whose runs an arm trains or scores."""
    return timing["arms"][arm.scores or arm.name]


def predicted_seconds(arm: dict, scores: bool = False) -> float:
    """Of one run of an arm: its steps, evaluations as forward passes of a third of a step, and starting up.

    Of one that is scored once more, the starting up and the last evaluation.
    """
    ms = arm.get("ms") or 0.0
    start = 15.0 + 2 * arm.get("compile_seconds", 0.0)
    if scores:
        return start + arm["last_evaluation_batches"] * ms / 3e3
    return (arm["steps"] - arm.get("first_step", 0)) * ms / 1e3 + arm["evaluation_batches"] * ms / 3e3 + start


def predicted_total(runs: list[tuple[Arm, int, str]], timing: dict) -> float:
    """Seconds of the runs, one after the other."""
    return sum(predicted_seconds(facts_of(arm, timing), bool(arm.scores)) for arm, *_ in runs)


def check_hours(study: Study, runs: list[tuple[Arm, int, str]], timing: dict) -> None:
    """That what is left to do does not take longer than the study says.

    Raises:
      ConfigError: with the arm that takes most of it.
    """
    total = predicted_total(runs, timing)
    if total <= 3600 * study.hours_limit:
        return
    by_arm = {arm.name: predicted_total([run for run in runs if run[0] is arm], timing) for arm, *_ in runs}
    most = max(by_arm, key=by_arm.get)
    limit = f"{interval(total)} predicted, one run after the other, {interval(by_arm[most])} of it for arm {most}"
    fix = (
        "train fewer steps, seeds, candidates or arms, make parts of the study (FILE.py:PART), or raise hours_limit in its file"
    )
    raise ConfigError("study hours_limit", study.hours_limit, limit, fix)


def announcement(study: Study, runs: list[tuple[Arm, int, str]], timing: dict, jobs: int, fixed: Fixed) -> list[str]:
    """What will be trained and how long it will take, before it begins. runs: those that are left to do."""
    lines = [
        f"{len(study.arms)} arms x {len(study.seeds)} seeds {', '.join(map(str, study.seeds))}; "
        f"differences against {study.baseline}"
    ]
    if study.primary:
        arm = study.arm(study.primary)
        lines.append(f"the primary comparison: {arm.name} against {study.baseline_of(arm)}")
    searched = study.searched()
    if searched:
        lines.append(
            f"{len(searched)} arms are tuned first: {len(study.grid)} candidates x {len(study.tuning_seeds)} seeds "
            f"{', '.join(map(str, study.tuning_seeds))} each"
        )
    for arm in study.arms:
        f = facts_of(arm, timing)
        seconds = predicted_seconds(f, bool(arm.scores))
        if arm.scores:
            lines.append(f"  {arm.name}: the runs of {arm.scores}, scored once more")
            continue
        start = study.defined_by(arm).starts_from
        start = f"starts from {start}; " if start else ""
        if equal := fixed.equal_time.get(arm.name):
            start += f"{equal['steps']} steps in the {equal['seconds']:.1f} s of {equal['to']}; "
        step = f"cannot be timed ({f['error']})" if "error" in f else f"{f['ms']:.1f} ms a step"
        count = len(study.seeds) + (len(study.grid) * len(study.tuning_seeds) if arm in searched else 0)
        lines.append(
            f"  {arm.name}: {start}{f['tokens']:,} tokens, {f['epochs']:.2f} epochs; {f['training_flops_per_token'] / 1e6:.2f} "
            f"MFLOP a token in training, {f['router_flops_per_token'] / 1e6:.3f} of them routers; "
            f"{f['parameters']:,} parameters, {f['active_parameters']:,} active; {step}, "
            f"{interval(seconds)} a run, {interval(seconds * count)} for all {'runs' if arm in searched else 'seeds'}"
        )
    side = "" if jobs == 1 else f", less with {jobs} runs side by side"
    if side and study.trains_alone():
        side += " (those that tune: reported ones go one after the other)"
    lines.append(f"predicted: {interval(predicted_total(runs, timing))} one after the other{side}")
    return lines


def interval(seconds: float) -> str:
    """'2 h 05 min', '7 min' or '40 s'."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
