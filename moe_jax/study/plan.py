"""A study on paper: its arms as configs, and its folders."""

import dataclasses
import math
import pathlib
from typing import Any

from moe_jax.config import Config, ConfigError, SourceConfig, leaves, to_dict
from moe_jax.config.flags import apply_overrides
from moe_jax.config.study import BRANCH, Arm, Curve, Scale, Settings, Study, within
from moe_jax.config.train import kept_steps
from moe_jax.config.validate import validate
from moe_jax.data.hashing import digest, hash64
from moe_jax.study.checks import check_arms, check_curves, check_tokenizers, check_types
from moe_jax.study.checks_protocol import check_protocol
from moe_jax.study.fixed import Fixed


def prepare(study: Study, scale: str) -> Study:
    """A checked copy, its `full` settings moved into the bases where scale is "full".

    Raises:
      ConfigError: a setting that cannot be, or arms, baseline and seeds that do not fit together; it names the arm.
    """
    check_types(study)
    arms = study.arms
    if scale == "full":
        if not study.full:
            raise ConfigError("--scale", "full", "the study has no settings for it", "use --scale=small")
        try:
            study = study.with_bases(lambda base: _apply(base, study.full))
        except ConfigError as error:
            raise within("study full", error) from None
        arms = [dataclasses.replace(arm, settings=arm.settings | arm.full) for arm in study.arms]
    arms = tuple(dataclasses.replace(arm, full={}) for arm in arms)
    study = dataclasses.replace(study, full={}, arms=arms, seeds=tuple(study.seeds), tuning_seeds=tuple(study.tuning_seeds))
    check_arms(study)
    check_protocol(study)
    # An error in an arm's settings has its name, and not that of one that scores its runs.
    ordered = sorted(study.arms, key=lambda arm: bool(arm.scores))
    check_tokenizers(study, {arm.name: run_config(study, arm, study.seeds[0]) for arm in ordered})
    for candidate in study.grid:
        for arm in study.arms:
            run_config(study, arm, study.seeds[0], candidate=candidate)
    for arm in [arm for arm in study.trained() if study.defined_by(arm).start == BRANCH]:
        _check_branch(study, arm)
    check_curves(study)
    return dataclasses.replace(study, curves=tuple(_resolved(study, curve) for curve in study.curves))


def _check_branch(study: Study, arm: Arm) -> None:
    """That a branch can go on from its trunk, which has saved the step, with every candidate of the grid."""
    from moe_jax.train.branch import check_branch

    trunk = study.arm(study.defined_by(arm).starts_from)
    for candidate in study.grid or ("",):
        config, other = (run_config(study, one, study.seeds[0], candidate=candidate) for one in (arm, trunk))
        step, last = config.init.branch_step, other.train.steps
        where = f"arm {arm.name}" + (f" candidate {candidate}" if candidate else "")
        try:
            if step not in (*kept_steps(other.train), last) or step > last:
                limit = f"no checkpoint that {trunk.name} keeps of its {last} steps"
                fix = f"give {trunk.name} train.keep_steps={step}" if 0 < step < last else f"name one from 1 to {last}"
                raise ConfigError("init.branch_step", step, limit, fix)
            check_branch(other, config, step)
        except ConfigError as error:
            raise within(where, error) from None


def _resolved(study: Study, curve: Curve) -> Curve:
    """With the numbers that its paths stand for."""

    def number(name, x):
        found = x
        if x == "train.steps" and study.defined_by(study.arm(name)).equal_time_to:
            limit = "its steps are found before the first run"
            raise ConfigError(f"curve {curve.name} arm {name}", repr(x), limit, "write a number")
        if isinstance(x, str):
            config = run_config(study, study.arm(name), study.seeds[0])
            found = next((getattr(owner, leaf.name) for path, owner, leaf in leaves(config) if path == x), x)
        if type(found) not in (int, float) or not math.isfinite(found) or curve.log and found <= 0:
            limit = "not a number above 0, or the path of one" if curve.log else "not a number, or the path of one"
            raise ConfigError(f"curve {curve.name} arm {name}", repr(x), limit, "write such as 2.0 or 'model.width'")
        return found

    lines = {label: {name: number(name, x) for name, x in points.items()} for label, points in curve.lines.items()}
    return dataclasses.replace(curve, lines=lines)


