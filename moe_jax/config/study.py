"""A study: named arms, each a few settings away from one config, trained from the same seeds.

A file of configs/studies/ returns one from `get_config()`; `python -m moe_jax.study` runs it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.config.leaf import ConfigError
from moe_jax.config.reflect import from_dict, to_dict
from moe_jax.config.run import Config

Settings = dict[str, bool | int | float | str]
STARTS = ("checkpoint", "upcycle_from", "branch_from")  # the fields of `init` that name the folder of another run
BRANCH = "branch_from"


@dataclasses.dataclass(frozen=True)
class Scale:
    """A value in a grid: an arm's own value of the field times `factor`."""

    factor: float


Grid = dict[str, dict[str, bool | int | float | str | Scale]]


def product(axes: dict[str, Sequence[bool | int | float | str | Scale]]) -> Grid:
    """A grid of every combination of values: dotted config path -> values.

    A candidate is named for its values: 'learning_rate-x0.5+final_fraction-0.3'.
    """

    def name(path, value):
        text = f"x{value.factor:g}" if isinstance(value, Scale) else str(value)
        return f"{path.rpartition('.')[2]}-{text}"

    grid = {}
    for values in itertools.product(*axes.values()):
        candidate = dict(zip(axes, values))
        grid["+".join(name(path, value) for path, value in candidate.items())] = candidate
    return grid


@dataclasses.dataclass
class Arm:
    """One variant of a study.

    An arm is trained by settings of its own, or repeats another arm's runs (`twin_of`), or scores them (`scores`). The last two
    have the base, the settings and the start of that other arm.

    Attributes:
      name: a label, also of its folder.
      settings: dotted config path -> value, over the base; taken as the command line takes `--config.a.b=VALUE`.
      twin_of: makes this an A/A arm: the name of the arm whose runs it repeats, with other noise in the routers.
      full: settings over its own with --scale=full.
      scores: the name of an arm whose runs this one scores once more instead of training; its settings change only evaluation.
      baseline: the arm that its differences are against, such as one of as many steps. Its own name: it is a baseline. Empty:
        the study's.
      base: a config instead of the study's, such as that of another member of a family of models.
      starts_from: the name of an arm: each run starts from that arm's finished run of the same seed; empty: from new
        parameters.
      start: the field of `init` that gets the folder of that run: "checkpoint" takes its parameters and tokenizer as they are,
        "upcycle_from" makes experts of its feed-forward layers, "branch_from" goes on with all of its state at
        init.branch_step, such as a decay of its own after the other run's stable steps.
      equal_time_to: the name of an arm: this one is trained for as many seconds as that one's steps take, by a schedule of
        as many steps as fit; they are found before the first run and take the place of train.steps.
      tuned_as: the name of an arm whose winner of the study's grid this one has, without a search of its own.
      margin: the difference, above 0, below which the arm counts as at least as good as its baseline; 0: the study's.
    """

    name: str
    settings: Settings = dataclasses.field(default_factory=dict)
    twin_of: str = ""
    full: Settings = dataclasses.field(default_factory=dict)
    scores: str = ""
    baseline: str = ""
    base: Config | None = None
    starts_from: str = ""
    start: str = STARTS[0]
    equal_time_to: str = ""
    tuned_as: str = ""
    margin: float = 0.0


@dataclasses.dataclass
class Curve:
    """Arms of a study in order of a quantity: a table and a picture.

    name: of the picture's file. title, x: of the picture and of its axis. lines: label -> {arm: its x, a number or the
      dotted path of the config that has it}, the first one the line that the others are compared with where they share
      an x. metrics: names in `moe_jax.study.metrics.METRICS`, such as loss, or difference: the loss minus that of the arm's
      baseline, seed by seed. log: of x. x_metric: a metric whose mean over the arm's runs takes the place of its x, such as
      evaluated_experts; empty: none. Arms without a finished run are then left out.
    """

    name: str
    title: str
    x: str
    lines: dict[str, dict[str, float | str]]
    metrics: tuple[str, ...] = ("loss",)
    log: bool = True
    x_metric: str = ""


