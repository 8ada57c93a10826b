"""AdamW with a schedule and parameter groups by path.

The schedule follows the run's step, not a counter of applied updates: a skipped step still moves it on.
"""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.config import ConfigError, OptimizerConfig, TrainConfig

# The root of the smallest normal float32. A smaller second moment counts as 0, and a smaller epsilon does not keep
# its root from 0: the direction would be 0 / 0 where there is no gradient.
SMALLEST_EPSILON = math.sqrt(float(np.finfo(np.float32).tiny))


def warmup_steps(config: OptimizerConfig, train: TrainConfig) -> int:
    """Steps of the warm-up: those that the config asks for, or as many as there are."""
    return min(config.warmup_steps, train.steps)


def decay_steps(config: OptimizerConfig, train: TrainConfig) -> int:
    """The last steps over which schedule=wsd decays; none of them is in the warm-up."""
    return min(round(config.decay_fraction * train.steps), max(train.steps - warmup_steps(config, train), 1))


def stable_steps(config: OptimizerConfig, train: TrainConfig) -> int:
    """The first steps whose learning rate, warm-up and then the peak, does not depend on where the schedule goes."""
    whole = {"constant": train.steps, "wsd": train.steps - decay_steps(config, train)}
    return whole.get(config.schedule, warmup_steps(config, train))


def epsilon(config: OptimizerConfig) -> float:
    """What is added to the root of the second moment: the config's, or the smallest that float32 tells from 0 there."""
    return max(config.epsilon, SMALLEST_EPSILON)


def learning_rate(config: OptimizerConfig, train: TrainConfig, step: jax.Array) -> jax.Array:
    """The learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule to the last step."""
    peak, warmup = config.learning_rate, warmup_steps(config, train)
    end, rest, last = peak * config.final_fraction, max(train.steps - warmup, 1), decay_steps(config, train)
    constant = optax.constant_schedule(peak)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": constant,
        "wsd": optax.join_schedules([constant, optax.linear_schedule(peak, end, max(last, 1))], [rest - last]),
    }[config.schedule]
    # Step 0 already learns: the warm-up counts from 1.
    return jnp.where(step < warmup, peak * (step + 1) / max(warmup, 1), decay(step - warmup))


def leaf_paths(tree: Any) -> Any:
    """The 'a/b/c' path of every leaf, in the tree's structure."""
    return jax.tree_util.tree_map_with_path(lambda p, _: jax.tree_util.keystr(p, simple=True, separator="/"), tree)


def parameter_group(config: OptimizerConfig, path: str):
    return next((group for group in config.groups if re.search(group.path, path)), None)


def group_settings(config: OptimizerConfig, path: str) -> tuple[float, float]:
    """(learning-rate scale, weight decay or -1 for the optimizer's) of the parameter at a path."""
    group = parameter_group(config, path)
    return (group.learning_rate_scale, group.weight_decay) if group else (1.0, -1.0)


def group_factors(config: OptimizerConfig, params: Any) -> tuple[Any, Any]:
    """Learning-rate scale and weight decay of every parameter, as Python floats in the structure of `params`.

    Weight decay is for matrices only. Stacked layers add a leading axis, so a "vector" is known by its name: norms'
    scales, biases and a router's window (`scale`, `bias`, `norm_*`, `b_*`, `light_window`). Pools of one-neuron experts have
    none either: it would erase rows that are seldom retrieved.
    """

    def scale(path):
        return group_settings(config, path)[0]

    def decay(path):
        of_group, name = group_settings(config, path)[1], path.rsplit("/", 1)[-1]
        if of_group >= 0:
            return of_group
        pool = re.search(r"(^|/)(peer|pool|pool_\w+)/experts$", path)
        vector = name in ("scale", "bias", "light_window") or name.startswith(("norm_", "b_"))
        return 0.0 if pool or vector else config.weight_decay

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
        if any(group is other for other in used):
            continue
        limit, fix = "matches no parameter", f"did you mean {_nearest_path(group.path, paths)}?"
        if any(re.search(group.path, path) for path in paths):
            limit, fix = "all that it matches is in a group before it", "move it up"
        raise ConfigError(f"optimizer.groups[{i}].path", group.path, limit, fix)


def _nearest_path(pattern: str, paths: Iterable[str]) -> str:
    """The path of which some parts in a row are most like a pattern."""

    def likeness(path):
        parts = path.split("/")
        runs = ["/".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
        return max(difflib.SequenceMatcher(None, pattern, run).ratio() for run in runs)

    return max(paths, key=likeness)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam directions plus decayed weights, scaled per group; the caller multiplies by the learning rate."""

    def decay_and_scale(updates, params):
        scales, decays = group_factors(config, params)
        return jax.tree.map(lambda u, p, s, d: s * (u + d * p), updates, params, scales, decays)

    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, epsilon(config)),
        optax.stateless(decay_and_scale),
    )
