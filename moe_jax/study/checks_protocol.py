"""What fits together in a study's protocol: the grid and its seeds, arms of equal time, margins and the primary comparison."""

import math

from moe_jax.config import ConfigError
from moe_jax.config.study import BRANCH, Arm, Scale, Study
from moe_jax.study.checks import LABEL, SHARED, check_number, check_seeds, own_runs

# What no candidate may set: why. A step of another size would cost another time than the arm's, which is measured once.
_NOT_IN_GRID = {
    "train": "the steps of an arm, and what it does between them, are its own",
    "init": "a run's start is its arm's",
    "mesh": "one process times all arms",
    "data": "all candidates of an arm are scored on the same text",
}


def check_protocol(study: Study) -> None:
    """That what the study asks of its arms can be.

    Raises:
      ConfigError: naming the field, or the arm.
    """
    check_number("study margin", study.margin)
    check_number("study hours_limit", study.hours_limit, above_zero=True)
    check_grid(study)
    for arm in study.arms:
        _check_equal_time(study, arm)
        _check_tuned_as(study, arm)
        if arm.start == BRANCH and arm.starts_from and study.arm(arm.starts_from).equal_time_to:
            limit = "its steps are found before the first run"
            raise ConfigError(f"arm {arm.name} starts_from", arm.starts_from, limit, "branch from an arm with steps of its own")
        check_number(f"arm {arm.name} margin", arm.margin)
        if arm.margin and study.baseline_of(arm) == arm.name:
            raise ConfigError(f"arm {arm.name} margin", arm.margin, "it is a baseline", "leave it out")
    compared = [arm.name for arm in study.arms if not arm.twin_of and study.baseline_of(arm) != arm.name]
    if study.primary and study.primary not in compared:
        fix = f"name one of {', '.join(compared)}" if compared else "add an arm"
        raise ConfigError("study primary", study.primary, "no arm that is compared with a baseline", fix)


def check_grid(study: Study) -> None:
    """That the candidates are settings, the same for every arm, and that no seed both tunes and reports."""
    where, example = "study grid", "{'as_it_is': {}, 'half_rate': {'optimizer.learning_rate': Scale(0.5)}}"
    if not isinstance(study.grid, dict) or not all(isinstance(one, dict) for one in study.grid.values()):
        raise ConfigError(where, repr(study.grid), "not a dict of settings", f"write such as {example}")
    check_seeds("study tuning_seeds", study.tuning_seeds)
    if not study.grid:
        return
    if len(study.grid) == 1:
        raise ConfigError(where, next(iter(study.grid)), "one candidate is no search", "add others, or leave the grid out")
    for name, settings in study.grid.items():
        if not isinstance(name, str) or not LABEL.fullmatch(name):
            raise ConfigError(f"{where}: name of a candidate", repr(name), "not a label", "use letters, digits and _ - + .")
        for path, value in settings.items():
            why = SHARED[path][0] if path in SHARED else _NOT_IN_GRID.get(path.partition(".")[0])
            if why:
                raise ConfigError(f"{where} {name} config.{path}", value, why, "make arms of it")
            if isinstance(value, Scale) and not (type(value.factor) in (int, float) and 0 < value.factor < math.inf):
                raise ConfigError(f"{where} {name} config.{path}", repr(value), "not a factor above 0", "write Scale(0.5)")
    if both := sorted(set(study.seeds) & set(study.tuning_seeds)):
        limit = f"the seeds {', '.join(map(str, both))} are tuning_seeds too, on which the settings were chosen"
        fix = f"write such as {tuple(range(10, 10 + len(study.seeds)))}"
        raise ConfigError("study seeds", str(tuple(study.seeds)), limit, fix)


def _check_equal_time(study: Study, arm: Arm) -> None:
    if not (other := arm.equal_time_to):
        return
    where, names = f"arm {arm.name} equal_time_to", [name for name in own_runs(study) if not study.arm(name).equal_time_to]
    if arm.twin_of or arm.scores:
        raise ConfigError(where, other, f"it has the runs of {arm.twin_of or arm.scores}", "leave it out")
    if other not in names or other == arm.name:
        limit = "no other arm with runs and steps of its own"
        raise ConfigError(where, other, limit, f"name one of {', '.join(n for n in names if n != arm.name) or 'them'}")
    for one in (arm, study.arm(other)):
        if one.starts_from:
            limit = f"{one.name} starts from {one.starts_from}, whose seconds would not count"
            raise ConfigError(where, other, limit, "give the arm train.steps instead")
    if "train.steps" in arm.settings:
        limit = f"the seconds of {other} say how many"
        raise ConfigError(f"arm {arm.name} config.train.steps", arm.settings["train.steps"], limit, "leave it out")


def _check_tuned_as(study: Study, arm: Arm) -> None:
    where, other = f"arm {arm.name} tuned_as", arm.tuned_as
    if other and not study.grid:
        raise ConfigError(where, other, "the study has no grid", "leave it out, or give the study a grid")
    if other and (arm.twin_of or arm.scores):
        raise ConfigError(where, other, f"it has the settings of {arm.twin_of or arm.scores}", "leave it out")
    names = [one.name for one in study.searched()]
    if other and other not in names:
        raise ConfigError(where, other, "no arm with a search of its own", f"name one of {', '.join(names)}")
    if not study.grid or arm.twin_of or arm.scores or not arm.starts_from:
        return
    start = study.tuned_by(study.arm(arm.starts_from)).name
    if arm.start == BRANCH and study.tuned_by(arm).name != start:
        limit = f"a branch of {arm.starts_from} has its settings"
        raise ConfigError(where, repr(other), limit, f"write tuned_as={start!r}")
    if not other and study.arm(arm.starts_from).tuned_as:
        limit = f"{arm.starts_from}, which it starts from, has no runs with the tuning seeds"
        raise ConfigError(where, repr(other), limit, f"write tuned_as={start!r}, or search for {arm.starts_from} too")
