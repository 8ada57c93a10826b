"""The scores of each document of a run's validation text, kept beside the run, and a bootstrap over documents."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from moe_jax.study.statistics import CONFIDENCE, Interval

RESAMPLES = 10_000
SEED = 0
HELD_AT_ONCE = 2**22  # indices of documents


class Documents(NamedTuple):
    """Sums over each document of one run's validation text, all sources one after the other in the order of their names.

    nats: float64 [n]. tokens, bytes: int [n], of its targets.
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray


def save_documents(path: pathlib.Path, sources: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes {source: {"nats", "tokens", "bytes": [documents]}}, whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    arrays = {f"{source}/{name}": values for source, one in sources.items() for name, values in one.items()}
    with open(unfinished, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(unfinished, path)


def load_documents(path: pathlib.Path) -> Documents | None:
    """What `save_documents` wrote; None: there is no such file, as beside runs of older versions."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    sources = sorted({name.rpartition("/")[0] for name in arrays})
    return Documents(*(np.concatenate([arrays[f"{source}/{name}"] for source in sources]) for name in Documents._fields))


def bootstrap_difference(
    pairs: Sequence[tuple[Documents, Documents]], unit: str, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """The interval of a difference in loss over which documents there could have been, for the seeds that there are.

    The nats of each document are averaged over the seeds, then subtracted, and documents drawn with replacement: percentile
    interval of the summed difference / the summed size (Koehn 2004, "Statistical Significance Tests for Machine Translation
    Evaluation"). A t-interval over seeds asks instead how another seed would come out on this text.

    Args:
      pairs: for each seed the documents of (a run, its baseline's), of the same text.
      unit: "tokens": nats per token, where both have the same tokens; "bytes": bits per byte.
      resamples: draws of all documents.
      seed: of the draws.

    Returns:
      The interval with `n` documents; None without pairs, or where a score is not finite.
    """
    if not pairs:
        return None
    nats = np.mean([ours.nats - theirs.nats for ours, theirs in pairs], axis=0)
    size = getattr(pairs[0][1], unit) * (np.log(2) if unit == "bytes" else 1.0)
    if not np.isfinite(nats).all() or not size.sum():
        return None
    mean, n = float(nats.sum() / size.sum()), len(nats)
    if n < 2:
        return Interval(mean, None, None, n)
    result = scipy.stats.bootstrap(
        (nats, size),
        lambda nats, size, axis: nats.sum(axis) / size.sum(axis),
        n_resamples=resamples,
        batch=max(HELD_AT_ONCE // n, 1),
        vectorized=True,
        paired=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(mean, float(low), float(high), n)
