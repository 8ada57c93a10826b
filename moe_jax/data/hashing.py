"""Digests that name cached data, and splits held out by a hash."""

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np

HASHES = 2**64


def digest(*parts) -> str:
    """A hex name for JSON-able `parts`: equal parts, equal name, on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def hash64(key: str | bytes) -> int:
    """A hash of `key` in [0, HASHES) that does not depend on the process or the machine."""
    key = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def hold_out(hashes: Iterable[int], names: Sequence[str], percent: float) -> dict[str, tuple[int, int]]:
    """Ranges [low, high) of hashes for each of `names` and for "train", which takes the rest.

    A named range covers `percent` of all hashes, and is stretched to its first document where that would
    leave it empty, so a handful of documents can still be split.

    Args:
      hashes: `hash64` of every document.
      names: splits to hold out.
      percent: share of each of them.

    Raises:
      ValueError: a split, or what is left to train on, would have no document.
    """
    hashes = np.unique(np.fromiter(hashes, np.uint64))
    bounds, low = {}, 0
    for name in names:
        first = np.searchsorted(hashes, np.uint64(low)) if low < HASHES else len(hashes)
        if first == len(hashes):
            raise ValueError(f"{len(hashes)} different documents leave {name} empty")
        high = max(low + int(HASHES * percent / 100), int(hashes[first]) + 1)
        bounds[name], low = (low, high), high
    if not len(hashes) or int(hashes[-1]) < low:
        raise ValueError(f"{len(hashes)} different documents leave train empty")
    return bounds | {"train": (low, HASHES)}
