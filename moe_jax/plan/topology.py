"""A TPU slice that is not there: its chips, as the compiler sees them."""

import importlib.metadata
import importlib.util
import math
import re
from typing import Any, NamedTuple

from moe_jax import compat
from moe_jax.config import ConfigError
from moe_jax.plan.roofline import CHIPS, Chip

_NAME = re.compile(r"(\w+):(\d+(?:x\d+){1,2})")
EXAMPLES = "v5e:2x4, v5p:2x2x2, v6e:2x4, v4:2x2x2 or tpu7x:2x2x1"


class Topology(NamedTuple):
    """A slice. devices: as `jax.devices()` would list them there; some chips are several devices."""

    name: str
    chip: Chip
    chips: int
    devices: list[Any]

    @property
    def devices_per_chip(self) -> int:
        return len(self.devices) // self.chips


def open_topology(name: str) -> Topology:
    """The slice of this name, such as "v5p:2x2x2".

    Raises:
      ConfigError: libtpu is not installed, or there is no such slice.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ConfigError("--topology", name or None, "not a TPU slice", f"write one such as {EXAMPLES}")
    if match[1] not in CHIPS:
        raise ConfigError("--topology", name, f"no chip {match[1]!r}", f"write one such as {EXAMPLES}")
    if importlib.util.find_spec("libtpu") is None:
        fix = "pip install -e '.[tpu]', which works on any Linux machine"
        raise ConfigError("--topology", name, "libtpu, TPU's compiler, is not installed", fix)
    chip, dims = CHIPS[match[1]], [int(n) for n in match[2].split("x")]
    options = dict(chip.options)
    if math.prod(dims) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = compat.tpu_topology(name, **options)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ConfigError("--topology", name, lines[0], f"write one such as {EXAMPLES}") from None
    return Topology(name, chip, math.prod(dims), devices)


def wrong_libtpu() -> str:
    """A warning if libtpu is not the version that this JAX asks for, else an empty string.

    With other versions the grouped kernel has silently become a dense product.
    """
    have = importlib.metadata.version("libtpu")
    for requirement in importlib.metadata.requires("jax") or ():
        if match := re.match(r"libtpu==([\d.]+)\.\*", requirement):
            if not f"{have}.".startswith(f"{match[1]}."):
                return f"libtpu {have} is not the {match[1]} of this JAX: pip install 'libtpu=={match[1]}.*'"
    return ""
