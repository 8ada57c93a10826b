"""The order of a run's rows by what their tokens took, and what a checkpoint holds of it."""

import jax

from moe_jax.config import Config
from moe_jax.data import Curriculum, TextData
from moe_jax.models.places import deciding_places
from moe_jax.parallel.rules import replicated
from moe_jax.train.state import State


def open_curriculum(config: Config, data: TextData) -> Curriculum | None:
    """The order that `data.curriculum` asks for, before the first step; None: the random one."""
    if config.data.curriculum == "none":
        return None
    return data.curriculum(config.seed, config.data.batch_size, len(deciding_places(config.model)), config.data)


def placed_curriculum(curriculum: Curriculum | None, mesh) -> State:
    """What a checkpoint holds of it now, on all devices of `mesh`; a restore takes it as its target."""
    if curriculum is None:
        return {}
    # `device_put` compares the processes' values, and NaN is not equal to itself.
    place = lambda a: jax.make_array_from_callback(a.shape, replicated(mesh), lambda index: a[index])
    return {"curriculum": jax.tree.map(place, curriculum.arrays())}
