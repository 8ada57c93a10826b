"""A study on paper: its arms as configs, its folders, and what may not change once it has begun."""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

from moe_jax.config import Config, ConfigError, differences, leaves, one_line, role, to_dict
from moe_jax.config.flags import apply_overrides
from moe_jax.config.study import METRICS, Arm, Curve, Settings, Study, study_from_dict, study_to_dict
from moe_jax.config.validate import validate
from moe_jax.data.hashing import digest, hash64

DESCRIPTION = "description.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)
# What an arm that scores the runs of another cannot change any more.
_TRAINED = ("train", "optimizer", "init", "data", "mesh")
# What all arms of a pair share, or what fixes the text that is compared.
_SHARED = (
    "seed",
    "noise_seed",
    "data.sources",
    "data.tokenizer",
    "data.vocab_size",
    "data.held_out_percent",
    "data.sequence_length",
    "data.document_attention",
    "data.cache_dir",
    "train.eval_batches",
    "mesh.cpu_devices",
)


def prepare(study: Study, scale: str) -> Study:
    """A checked copy, its `full` settings moved into `base` where scale is "full".

    Raises:
      ConfigError: a setting that cannot be, or arms, baseline and seeds that do not fit together; it names the arm.
    """
    _check_types(study)
    if scale == "full":
        if not study.full:
            raise ConfigError("--scale", "full", "the study has no settings for it", "use --scale=small")
        study = dataclasses.replace(study, base=_apply(study.base, study.full, "study full"))
        study = dataclasses.replace(
            study, arms=[dataclasses.replace(arm, settings=arm.settings | arm.full) for arm in study.arms]
        )
    arms = tuple(dataclasses.replace(arm, full={}) for arm in study.arms)
    study = dataclasses.replace(study, full={}, arms=arms, seeds=tuple(study.seeds))
    _check_names(study)
    for arm in sorted(study.arms, key=lambda arm: bool(arm.scores)):  # an error in an arm's settings has its name
        run_config(study, arm, study.seeds[0])
    return dataclasses.replace(study, curves=tuple(_resolved(study, curve) for curve in _checked_curves(study)))


def _check_types(study: Study) -> None:
    arms, seeds = study.arms, study.seeds
    if not isinstance(arms, tuple | list) or not arms or not all(isinstance(arm, Arm) for arm in arms):
        raise ConfigError("study arms", repr(arms), "not a tuple of Arm", "add an Arm(name, settings) for each")
    fix = "write such as (0, 1, 2)"
    if not isinstance(seeds, tuple | list) or not seeds:
        raise ConfigError("study seeds", repr(seeds), "not a tuple of seeds", fix)
    if len(set(seeds)) < len(seeds) or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
        raise ConfigError("study seeds", repr(seeds), "not different integers from 0 to 2147483647", fix)
    for name, low in (("target_loss", "0 or more"), ("epochs_limit", "above 0")):
        value = getattr(study, name)
        if type(value) not in (int, float) or not 0 <= value < math.inf or (name == "epochs_limit" and not value):
            raise ConfigError(f"study {name}", repr(value), f"not a number {low}", "write one")


def _check_names(study: Study) -> None:
    names = [arm.name for arm in study.arms]
    for arm in study.arms:
        where = f"arm {arm.name}"
        if not isinstance(arm.name, str) or not _NAME.fullmatch(arm.name):
            fix = "use letters, digits, '_', '-', '+' and '.'"
            raise ConfigError("name of an arm", repr(arm.name), "not a label", fix)
        if names.count(arm.name) > 1:
            raise ConfigError(where, None, "there twice", "rename one")
        for field in ("scores", "baseline"):
            _check_other(study, arm, field)
        if not arm.twin_of:
            continue
        if arm.settings:
            limit = "an A/A arm has the settings of the other"
            raise ConfigError(f"{where} settings", arm.settings, limit, "leave settings or twin_of out")
        if arm.twin_of not in names or study.arm(arm.twin_of).twin_of:
            others = ", ".join(other.name for other in study.arms if not other.twin_of)
            limit = "names no arm with settings of its own"
            raise ConfigError(f"{where} twin_of", arm.twin_of, limit, f"name one of {others}")
        if study.arm(arm.twin_of).scores:
            raise ConfigError(f"{where} twin_of", arm.twin_of, "it has no runs of its own", "name an arm that has")
    if study.baseline not in own_runs(study):
        fix = f"name one of {', '.join(own_runs(study))}"
        raise ConfigError("study baseline", study.baseline, "no arm with settings of its own", fix)


