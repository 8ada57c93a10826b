"""Rotary position embedding, with the stretched frequencies of long-context models. Pure functions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

SCALINGS = ("none", "linear", "llama3")


def rotary_frequencies(
    head_width: int,
    theta: float = 10000.0,
    scaling: str = "none",
    *,
    factor: float = 8.0,
    low_frequency: float = 1.0,
    high_frequency: float = 4.0,
    original_length: int = 8192,
) -> np.ndarray:
    """Angles per position step, `theta^(-2i/W)` (Su et al., arXiv:2104.09864), stretched as `scaling` says.

    Args:
      head_width: width W of a head, even.
      theta: base of the geometric series.
      scaling: "none"; "linear": positions divided by `factor` (arXiv:2306.15595); "llama3": wavelengths above
        original_length / low_frequency divided by `factor`, those below original_length / high_frequency
        unchanged, and in between interpolated linearly in original_length / wavelength (transformers
        `_compute_llama3_parameters`).
      factor: the stretch.
      low_frequency: see llama3.
      high_frequency: see llama3.
      original_length: see llama3.

    Returns:
      A constant, float64 [W/2]: transformers computes it in float32, which differs by rounding.

    Raises:
      ValueError: W is odd, `scaling` is unknown, or high_frequency <= low_frequency with llama3.
    """
    if head_width % 2:
        raise ValueError(f"head_width={head_width} is odd; rotary positions turn pairs, so use an even width")
    frequencies = theta ** (-np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    if scaling == "none":
        return frequencies
    if scaling == "linear":
        return frequencies / factor
    if scaling != "llama3":
        raise ValueError(f"rope_scaling={scaling!r} is unknown; use one of {', '.join(SCALINGS)}")
    if high_frequency <= low_frequency:
        raise ValueError(
            f"rope_high_frequency={high_frequency} must be above rope_low_frequency={low_frequency} with llama3 scaling"
        )
    turns = original_length * frequencies / (2 * math.pi)  # full turns within the original context
    kept = np.clip((turns - low_frequency) / (high_frequency - low_frequency), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / factor


def apply_rotary(x: jax.Array, positions: jax.Array, frequencies: np.ndarray | jax.Array) -> jax.Array:
    """Turns each head's pairs (i, i + W/2) by the angle position * frequency[i] (halves, as in HF Llama).

    Args:
      x: [B, S, H, W] of any float dtype.
      positions: int [B, S].
      frequencies: [W/2], from `rotary_frequencies`.

    Returns:
      [B, S, H, W] in the dtype of `x`; computed in at least float32, because bfloat16 angles are wrong after
      position 256.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angles = positions.astype(wide)[..., None, None] * jnp.asarray(frequencies, wide)  # [B, S, 1, W/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions of an attention layer: the options of `rotary_frequencies`, hashable."""

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 8.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def frequencies(self, head_width: int) -> np.ndarray:
        """float64 [W/2]; raises what `rotary_frequencies` raises."""
        return rotary_frequencies(head_width, **dataclasses.asdict(self))
