"""Peak speeds of devices, for the MFU."""

# Dense bfloat16 peaks of one JAX device, from the vendors' data sheets; the first name that occurs in
# device_kind counts. A chip of TPU v2, v3 or 7x shows up as two devices, so half of the chip's peak stands
# here.
_PEAKS = (
    ("tpu v2", 45e12 / 2),
    ("tpu v3", 123e12 / 2),
    ("tpu v4 lite", 138e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v6", 918e12),
    ("tpu7x", 2307e12 / 2),
    ("tpu v7x", 2307e12 / 2),
    ("a100", 312e12),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("gb200", 2500e12),
    ("b200", 2250e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, by `jax.devices()[0].device_kind`; None if it is not known."""
    return next((peak for name, peak in _PEAKS if name in device_kind.lower()), None)
