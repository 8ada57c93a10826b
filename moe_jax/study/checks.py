"""What fits together in a study: its arms, what one names of another, what all share, its curves."""

import math
import re
from typing import Any

from moe_jax.config import Config, ConfigError, differences, one_line, role
from moe_jax.config.study import STARTS, Arm, Curve, Study
from moe_jax.study.metrics import METRICS

LABEL = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)
# What an arm that scores the runs of another cannot change any more.
_TRAINED = ("train", "optimizer", "init", "data", "mesh")
# What no arm has of its own: why, and where to set it.
_IN_BASE = "set it in the study's base"
SHARED = {
    "seed": ("every arm is trained from every seed", "name it in the study's seeds"),
    "noise_seed": ("only an A/A arm has another", "make an Arm with twin_of"),
    "data.held_out_percent": ("it parts the text that is scored from the text to train on", _IN_BASE),
    "data.sequence_length": ("a token's loss depends on how many are before it", _IN_BASE),
    "data.document_attention": ("a token's loss depends on how many are before it", _IN_BASE),
    "data.cache_dir": ("their text is prepared once", _IN_BASE),
    "train.eval_batches": ("their curves are of the same part of the text", _IN_BASE),
    "mesh.cpu_devices": ("one process times all of them", _IN_BASE),
}
PICTURES = ("loss", "differences", "load")  # those of every study


def check_types(study: Study) -> None:
    """That the study's fields can be read at all.

    Raises:
      ConfigError: one is of another type.
    """
    arms, seeds = study.arms, study.seeds
    if not isinstance(arms, tuple | list) or not arms or not all(isinstance(arm, Arm) for arm in arms):
        raise ConfigError("study arms", repr(arms), "not a tuple of Arm", "add an Arm(name, settings) for each")
    settings = {"study full": study.full}
    for arm in arms:
        settings |= {f"arm {arm.name} settings": arm.settings, f"arm {arm.name} full": arm.full}
        if not isinstance(arm.base, Config | None):
            raise ConfigError(f"arm {arm.name} base", repr(arm.base), "not a Config", "make a moe_jax.config.Config")
    for where, value in settings.items():
        if not isinstance(value, dict):
            raise ConfigError(where, repr(value), "not a dict", "write {'model.width': 64}")
    check_seeds("study seeds", seeds)
    check_number("study target_loss", study.target_loss)
    check_number("study epochs_limit", study.epochs_limit, above_zero=True)


def check_number(where: str, value: Any, above_zero: bool = False) -> None:
    if type(value) not in (int, float) or not 0 <= value < math.inf or (above_zero and not value):
        raise ConfigError(where, repr(value), f"not a number {'above 0' if above_zero else '0 or more'}", "write one")


def check_seeds(where: str, seeds: Any) -> None:
    fix = "write such as (0, 1, 2)"
    if not isinstance(seeds, tuple | list) or not seeds:
        raise ConfigError(where, repr(seeds), "not a tuple of seeds", fix)
    if len(set(seeds)) < len(seeds) or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
        raise ConfigError(where, repr(seeds), "not different integers from 0 to 2147483647", fix)


def check_arms(study: Study) -> None:
    """That the arms have labels, and that what one names of another can be.

    Raises:
      ConfigError: it names the arm.
    """
    names = [arm.name for arm in study.arms]
    for arm in study.arms:
        if not isinstance(arm.name, str) or not LABEL.fullmatch(arm.name):
            fix = "use letters, digits, '_', '-', '+' and '.'"
            raise ConfigError("name of an arm", repr(arm.name), "not a label", fix)
        if names.count(arm.name) > 1:
            raise ConfigError(f"arm {arm.name}", None, "there twice", "rename one")
        for field in ("scores", "baseline", "starts_from"):
            _check_other(study, arm, field)
        _check_twin(study, arm)
        _check_scoring(arm)
        _check_shared(study, arm)
    if study.baseline not in own_runs(study):
        fix = f"name one of {', '.join(own_runs(study))}"
        raise ConfigError("study baseline", study.baseline, "no arm with settings of its own", fix)
    for arm in study.arms:
        _check_start(study, arm)


def own_runs(study: Study) -> list[str]:
    """The names of the arms that are trained by settings of their own."""
    return [arm.name for arm in study.arms if not arm.twin_of and not arm.scores]


def _check_other(study: Study, arm: Arm, field: str) -> None:
    """That an arm which `field` names can be that."""
    where, other = f"arm {arm.name} {field}", getattr(arm, field)
    if other and other not in own_runs(study):
        limit = "names no arm that is trained by settings of its own"
        raise ConfigError(where, other, limit, f"name one of {', '.join(own_runs(study))}")
    if other and arm.twin_of:
        raise ConfigError(where, other, "an A/A arm has that of the other", "leave it or twin_of out")


def _check_twin(study: Study, arm: Arm) -> None:
    if not arm.twin_of:
        return
    where, names = f"arm {arm.name}", [other.name for other in study.arms]
    if arm.settings:
        limit = "an A/A arm has the settings of the other"
        raise ConfigError(f"{where} settings", arm.settings, limit, "leave settings or twin_of out")
    if arm.base:
        raise ConfigError(f"{where} base", None, "an A/A arm has that of the other", "leave it or twin_of out")
    if arm.twin_of not in names or study.arm(arm.twin_of).twin_of:
        others = ", ".join(other.name for other in study.arms if not other.twin_of)
        raise ConfigError(f"{where} twin_of", arm.twin_of, "names no arm with settings of its own", f"name one of {others}")
    if study.arm(arm.twin_of).scores:
        raise ConfigError(f"{where} twin_of", arm.twin_of, "it has no runs of its own", "name an arm that has")