@dataclasses.dataclass
class Study:
    """A paired comparison, fixed before its first run.

    All runs are scored on the validation text of the base's sources, whatever they were trained on, so losses
    compare. Arms with other sources, or another tokenizer, may have other tokens: those are compared in bits per
    byte. That no arm trains on text which the base's sources hold out is up to the study.

    base: what the arms share that have no base of their own; each seed takes the place of `base.seed`. arms, baseline: the
      variants, and the name of the one that the differences are against. seeds: the same ones for every arm; later runs may add
      arms and seeds. full: settings over every base with --scale=full. target_loss: validation loss, in nats per token, whose
      time is compared; 0: the highest last loss among the baseline's runs, which it reaches with every seed. epochs_limit:
      passes over a source's training text; a study of repetition raises it. title: of the tables. curves: arms in order of a
      quantity; they and `shown` may change at any time. shown: the arms in the pictures against steps; empty: all.

    grid: candidates by name, each with settings over an arm's own; every arm is trained with every candidate from every one of
      `tuning_seeds`, and its other runs have the settings of the one with the lowest mean validation loss, the first of equal
      ones. Empty: arms are trained as they are. The seeds of the two must differ.
    primary: the name of the arm whose difference to its baseline is the study's one question: it is tested alone, all others
      together. margin: of all arms that have none of their own; 0: none. hours_limit: predicted hours, one run after the other,
      above which the study is refused; it may change at any time.
    """

    base: Config
    arms: tuple[Arm, ...]
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2)
    full: Settings = dataclasses.field(default_factory=dict)
    target_loss: float = 0.0
    epochs_limit: float = 4.0
    title: str = ""
    curves: tuple[Curve, ...] = ()
    shown: tuple[str, ...] = ()
    grid: Grid = dataclasses.field(default_factory=dict)
    tuning_seeds: tuple[int, ...] = (0, 1, 2)
    primary: str = ""
    margin: float = 0.0
    hours_limit: float = 2.0

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def defined_by(self, arm: Arm) -> Arm:
        """The arm whose base, settings and start an arm has: the other one's of an A/A arm and of one that scores."""
        other = arm.twin_of or arm.scores
        return self.arm(other) if other else arm

    def base_of(self, arm: Arm) -> Config:
        """The config that an arm's settings are over."""
        return self.defined_by(arm).base or self.base

    def baseline_of(self, arm: Arm) -> str:
        """The name of the arm that an arm's differences are against. An A/A arm, and one that scores, has the other's."""
        return arm.baseline or self.defined_by(arm).baseline or self.baseline

    def needs(self, arm: Arm) -> str:
        """The name of the arm whose run of a seed is finished before this one's of that seed begins; empty: none."""
        return arm.scores or self.defined_by(arm).starts_from

    def tuned_by(self, arm: Arm) -> Arm:
        """The arm whose winner of the grid an arm has: itself, or the one that it names, repeats or scores."""
        own = self.defined_by(arm)
        return self.arm(own.tuned_as) if own.tuned_as else own

    def searched(self) -> list[Arm]:
        """The arms that are trained with every candidate of the grid; an arm comes after the one that it starts from."""
        arms = [arm for arm in self.trained() if self.grid and self.tuned_by(arm) is arm]
        return sorted(arms, key=lambda arm: len(self.ancestors(arm)))

    def margin_of(self, arm: Arm) -> float:
        """The margin of an arm's difference; 0: none."""
        return arm.margin or self.defined_by(arm).margin or self.margin

    def ancestors(self, arm: Arm) -> list[Arm]:
        """The arms whose runs were trained before this one's could start, the nearest first."""
        found = []
        while start := self.defined_by(found[-1] if found else arm).starts_from:
            found.append(self.arm(start))
        return found

    def trained(self) -> list[Arm]:
        """The arms with runs of their own."""
        return [arm for arm in self.arms if not arm.scores]

    def trains_alone(self) -> bool:
        """Whether reported runs go one after the other: the seconds that they take are compared."""
        return any(arm.equal_time_to for arm in self.arms)

    def with_bases(self, change: Callable[[Config], Config]) -> "Study":
        """The study with its base, and those of its arms, changed.

        Raises:
          ConfigError: `change` raised it; of an arm's base, it names the arm.
        """

        def changed(arm):
            if not isinstance(arm, Arm) or not isinstance(arm.base, Config):
                return arm
            try:
                return dataclasses.replace(arm, base=change(arm.base))
            except ConfigError as error:
                raise within(f"arm {arm.name} base", error) from None

        arms = tuple(map(changed, self.arms)) if isinstance(self.arms, tuple | list) else self.arms
        return dataclasses.replace(self, base=change(self.base), arms=arms)


def within(where: str, error: ConfigError) -> ConfigError:
    """The error of a config's field, with where the config is from: 'arm x config.model.width'."""
    field = error.field if " " in error.field else f"config.{error.field}"  # it says already where
    return ConfigError(f"{where} {field}", error.value, error.limit, error.fix)


_TUPLES = ("seeds", "shown", "tuning_seeds")


def study_to_dict(study: Study) -> dict[str, Any]:
    """A study as nested dicts and lists, ready for JSON."""
    own = {entry.name: getattr(study, entry.name) for entry in dataclasses.fields(study)}
    arms = [arm_to_dict(arm) for arm in study.arms]
    curves = [dataclasses.asdict(curve) | {"metrics": list(curve.metrics)} for curve in study.curves]
    lists = {name: list(getattr(study, name)) for name in _TUPLES}
    values = lambda settings: {
        path: dataclasses.asdict(value) if isinstance(value, Scale) else value for path, value in settings.items()
    }
    grid = {name: values(settings) for name, settings in study.grid.items()}
    return own | {"base": to_dict(study.base), "arms": arms, "curves": curves, "grid": grid} | lists


def arm_to_dict(arm: Arm) -> dict[str, Any]:
    """An arm as a dict, ready for JSON."""
    own = {entry.name: getattr(arm, entry.name) for entry in dataclasses.fields(arm)}
    return own | {"base": arm.base and to_dict(arm.base)}


def study_from_dict(tree: dict[str, Any]) -> Study:
    """The study that `study_to_dict` wrote; fields that are missing take their defaults, so older files load.

    Raises:
      ConfigError: `tree` is something else.
    """
    try:
        own = {entry.name: tree[entry.name] for entry in dataclasses.fields(Study) if entry.name in tree}
        bases = [from_dict(arm["base"]) if arm.get("base") else None for arm in tree["arms"]]
        arms = tuple(Arm(**arm | {"base": base}) for arm, base in zip(tree["arms"], bases))
        curves = tuple(Curve(**curve | {"metrics": tuple(curve["metrics"])}) for curve in tree.get("curves", ()))
        values = lambda settings: {path: Scale(**v) if isinstance(v, dict) else v for path, v in settings.items()}
        grid = {name: values(settings) for name, settings in tree.get("grid", {}).items()}
        tuples = {name: tuple(own[name]) for name in _TUPLES if name in own}
        return Study(**own | {"base": from_dict(tree["base"]), "arms": arms, "curves": curves, "grid": grid} | tuples)
    except (KeyError, TypeError, AttributeError) as error:
        limit = f"not a study ({type(error).__name__} {error})"
        raise ConfigError("description of the study", None, limit, "restore the file") from None
