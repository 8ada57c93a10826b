"""What a study finds out before the runs that it reports, and then keeps: winners of the grid, and steps of equal time.

One file in the study's folder. What it has of an arm does not change any more, whenever the command is run again.
"""

import dataclasses
import json
import pathlib
from typing import Any

from moe_jax.config import ConfigError
from moe_jax.config.study import Arm, Study

FIXED = "fixed.json"


@dataclasses.dataclass
class Fixed:
    """What is fixed so far, by the name of an arm.

    Attributes:
      tuning: `winner`, a name in the grid, or "" where no candidate finished; `settings`, those of the winner as values;
        `candidates`: for each its `loss`, the mean over the tuning seeds, and `losses` by seed; None where one failed.
      equal_time: `to`, the other arm; `steps`; `ms` and `to_ms` of a step when they were found; `seconds`: steps * ms.
    """

    tuning: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    equal_time: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def winner(self, study: Study, arm: Arm) -> str:
        """The candidate whose settings an arm's runs have; "": none, or not known yet."""
        return self.tuning.get(study.tuned_by(arm).name, {}).get("winner", "") if study.grid else ""

    def steps(self, study: Study, arm: Arm) -> int:
        """The steps of an arm of equal time, or of one that repeats or scores its runs; 0: it has those of its settings."""
        return self.equal_time.get(study.defined_by(arm).name, {}).get("steps", 0)


def load_fixed(workdir) -> Fixed:
    """What is fixed in a study's folder so far.

    Raises:
      ConfigError: the file cannot be read.
    """
    path = pathlib.Path(workdir) / FIXED
    try:
        return Fixed(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Fixed()
    except (OSError, ValueError, TypeError) as error:
        limit = f"{FIXED}: {type(error).__name__} {error}"
        raise ConfigError("--workdir", str(workdir), limit, "restore the file") from None


def save_fixed(workdir, fixed: Fixed) -> None:
    """Writes the file."""
    from moe_jax.train.metrics import write_whole

    write_whole(pathlib.Path(workdir) / FIXED, json.dumps(dataclasses.asdict(fixed), indent=1))


def equal_steps(steps: int, ms: float, own_ms: float) -> int:
    """The steps of `own_ms` that take as long as `steps` of `ms`, to the nearest; at least one."""
    return max(round(steps * ms / own_ms), 1)
