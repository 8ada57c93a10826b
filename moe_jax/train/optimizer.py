"""AdamW with a schedule and parameter groups by path.

The schedule follows the run's step, not a counter of applied updates: a skipped step still moves it on.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import ConfigError, OptimizerConfig, TrainConfig


def learning_rate(config: OptimizerConfig, train: TrainConfig, step: jax.Array) -> jax.Array:
    """The learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule to the last step."""
    warmup, end = config.warmup_steps, config.learning_rate * config.final_fraction
    rest = max(train.steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(config.learning_rate, end, rest),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    # Step 0 already learns: the warm-up counts from 1.
    return jnp.where(step < warmup, config.learning_rate * (step + 1) / max(warmup, 1), decay(step - warmup))


def leaf_paths(tree: Any) -> Any:
    """The 'a/b/c' path of every leaf, in the tree's structure."""
    return jax.tree_util.tree_map_with_path(lambda p, _: jax.tree_util.keystr(p, simple=True, separator="/"), tree)


def parameter_group(config: OptimizerConfig, path: str):
    return next((group for group in config.groups if re.search(group.path, path)), None)


def group_factors(config: OptimizerConfig, params: Any) -> tuple[Any, Any]:
    """Learning-rate scale and weight decay of every parameter, as Python floats in the structure of `params`.

    Weight decay is for matrices only. Stacked layers add a leading axis, so a "vector" is known by its name: norms'
    scales and biases (`scale`, `bias`, `b_*`). Pools of one-neuron experts have none either: it would erase rows that are
    seldom retrieved.
    """

    def scale(path):
        group = parameter_group(config, path)
        return 1.0 if group is None else group.learning_rate_scale

    def decay(path):
        group, name = parameter_group(config, path), path.rsplit("/", 1)[-1]
        if group is not None and group.weight_decay >= 0:
            return group.weight_decay
        pool = re.search(r"(^|/)(peer|pool)/experts$", path)
        return 0.0 if pool or name in ("scale", "bias") or name.startswith("b_") else config.weight_decay

    paths = leaf_paths(params)
    return jax.tree.map(scale, paths), jax.tree.map(decay, paths)


def check_groups(config: OptimizerConfig, params: Any) -> None:
    """Refuses a group that is the first match of no parameter: it would be without effect.

    Raises:
      ConfigError: naming the group.
    """
    paths = jax.tree.leaves(leaf_paths(params))
    used = [parameter_group(config, path) for path in paths]
    for i, group in enumerate(config.groups):
        if not any(group is one for one in used):
            limit, fix = (
                "matches no parameter",
                f"their paths are such as {', '.join(paths[:: len(paths) // 4 + 1])}",
            )
            if any(re.search(group.path, path) for path in paths):
                limit, fix = "all that it matches is in a group before it", "move it up"
            raise ConfigError(f"optimizer.groups[{i}].path", group.path, limit, fix)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam directions plus decayed weights, scaled per group; the caller multiplies by the learning rate."""

    def decay_and_scale(updates, params):
        scales, decays = group_factors(config, params)
        return jax.tree.map(lambda u, p, s, d: s * (u + d * p), updates, params, scales, decays)

    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.epsilon),
        optax.stateless(decay_and_scale),
    )
