import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import rotary


def _llama3(width, theta, factor, low, high, original):
    """Frequency by frequency, as transformers' _compute_llama3_parameters describes it."""
    result = []
    for i in range(width // 2):
        frequency = theta ** (-2 * i / width)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            result.append(frequency)
        elif wavelength > original / low:
            result.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(result)


def test_frequencies():
    plain = rotary.rotary_frequencies(8, 100.0)
    np.testing.assert_allclose(plain, [1, 100**-0.25, 0.1, 100**-0.75], rtol=1e-15)
    np.testing.assert_allclose(rotary.rotary_frequencies(8, 100.0, "linear", factor=4.0), plain / 4, rtol=1e-15)


# Llama 3.1 8B, Llama 3.2 1B, and an original context so short that every branch occurs at a small width.
@pytest.mark.parametrize(
    "arguments",
    [
        (128, 500000.0, 8.0, 1.0, 4.0, 8192),
        (64, 500000.0, 32.0, 1.0, 4.0, 8192),
        (16, 10000.0, 4.0, 1.0, 4.0, 64),
    ],
)
def test_llama3(arguments):
    width, theta, factor, low, high, original = arguments
    options = dict(factor=factor, low_frequency=low, high_frequency=high, original_length=original)
    ours = rotary.rotary_frequencies(width, theta, "llama3", **options)
    np.testing.assert_allclose(ours, _llama3(*arguments), rtol=1e-12)
    np.testing.assert_array_equal(rotary.Rotary(theta, "llama3", **options).frequencies(width), ours)


def test_apply_turns_split_half_pairs():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 3, 2, 8)).astype(np.float32), np.array([[0, 1, 2], [5, 900, 40000]])
    frequencies = rotary.rotary_frequencies(8)
    expected = np.zeros((2, 3, 2, 8))
    for b in range(2):
        for s in range(3):
            for i in range(4):
                angle = positions[b, s] * frequencies[i]
                first, second = x[b, s, :, i].astype(np.float64), x[b, s, :, i + 4].astype(np.float64)
                expected[b, s, :, i] = first * np.cos(angle) - second * np.sin(angle)
                expected[b, s, :, i + 4] = second * np.cos(angle) + first * np.sin(angle)
    y = jax.jit(rotary.apply_rotary)(x, positions, frequencies)
    chex.assert_shape(y, x.shape)
    # A float32 frequency has a relative error of 3e-8, so an angle of up to 40000 is off by up to 3e-3.
    np.testing.assert_allclose(y[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(y[1], expected[1], atol=1e-2)
    np.testing.assert_array_equal(y[0, 0], x[0, 0])


def test_scores_depend_on_the_difference_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 1, 16))
    positions, frequencies = jnp.arange(4)[None], rotary.rotary_frequencies(16)

    def scores(shift):
        turned = [rotary.apply_rotary(x, positions + shift, frequencies) for x in (q, k)]
        return jnp.einsum("bshw,bmhw->bhsm", *turned)

    chex.assert_trees_all_close(scores(0), scores(500), atol=5e-4)


@pytest.mark.fused
def test_bfloat16_is_rounded_once():
    x = jax.random.normal(jax.random.key(0), (1, 4, 1, 16), jnp.bfloat16)
    positions, frequencies = jnp.array([[0, 257, 1001, 2047]]), rotary.rotary_frequencies(16)
    y = rotary.apply_rotary(x, positions, frequencies)
    chex.assert_type(y, jnp.bfloat16)
    wide = rotary.apply_rotary(x.astype(jnp.float32), positions, frequencies)
    chex.assert_trees_all_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(head_width=7), "head_width=7 is odd"),
        (dict(head_width=8, scaling="yarn"), "rope_scaling='yarn' is unknown"),
        (dict(head_width=8, scaling="llama3", high_frequency=1.0), "must be above rope_low_frequency=1.0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        rotary.rotary_frequencies(**arguments)