def own_runs(study: Study) -> list[str]:
    """The names of the arms that are trained by settings of their own."""
    return [arm.name for arm in study.arms if not arm.twin_of and not arm.scores]


def _check_other(study: Study, arm: Arm, field: str) -> None:
    """That the arm which `scores` or `baseline` names can be that."""
    where, other = f"arm {arm.name}", getattr(arm, field)
    if other and other not in own_runs(study):
        limit = "names no arm that is trained by settings of its own"
        raise ConfigError(f"{where} {field}", other, limit, f"name one of {', '.join(own_runs(study))}")
    if other and arm.twin_of:
        raise ConfigError(f"{where} {field}", other, "an A/A arm has that of the other", "leave it or twin_of out")
    for path in arm.settings if arm.scores and isinstance(arm.settings, dict) else ():
        if path.partition(".")[0] in _TRAINED:
            limit = f"the runs of {arm.scores} are trained"
            raise ConfigError(f"{where} config.{path}", arm.settings[path], limit, "change the evaluation alone")
        if path.startswith("model.") and not role(path):
            limit = f"no option of evaluation, and the runs of {arm.scores} are trained"
            raise ConfigError(f"{where} config.{path}", arm.settings[path], limit, "leave it out, or train the arm")


def _checked_curves(study: Study) -> tuple[Curve, ...]:
    names = [arm.name for arm in study.arms]
    fix = f"name one of {', '.join(names)}"
    _check_tuple("study shown", study.shown, "('arm',)")
    for name in study.shown:
        if name not in names:
            raise ConfigError("study shown", name, "no arm", fix)
    _check_tuple("study curves", study.curves, "(Curve('width', ...),)")
    taken = ["loss", "differences", "load"]
    for curve in study.curves:
        if not isinstance(curve, Curve) or not isinstance(curve.name, str) or not _NAME.fullmatch(curve.name):
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
        for label, points in curve.lines.items():
            for name in points:
                if name not in names:
                    raise ConfigError(f"{where} line {label}", name, "no arm", fix)
    return tuple(study.curves)


def _check_tuple(field: str, value: Any, example: str) -> None:
    if not isinstance(value, tuple | list):
        raise ConfigError(field, repr(value), "not a tuple", f"write such as {example}")


def _resolved(study: Study, curve: Curve) -> Curve:
    """With the numbers that its paths stand for."""

    def number(name, x):
        found = x
        if isinstance(x, str):
            config = run_config(study, study.arm(name), study.seeds[0])
            found = next((getattr(owner, leaf.name) for path, owner, leaf in leaves(config) if path == x), x)
        if type(found) not in (int, float) or not math.isfinite(found) or curve.log and found <= 0:
            limit = "not a number above 0, or the path of one" if curve.log else "not a number, or the path of one"
            raise ConfigError(f"curve {curve.name} arm {name}", repr(x), limit, "write such as 2.0 or 'model.width'")
        return found

    lines = {label: {name: number(name, x) for name, x in points.items()} for label, points in curve.lines.items()}
    return dataclasses.replace(curve, lines=lines)


