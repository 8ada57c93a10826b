"""The meshes that a slice allows."""

import copy
import math
from collections.abc import Iterator, Sequence

from moe_jax.config import Config, ConfigError
from moe_jax.config.validate import validate
from moe_jax.parallel.mesh import AXES


def splits(devices: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `devices` as an ordered product of `parts` factors."""
    if parts == 1:
        yield (devices,)
        return
    for factor in range(1, devices + 1):
        if devices % factor == 0:
            yield from ((factor, *rest) for rest in splits(devices // factor, parts - 1))


def meshes(config: Config, devices: int, axes: Sequence[str] = AXES) -> list[Config]:
    """A copy of `config` for every mesh of that many devices that it can run on.

    Args:
      config: the others of its mesh's axes stay as they are; data=-1 varies too.
      devices: the product.
      axes: those that vary.

    Raises:
      ConfigError: an axis that does not exist; the fixed axes do not divide `devices`, or no mesh is possible.
    """
    for name in axes:
        if name not in AXES:
            raise ConfigError("--axes", ",".join(axes), f"no mesh axis {name!r}", f"use {', '.join(AXES)}")
    axes = axes if config.mesh.data > 0 or "data" in axes else ("data", *axes)
    fixed = {name: getattr(config.mesh, name) for name in AXES if name not in axes}
    product = math.prod(fixed.values())
    sizes = splits(devices // product, len(axes)) if product and devices % product == 0 else ()
    candidates, refused = [], None
    for factors in sizes:
        candidate = copy.deepcopy(config)
        candidate.mesh.cpu_devices = 0
        for name, size in zip(axes, factors, strict=True):
            setattr(candidate.mesh, name, size)
        try:
            validate(candidate, devices)
        except ConfigError as error:
            refused = refused or error
        else:
            candidates.append(candidate)
    if not candidates:
        raise refused or ConfigError(
            "--axes", ",".join(axes), f"the other axes do not divide the {devices} devices", "vary more axes"
        )
    return candidates
