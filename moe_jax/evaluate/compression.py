"""What general compressors make of a text, to set a language model's bits per byte beside."""

import gzip
import lzma
from collections.abc import Iterable


def compress_bits_per_byte(texts: Iterable[bytes]) -> dict[str, float]:
    """Bits of compressed data per byte of text, headers and checksums included.

    `gzip`: level 9, each text for itself, as `gzip -9 < FILE` writes it; its window is 32 KiB.
    `xz`: preset 9, all texts one after the other as one stream, so that each one profits from those before it
    within 64 MiB; the model sees no other document, so this is the harder comparison.
    `xz_each`: preset 9, each text for itself.

    Args:
      texts: read once.

    Raises:
      ValueError: no bytes at all.
    """
    size, compressed = 0, {"gzip": 0, "xz": 0, "xz_each": 0}
    stream = lzma.LZMACompressor(preset=9)
    for text in texts:
        size += len(text)
        compressed["gzip"] += len(gzip.compress(text, compresslevel=9, mtime=0))
        compressed["xz"] += len(stream.compress(text))
        compressed["xz_each"] += len(_xz(text))
    compressed["xz"] += len(stream.flush())
    if not size:
        raise ValueError("there is no text to compress")
    return {name: 8 * count / size for name, count in compressed.items()}


def _xz(text: bytes) -> bytes:
    # A dictionary larger than the text changes nothing but the time: 10 times as much at 28 KB a text with
    # the preset's 64 MiB.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(max(len(text), 4096), 2**26)}]
    return lzma.compress(text, filters=filters)
