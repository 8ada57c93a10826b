"""Published figures of TPU chips, and the least time that a step can take on them."""

import dataclasses
from typing import Any, NamedTuple

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      hbm: bytes of HBM.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s that it can send over all its links together: half of the published figure for both ways.
      source: where the figures stand.
      options: what the compiler must be told of it.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    link_bandwidth: float
    source: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    # Links of v4: 6 of 50 GB/s (arXiv:2304.01433, table 4). One device a chip: both cores work as one.
    "v4": Chip(
        275e12,
        32 * GIB,
        1200e9,
        300e9,
        "cloud.google.com/tpu/docs/v4, arXiv:2304.01433",
        {"chip_config_name": "megacore"},
    ),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9, "cloud.google.com/tpu/docs/v6e"),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 600e9, "cloud.google.com/tpu/docs/tpu7x"),
}


class Roofline(NamedTuple):
    """Seconds a step would take if nothing but FLOPs, HBM or links cost time."""

    compute: float
    hbm: float
    links: float

    @property
    def bound(self) -> str:
        """Which of the three is longest."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        """Seconds if the three overlap perfectly: the least a step can take."""
        return max(self)

    @property
    def serial(self) -> float:
        """Seconds if nothing overlaps, still at every peak."""
        return sum(self)


def roofline(chip: Chip, flops: float, hbm_bytes: float, link_bytes: float) -> Roofline:
    """Times of one chip's share of a step over the chip's published peaks."""
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, link_bytes / chip.link_bandwidth)
