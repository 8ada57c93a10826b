"""The file in a study's folder that says what the study is, and what may not change once it has begun."""

import json
import pathlib
from typing import Any

from moe_jax.config import ConfigError, differences, one_line
from moe_jax.config.study import Arm, Study, arm_to_dict, study_from_dict, study_to_dict

DESCRIPTION = "description.json"


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
    if changed := differences(begun.base, study.base):
        path, (old, new) = next(iter(changed.items()))
        raise _changed(path, new, one_line(old))
    for name in ("baseline", "target_loss", "epochs_limit", "grid", "tuning_seeds", "primary", "margin"):
        old, new = getattr(begun, name), getattr(study, name)
        if old != new:
            raise _changed(f"study {name}", one_line(new) or "none", one_line(old) or "none")
    if missing := [seed for seed in begun.seeds if seed not in study.seeds]:
        raise _changed("study seeds", study.seeds, f"seed {missing[0]} too")
    now = {arm.name: arm for arm in study.arms}
    for arm in begun.arms:
        if arm.name not in now:
            raise _changed(f"arm {arm.name}", None, "it")
        _check_arm(arm, now[arm.name])


def _check_arm(begun: Arm, arm: Arm) -> None:
    where = f"arm {arm.name}"
    if begun.base and arm.base and (changed := differences(begun.base, arm.base)):
        path, (old, new) = next(iter(changed.items()))
        raise _changed(f"{where} base config.{path}", new, one_line(old))
    old, new = arm_to_dict(begun), arm_to_dict(arm)
    for name in [name for name in old if old[name] != new[name]]:
        if name == "base":  # one of them has none
            raise _changed(f"{where} base", None, "one" if begun.base else "none")
        raise _changed(f"{where} {name}", new[name], one_line(old[name]) or "none")


def _changed(where: str, value: Any, begun: str) -> ConfigError:
    fix = "put it back, or start in another --workdir"
    return ConfigError(where, value, f"the study in --workdir began with {begun}", fix)