def _apply(config: Config, settings: Settings) -> Config:
    """`config` with settings, as if they were on the command line."""
    for path, value in settings.items():
        if not isinstance(value, bool | int | float | str):
            limit = f"a {type(value).__name__}, not a bool, int, float or str"
            raise ConfigError(path, repr(value), limit, "write the value of one field")
    changed = apply_overrides(config, [flag(path, value) for path, value in settings.items()])
    validate(changed)
    return changed


def flag(path: str, value: bool | int | float | str) -> str:
    """A setting as on the command line."""
    return f"--config.{path}={str(value).lower() if isinstance(value, bool) else value}"


def run_config(
    study: Study, arm: Arm, seed: int, workdir="DIR", fixed: Fixed | None = None, candidate: str | None = None
) -> Config:
    """The config of one run. The seed fixes initialisation and data order; a twin's noise has a key of its own.

    Args:
      study: its arms are those that fit together.
      arm: one of them.
      seed: one of the study's.
      workdir: of the study, in which lies the run that this one starts from; "DIR" as in the tables.
      fixed: what the study has found out; None: nothing yet.
      candidate: in the grid, of a run that tunes the arm; None: the winner, once there is one, of a run that is reported.

    Raises:
      ConfigError: the arm's settings cannot be; it names the arm.
    """
    own, fixed = study.defined_by(arm), fixed or Fixed()
    settings = own.settings | arm.settings  # an A/A arm has none
    if own.starts_from:
        other = fixed.winner(study, study.arm(own.starts_from)) if candidate else ""
        settings = settings | {f"init.{own.start}": str(run_folder(workdir, own.starts_from, seed, other))}
    if steps := fixed.steps(study, arm):
        settings = settings | {"train.steps": steps}
    chosen, where = fixed.winner(study, arm) if candidate is None else candidate, f"arm {arm.name}"
    try:
        config = _apply(study.base_of(arm), settings)
        if chosen:
            where = f"arm {arm.name} candidate {chosen}"
            config = _apply(config, candidate_settings(study, chosen, config))
    except ConfigError as error:
        raise within(where, error) from None
    config.seed = seed
    if arm.twin_of:
        config.noise_seed = hash64(f"{arm.name}/{seed}") % 2**31
    return config


def candidate_settings(study: Study, candidate: str, config: Config) -> Settings:
    """The settings of a candidate over `config`, an arm's, as values.

    Raises:
      ConfigError: a factor of what is no number.
    """
    values = {path: getattr(owner, leaf.name) for path, owner, leaf in leaves(config)}

    def number(path, factor):
        value = values.get(path, 1.0)  # what is no field is refused where it is set
        if type(value) not in (int, float):
            raise ConfigError(path, repr(value), f"no number to multiply by {factor:g}", "give the candidate a value")
        return round(value * factor) if type(value) is int else value * factor

    grid = study.grid[candidate]
    return {path: number(path, value.factor) if isinstance(value, Scale) else value for path, value in grid.items()}


def has_sources_of_study(study: Study, arm: Arm) -> bool:
    """Whether the sources that the study scores are among those of an arm, with other weights at most.

    What the arm evaluates of them in training is then the text that the other arms evaluate. A weight of 0 is
    another matter: all text of such a source is held out.
    """

    def text(source: SourceConfig) -> SourceConfig:
        return dataclasses.replace(source, weight=float(source.weight > 0))

    settings = study.defined_by(arm).settings.items()
    overrides = [flag(path, value) for path, value in settings if path.startswith("data.sources")]
    sources = list(map(text, apply_overrides(study.base_of(arm), overrides).data.sources))
    return all(text(source) in sources for source in study.base.data.sources)


def run_folder(workdir, arm: str, seed: int, candidate: str = "") -> pathlib.Path:
    """Where a run trains: one that is reported, or one that tunes the arm with a candidate of the grid."""
    place = ("tuning", arm, candidate) if candidate else ("runs", arm)
    return pathlib.Path(workdir, *place, f"seed_{seed}")


def run_name(arm: str, seed: int, candidate: str = "") -> str:
    """What a run is called on the screen, and by the runs that need it."""
    return f"{arm} {candidate} seed {seed}" if candidate else f"{arm} seed {seed}"


def fingerprint(*parts: Any) -> str:
    """Identifies configs and plain values."""
    return digest(*(to_dict(part) if isinstance(part, Config) else part for part in parts))