def _apply(config: Config, settings: Settings, where: str) -> Config:
    """`config` with settings, as if they were on the command line; errors say `where`."""
    overrides = []
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} settings", repr(settings), "not a dict", "write {'model.width': 64}")
    for path, value in settings.items():
        if any(path == name or path.startswith((f"{name}.", f"{name}[")) for name in _SHARED):
            if where.startswith("arm "):
                limit = "all arms share it" if path != "noise_seed" else "an A/A arm sets it"
                fix = "set it in the study's base" if path != "noise_seed" else "make an Arm with twin_of"
                raise ConfigError(f"{where} config.{path}", value, limit, fix)
        if not isinstance(value, bool | int | float | str):
            limit = f"a {type(value).__name__}, not a bool, int, float or str"
            raise ConfigError(f"{where} config.{path}", repr(value), limit, "write the value of one field")
        overrides.append(flag(path, value))
    try:
        changed = apply_overrides(config, overrides)
        validate(changed)
    except ConfigError as error:
        raise ConfigError(f"{where} config.{error.field}", error.value, error.limit, error.fix) from None
    return changed


def flag(path: str, value: bool | int | float | str) -> str:
    """A setting as on the command line."""
    return f"--config.{path}={str(value).lower() if isinstance(value, bool) else value}"


def run_config(study: Study, arm: Arm, seed: int) -> Config:
    """The config of one run. The seed fixes initialisation and data order; a twin's noise has a key of its own.

    Raises:
      ConfigError: the arm's settings cannot be; it names the arm.
    """
    settings = study.arm(arm.twin_of).settings if arm.twin_of else arm.settings
    if arm.scores:
        settings = study.arm(arm.scores).settings | settings
    config = _apply(study.base, settings, f"arm {arm.name}")
    config.seed = seed
    if arm.twin_of:
        config.noise_seed = hash64(f"{arm.name}/{seed}") % 2**31
    return config


def run_folder(workdir, arm: str, seed: int) -> pathlib.Path:
    """Where a run trains."""
    return pathlib.Path(workdir) / "runs" / arm / f"seed_{seed}"


def save_description(workdir, study: Study, extra: dict[str, Any]) -> None:
    """Writes the study, or one with more arms or seeds, into its folder, with what else describes it."""
    from moe_jax.train.metrics import write_whole

    path = pathlib.Path(workdir) / DESCRIPTION
    write_whole(path, json.dumps(extra | {"study": study_to_dict(study)}, indent=1))


def load_description(workdir) -> tuple[Study, dict[str, Any]] | None:
    """(the study of a folder, what else describes it); None where none has begun.

    Raises:
      ConfigError: the description cannot be read.
    """
    path = pathlib.Path(workdir) / DESCRIPTION
    try:
        tree = json.loads(path.read_text())
        study = study_from_dict(tree.pop("study"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        limit = f"{DESCRIPTION}: {type(error).__name__} {one_line(error)}"
        raise ConfigError("--workdir", str(workdir), limit, "restore the file") from None
    return study, tree


def check_unchanged(begun: Study, study: Study) -> None:
    """That `study` is `begun`, except for more arms and seeds.

    Raises:
      ConfigError: naming what changed.
    """
    fix = "put it back, or start in another --workdir"
    if changed := differences(begun.base, study.base):
        path, (old, new) = next(iter(changed.items()))
        raise ConfigError(path, new, f"the study in --workdir began with {one_line(old)}", fix)
    for name in ("baseline", "target_loss", "epochs_limit"):
        old, new = getattr(begun, name), getattr(study, name)
        if old != new:
            raise ConfigError(f"study {name}", new, f"the study in --workdir began with {one_line(old)}", fix)
    if missing := [seed for seed in begun.seeds if seed not in study.seeds]:
        limit = f"the study in --workdir began with seed {missing[0]} too"
        raise ConfigError("study seeds", study.seeds, limit, fix)
    now = {arm.name: arm for arm in study.arms}
    for arm in begun.arms:
        if arm.name not in now:
            raise ConfigError(f"arm {arm.name}", None, "the study in --workdir began with it", fix)
        old, new = (dataclasses.asdict(a) for a in (arm, now[arm.name]))
        if old != new:
            key = next(name for name in old if old[name] != new[name])
            limit = f"the study in --workdir began with {one_line(old[key])}"
            raise ConfigError(f"arm {arm.name} {key}", new[key], limit, fix)


def fingerprint(*parts: Any) -> str:
    """Identifies configs and plain values."""
    return digest(*(to_dict(part) if isinstance(part, Config) else part for part in parts))
