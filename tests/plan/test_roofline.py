import pytest

from moe_jax.plan.roofline import CHIPS, Chip, roofline
from moe_jax.train.peaks import peak_flops


@pytest.mark.smoke
def test_arithmetic():
    chip = Chip(flops=100.0, hbm=1, hbm_bandwidth=10.0, link_bandwidth=5.0, source="")
    times = roofline(chip, flops=200.0, hbm_bytes=10.0, link_bytes=20.0)
    assert times == (2.0, 1.0, 4.0)
    assert (times.bound, times.overlapped, times.serial) == ("links", 4.0, 7.0)


@pytest.mark.parametrize(
    "chip, kind, devices",
    [
        ("v4", "TPU v4", 1),
        ("v5e", "TPU v5 lite", 1),
        ("v5p", "TPU v5", 1),
        ("v6e", "TPU v6 lite", 1),
        ("tpu7x", "TPU7x", 2),
    ],
)
def test_peaks_are_those_of_the_mfu(chip, kind, devices):
    assert CHIPS[chip].flops == devices * peak_flops(kind)
