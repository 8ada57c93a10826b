"""Tables from token id to experts for Hash layers (arXiv 2106.04426, section 3.1): random, balanced by frequency, of several.

NumPy on the host, once per model. Draws are raw words of PCG64, whose stream is the same on every platform and in every
NumPy version; the methods of a Generator do not promise that.
"""

import heapq

import numpy as np


def random_hash_table(vocab_size: int, experts: int, seed: int) -> np.ndarray:
    """int32 [V] of independent uniform experts, fixed by `seed`, an integer >= 0."""
    words = np.random.PCG64(seed).random_raw(vocab_size) >> np.uint64(32)
    return ((words * np.uint64(experts)) >> np.uint64(32)).astype(np.int32)


def distinct_hash_table(vocab_size: int, experts: int, draws: int, seed: int) -> np.ndarray:
    """int32 [V, draws]: for each token a uniform set of different experts, fixed by `seed`; the order in a row says nothing.

    Floyd's sampling (Bentley and Floyd, CACM 30(9), 1987) rejects no draw, so that the rows of a smaller vocabulary are the
    first of a larger one's.

    Args:
      vocab_size: V.
      experts: from which they are drawn, below 2^31.
      draws: of each token, at most `experts`.
      seed: integer >= 0.

    Raises:
      ValueError: more draws than experts.
    """
    if draws > experts:
        raise ValueError(f"draws={draws}: at most the {experts} experts, which are different")
    words = (np.random.PCG64(seed).random_raw(vocab_size * draws) >> np.uint64(32)).reshape(vocab_size, draws)
    table = np.empty((vocab_size, draws), np.int32)
    for i in range(draws):
        last = experts - draws + i
        drawn = ((words[:, i] * np.uint64(last + 1)) >> np.uint64(32)).astype(np.int32)
        taken = (table[:, :i] == drawn[:, None]).any(axis=1)
        table[:, i] = np.where(taken, last, drawn)
    return table


def balanced_hash_table(counts, experts: int, seed: int) -> np.ndarray:
    """Gives each token, the most frequent first, to the expert with the least load, its sum of counts, so far.

    Tokens of equal counts come in an order drawn by `seed`; of experts of equal loads the first in a drawn order takes
    the token. Tokens that were never seen are dealt out in turn, since they would all go to one expert. No table
    brings the largest share of the load under that of the most frequent token.

    Args:
      counts: [V] whole numbers >= 0, how often each token stands in the training data.
      experts: E.
      seed: integer >= 0.

    Returns:
      int32 [V].

    Raises:
      ValueError: counts are not one row of whole numbers >= 0.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or not np.all((counts >= 0) & (counts == np.floor(counts)) & (counts < 2**53)):
        raise ValueError(f"counts of shape {counts.shape} must be one row [V] of whole numbers >= 0")
    draw = np.random.PCG64(seed)
    names = np.argsort(draw.random_raw(experts), kind="stable")
    order = np.lexsort((draw.random_raw(counts.size), -counts.astype(np.int64)))
    chosen = np.arange(counts.size) % experts
    # One integer load * E + e for each expert: half the time of pairs.
    heap, keys = list(range(experts)), []
    for count in counts[order[: np.count_nonzero(counts)]].astype(np.int64).tolist():
        keys.append(heap[0])
        heapq.heapreplace(heap, heap[0] + count * experts)
    chosen[: len(keys)] = [key % experts for key in keys]
    table = np.empty(counts.size, np.int32)
    table[order] = names[chosen]
    return table