def _check_scoring(arm: Arm) -> None:
    """That an arm which scores the runs of another changes the evaluation alone."""
    if not arm.scores:
        return
    where, trained = f"arm {arm.name}", f"the runs of {arm.scores} are trained"
    for field, value in (("base", None if arm.base is None else "Config"), ("starts_from", arm.starts_from)):
        if value:
            raise ConfigError(f"{where} {field}", value, trained, "leave it or scores out")
    for path, value in arm.settings.items():
        if path.partition(".")[0] in _TRAINED:
            raise ConfigError(f"{where} config.{path}", value, trained, "change the evaluation alone")
        if path.startswith("model.") and role(path) in ("", "start"):
            limit = f"no option of evaluation, and {trained}"
            raise ConfigError(f"{where} config.{path}", value, limit, "leave it out, or train the arm")


def _check_shared(study: Study, arm: Arm) -> None:
    for path in [path for path in arm.settings if path in SHARED]:
        why, fix = SHARED[path]
        raise ConfigError(f"arm {arm.name} config.{path}", arm.settings[path], f"all arms share it: {why}", fix)
    changed = differences(study.base, arm.base) if arm.base else {}
    for path in [path for path in SHARED if path in changed and path != "seed"]:
        old, new = changed[path]
        limit = f"all arms share it: {SHARED[path][0]}; the study's base has {one_line(old)}"
        raise ConfigError(f"arm {arm.name} base config.{path}", new, limit, "make them equal")


def _check_start(study: Study, arm: Arm) -> None:
    where = f"arm {arm.name}"
    if arm.start not in STARTS:
        limit = "no field of init with the folder of a run"
        raise ConfigError(f"{where} start", repr(arm.start), limit, f"use {' or '.join(STARTS)}")
    if not arm.starts_from:
        if arm.start != STARTS[0]:
            raise ConfigError(f"{where} start", arm.start, "starts_from is empty", "name an arm, or leave start out")
        return
    for path in [f"init.{start}" for start in STARTS if f"init.{start}" in arm.settings]:
        limit = f"the arm starts from {arm.starts_from}"
        raise ConfigError(f"{where} config.{path}", arm.settings[path], limit, "leave it or starts_from out")
    chain = [arm.name]
    while start := study.arm(chain[-1]).starts_from:
        chain.append(start)
        if start in chain[:-1]:
            limit = f"leads back to {start}: {' from '.join(chain)}"
            raise ConfigError(f"{where} starts_from", arm.starts_from, limit, "let one of them start from new parameters")


def check_tokenizers(study: Study, configs: dict[str, Config]) -> None:
    """That an arm has the tokenizer of the arm that it starts from, where it takes the vocabulary's parameters.

    Args:
      study: its arms are those that fit together.
      configs: of a run of each arm, by the arm's name.

    Raises:
      ConfigError: it names the arm.
    """
    for arm in [arm for arm in study.arms if arm.starts_from]:
        ours, theirs = configs[arm.name].data, configs[arm.starts_from].data
        if configs[arm.name].init.include:  # which parameters these are is for the run to see
            continue
        for name in ("tokenizer", "vocab_size") if ours.tokenizer == "bpe" else ("tokenizer",):
            if getattr(ours, name) != getattr(theirs, name):
                limit = f"the arm starts from {arm.starts_from}, which has {getattr(theirs, name)}"
                fix = "make them equal, or name in init.include what to take without embed and output"
                raise ConfigError(f"arm {arm.name} config.data.{name}", getattr(ours, name), limit, fix)


def check_curves(study: Study) -> None:
    """That what the pictures and curves name is there.

    Raises:
      ConfigError: it names the curve.
    """
    names = [arm.name for arm in study.arms]
    fix = f"name one of {', '.join(names)}"
    _check_tuple("study shown", study.shown, "('arm',)")
    for name in study.shown:
        if name not in names:
            raise ConfigError("study shown", name, "no arm", fix)
    _check_tuple("study curves", study.curves, "(Curve('width', ...),)")
    taken = list(PICTURES)
    for curve in study.curves:
        if not isinstance(curve, Curve) or not isinstance(curve.name, str) or not LABEL.fullmatch(curve.name):
            raise ConfigError("study curves", repr(curve), "no Curve with a label as its name", "write Curve('width', ...)")
        where = f"curve {curve.name}"
        for field in ("title", "x"):
            if not isinstance(getattr(curve, field), str):
                raise ConfigError(f"{where} {field}", repr(getattr(curve, field)), "not a str", "write one")
        if not isinstance(curve.lines, dict) or not all(isinstance(points, dict) for points in curve.lines.values()):
            raise ConfigError(f"{where} lines", repr(curve.lines), "not a dict of dicts", "write {'': {'arm': 1.0}}")
        if curve.name in taken:
            raise ConfigError(where, None, "a picture of that name is there", "rename it")
        taken.append(curve.name)
        _check_tuple(f"{where} metrics", curve.metrics, "('loss',)")
        for metric in curve.metrics:
            if metric not in METRICS:
                raise ConfigError(f"{where} metrics", metric, "no metric of a run", f"use {', '.join(METRICS)}")
        if curve.x_metric and curve.x_metric not in METRICS:
            raise ConfigError(f"{where} x_metric", curve.x_metric, "no metric of a run", f"use {', '.join(METRICS)}")
        for label, points in curve.lines.items():
            for name in points:
                if name not in names:
                    raise ConfigError(f"{where} line {label}", name, "no arm", fix)


def _check_tuple(field: str, value: Any, example: str) -> None:
    if not isinstance(value, tuple | list):
        raise ConfigError(field, repr(value), "not a tuple", f"write such as {example}")
