"""A study: named arms, each a few settings away from one config, trained from the same seeds.

A file of configs/studies/ returns one from `get_config()`; `python -m moe_jax.study` runs it.
"""

import dataclasses
from typing import Any

from moe_jax.config.leaf import ConfigError
from moe_jax.config.reflect import from_dict, to_dict
from moe_jax.config.run import Config

Settings = dict[str, bool | int | float | str]


@dataclasses.dataclass
class Arm:
    """One variant of a study.

    name: a label, also of its folder. settings: dotted config path -> value, over the study's base; taken as
      the command line takes `--config.a.b=VALUE`. twin_of: an A/A arm: the name of the arm whose settings it
      repeats, with other noise in its routers; it has no settings of its own. full: settings over its own with --scale=full.
      scores: the name of an arm that this one does not train again: its runs are scored once more, with its settings and
      those of this one over them, which change the evaluation alone. baseline: the arm that its differences are against, such
      as one of as many steps; its own name: it is one; empty: the study's.
    """

    name: str
    settings: Settings = dataclasses.field(default_factory=dict)
    twin_of: str = ""
    full: Settings = dataclasses.field(default_factory=dict)
    scores: str = ""
    baseline: str = ""


METRICS = ("loss", "usage", "unevenness")


@dataclasses.dataclass
class Curve:
    """Arms of a study in order of a quantity: a table and a picture.

    name: of the picture's file. title, x: of the picture and of its axis. lines: label -> {arm: its x, a number or the
      dotted path of the config that has it}, the first one the line that the others are compared with where they share
      an x. metrics: of METRICS; usage and unevenness are of arms with layers that retrieve one-neuron experts. log: of x.
    """

    name: str
    title: str
    x: str
    lines: dict[str, dict[str, float | str]]
    metrics: tuple[str, ...] = ("loss",)
    log: bool = True


@dataclasses.dataclass
class Study:
    """A paired comparison, fixed before its first run.

    base: what all arms share; each seed takes the place of `base.seed`. arms, baseline: the variants, and the name of
      the one that the differences are against. seeds: the same ones for every arm; later runs may add arms and seeds.
      full: settings over `base` with --scale=full. target_loss: validation loss, in nats per token, whose time is
      compared; 0: the highest last loss among the baseline's runs, which it reaches with every seed. epochs_limit:
      passes over a source's training text; a study of repetition raises it. title: of the tables. curves: arms in order of a
      quantity; they and `shown` may change at any time. shown: the arms in the pictures against steps; empty: all.
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

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def baseline_of(self, arm: Arm) -> str:
        """The name of the arm that an arm's differences are against. An A/A arm, and one that scores, has the other's."""
        other = arm.twin_of or arm.scores
        return arm.baseline or (other and self.arm(other).baseline) or self.baseline

    def trained(self) -> list[Arm]:
        """The arms with runs of their own."""
        return [arm for arm in self.arms if not arm.scores]


def study_to_dict(study: Study) -> dict[str, Any]:
    """A study as nested dicts and lists, ready for JSON."""
    own = {entry.name: getattr(study, entry.name) for entry in dataclasses.fields(study)}
    arms = [dataclasses.asdict(arm) for arm in study.arms]
    curves = [dataclasses.asdict(curve) | {"metrics": list(curve.metrics)} for curve in study.curves]
    lists = {"seeds": list(study.seeds), "shown": list(study.shown)}
    return own | {"base": to_dict(study.base), "arms": arms, "curves": curves} | lists


def study_from_dict(tree: dict[str, Any]) -> Study:
    """The study that `study_to_dict` wrote; config fields that are missing take their defaults.

    Raises:
      ConfigError: `tree` is something else.
    """
    try:
        own = {entry.name: tree[entry.name] for entry in dataclasses.fields(Study) if entry.name in tree}
        arms = tuple(Arm(**arm) for arm in tree["arms"])
        curves = tuple(Curve(**curve | {"metrics": tuple(curve["metrics"])}) for curve in tree.get("curves", ()))
        tuples = {"seeds": tuple(tree["seeds"]), "shown": tuple(tree.get("shown", ()))}
        return Study(**own | {"base": from_dict(tree["base"]), "arms": arms, "curves": curves} | tuples)
    except (KeyError, TypeError) as error:
        limit = f"not a study ({type(error).__name__} {error})"
        raise ConfigError("description of the study", None, limit, "restore the file") from None
