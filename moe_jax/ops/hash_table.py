"""Tables from token id to expert for Hash layers (arXiv:2106.04426), made once on the host."""

import heapq

import numpy as np


def random_hash_table(vocab_size: int, experts: int, seed: int) -> np.ndarray:
    """int32 [V], uniform over the experts."""
    return np.random.default_rng(seed).integers(0, experts, vocab_size).astype(np.int32)


def balanced_hash_table(counts: np.ndarray, experts: int, seed: int) -> np.ndarray:
    """int32 [V]: ids in descending order of their counts [V], each to the least loaded expert; ties in an order fixed by `seed`."""
    rng, counts = np.random.default_rng(seed), np.asarray(counts, np.float64)
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order], kind="stable")]
    table, heap = np.zeros(len(counts), np.int32), [(0.0, 0, e) for e in range(experts)]
    for token in order:
        load, ids, expert = heap[0]
        table[token] = expert
        heapq.heapreplace(heap, (load + counts[token], ids + 1, expert))
    return table
