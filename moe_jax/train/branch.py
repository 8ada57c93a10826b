"""Whether a run can go on from another one's state at a step, so that one stable run gives several budgets.

A branch is the run that its own config would have given from the first step: it has the bits of a run of that config that was
never another one's. So all that fixes numbers up to the step must be the other run's, the learning rates too; only where the
schedule goes from there, and how many steps there are, is the branch's own.
"""

from moe_jax.config import Config, ConfigError, differences, one_line, role, shorten_list
from moe_jax.config.leaf import ON_RESUME
from moe_jax.train.optimizer import stable_steps, warmup_steps

# What a branch may change beside what resuming may. It counts from the step on, which `check_rates` sees to.
SCHEDULE = ("train.steps", "optimizer.schedule", "optimizer.final_fraction", "optimizer.decay_fraction")


def check_branch(trunk: Config, config: Config, step: int) -> None:
    """That a run of `config` may go on from the state of a run of `trunk` after `step` steps.

    Raises:
      ConfigError: naming what differs, or where the learning rates part.
    """
    changed = {
        field: values
        for field, values in differences(trunk, config).items()
        if field not in SCHEDULE and role(field) not in ON_RESUME
    }
    if changed:
        changes = [f"{field} {one_line(old, 40)} -> {one_line(new, 40)}" for field, (old, new) in changed.items()]
        field, (_, value) = next(iter(changed.items()))
        limit = f"may not differ from that of init.branch_from={config.init.branch_from}; differing: {shorten_list(changes)}"
        fix = "make them equal, or use init.checkpoint, which takes the parameters alone"
        raise ConfigError(field, value, limit, fix)
    check_rates(trunk, config, step)


def check_rates(trunk: Config, config: Config, step: int) -> None:
    """That both learning rates are the same before `step`: by the same schedule, or warm-up and then the peak.

    Raises:
      ConfigError: of the first step that differs.
    """
    if step >= config.train.steps:
        limit = f"no step is left after that, {step}, of init.branch_from={config.init.branch_from}"
        raise ConfigError("train.steps", config.train.steps, limit, "raise it, or name an earlier init.branch_step")
    if not any(field in SCHEDULE for field in differences(trunk, config)):
        return
    if (stable := stable_steps(trunk.optimizer, trunk.train)) < step:
        limit = (
            f"with schedule={trunk.optimizer.schedule} and {trunk.train.steps} steps the learning rate of "
            f"init.branch_from={config.init.branch_from} leaves its peak at step {stable}"
        )
        fix = f"branch from step {stable} or before, or train that run with schedule=wsd or constant"
        raise ConfigError("init.branch_step", step, limit, fix)
    if (stable := stable_steps(config.optimizer, config.train)) < step:
        limit = (
            f"with schedule={config.optimizer.schedule} its learning rate leaves the peak at step {stable}, before the branch"
        )
        fix = f"the branch is at step {step}: raise train.steps, or use schedule=wsd with a lower optimizer.decay_fraction"
        raise ConfigError("train.steps", config.train.steps, limit, fix)
    ours, theirs = (warmup_steps(one.optimizer, one.train) for one in (config, trunk))
    if ours != theirs:
        limit = f"its warm-up takes {ours} steps, that of init.branch_from={config.init.branch_from} {theirs}"
        raise ConfigError("train.steps", config.train.steps, limit, "raise it above optimizer.warmup_steps")
