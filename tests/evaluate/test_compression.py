"""Compressors: the sizes of the commands."""

import shutil
import subprocess

import numpy as np
import pytest

from moe_jax.evaluate.compression import compress_bits_per_byte

RNG = np.random.default_rng(0)
TEXTS = [b" ".join(RNG.choice([b"def", b"return", b"x", b"lambda"], size)) for size in (5, 300, 4000)]


def test_the_sizes_of_the_commands():
    bits = compress_bits_per_byte(iter(TEXTS))
    size = sum(map(len, TEXTS)) / 8

    def command(*words, text):
        if not shutil.which(words[0]):
            pytest.skip(f"there is no {words[0]}")
        return len(subprocess.run(words, input=text, capture_output=True, check=True).stdout)

    # Two implementations of the same format need not take the same matches.
    assert bits["gzip"] * size == pytest.approx(sum(command("gzip", "-9", text=text) for text in TEXTS), rel=0.005)
    assert bits["xz"] * size == pytest.approx(command("xz", "-9", text=b"".join(TEXTS)), abs=16)
    assert bits["xz_each"] * size == pytest.approx(sum(command("xz", "-9", text=text) for text in TEXTS), abs=48)


@pytest.mark.smoke
def test_what_each_one_sees():
    noise = RNG.bytes(2000)
    bits = compress_bits_per_byte([noise, noise])
    assert bits["gzip"] > 8 and bits["xz_each"] > 8  # headers included
    assert bits["xz"] == pytest.approx(4, abs=0.5)  # the second one is a copy of the first


def test_no_text():
    for texts in ([], [b""]):
        with pytest.raises(ValueError, match="no text"):
            compress_bits_per_byte(texts)
