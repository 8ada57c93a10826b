"""What a sparse matrix tokens x experts says, as pure functions of NumPy arrays.

`chosen` is bool [T, N], the sets of experts of T tokens over N = E + V columns. Where a token has several experts an
*assignment* is one of its pairs with an expert, and all shares are shares of assignments. Information is in bits.
"""

from typing import NamedTuple

import numpy as np


def contingency(labels: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the P labels that occur, ascending; int64 [P, N], how many assignments of each go to each expert).

    Args:
      labels: int [T], such as token ids.
      chosen: bool [T, N].
    """
    names, starts = np.unique(np.sort(labels), return_index=True)
    if not len(names):
        return names, np.zeros((0, chosen.shape[1]), np.int64)
    order = np.argsort(labels, kind="stable")
    return names, np.add.reduceat(chosen[order], starts, axis=0, dtype=np.int64)


def entropy(counts: np.ndarray) -> float:
    """Bits, of the distribution with these counts; 0 without any."""
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-np.sum(p * np.log2(p)))


def mutual_information(counts: np.ndarray) -> float:
    """Bits that the rows of counts [P, N] tell of the columns, as the counts stand: with few counts a row it is too high."""
    rows, columns = entropy(counts.sum(axis=1)), entropy(counts.sum(axis=0))
    return max(rows + columns - entropy(counts), 0.0)


class Information(NamedTuple):
    """What a label of a token, such as its piece or source, tells of its expert.

    bits: the mutual information of label and expert over the assignments. chance: the same with the labels dealt out anew
    among the tokens, which is what so few tokens would show by chance. entropy: of the expert. ceiling: what a label would tell
    that determines each token's set; `entropy` where every token has one expert. share: (bits - chance) / (ceiling - chance),
    0 for labels that say nothing, 1 for labels that say all; NaN where chance reaches the ceiling.
    """

    bits: float
    chance: float
    entropy: float
    ceiling: float
    share: float


def information(labels: np.ndarray, chosen: np.ndarray, *, repeats: int = 3, seed: int = 0) -> Information:
    """`Information` of labels [T] about chosen [T, N].

    Args:
      labels, chosen: as in `contingency`.
      repeats: shuffles whose mean is `chance`.
      seed: of the shuffles.
    """
    rng = np.random.default_rng(seed)
    bits = mutual_information(contingency(labels, chosen)[1])
    shuffled = [mutual_information(contingency(rng.permutation(labels), chosen)[1]) for _ in range(repeats)]
    chance, sizes = float(np.mean(shuffled)), chosen.sum(axis=1)
    total = entropy(chosen.sum(axis=0))
    # One of a token's k experts, drawn, keeps log2 k bits of its own.
    within = np.sum(sizes * np.log2(np.maximum(sizes, 1))) / max(sizes.sum(), 1)
    ceiling = max(total - float(within), 0.0)
    room = ceiling - chance
    share = (bits - chance) / room if room > 1e-9 else float("nan")
    return Information(bits, chance, total, ceiling, share)


def lift(counts: np.ndarray, prior: float = 0.0) -> np.ndarray:
    """[P, N]: the share of a row's assignments that go to a column, over that column's share of all; 0 where there are none.

    With `prior`, as many assignments in the proportions of all are added to each row first, which draws rare rows to 1.
    """
    share = counts.sum(axis=0) / max(counts.sum(), 1)
    rows = counts.sum(axis=1, keepdims=True) + prior
    expected = rows * share
    return np.divide(counts + prior * share, expected, out=np.zeros(counts.shape), where=expected > 0)


def most_specific(counts: np.ndarray, limit: int, *, minimum: int = 5, prior: float = 10.0) -> list[list[int]]:
    """For each of the N columns the rows that belong to it most: by `lift` with `prior`, above 1, at most `limit`.

    Rows with fewer than `minimum` assignments to the column are left out; of equal ones the more frequent comes first.
    """
    score = np.where(counts >= minimum, lift(counts, prior), 0.0)
    best = []
    for column in range(counts.shape[1]):
        rows = np.flatnonzero(score[:, column] > 1)
        order = np.lexsort((rows, -counts[rows, column], -score[rows, column]))
        best.append(rows[order[:limit]].tolist())
    return best


def co_activation(chosen: np.ndarray) -> np.ndarray:
    """int64 [N, N]: tokens that have both experts; on the diagonal, the expert."""
    pairs = np.zeros((chosen.shape[1],) * 2, np.int64)
    for start in range(0, len(chosen), 2**20):  # float32 holds such counts exactly
        wide = chosen[start : start + 2**20].astype(np.float32)
        pairs += (wide.T @ wide).astype(np.int64)
    return pairs


def independent_pairs(pairs: np.ndarray, rounds: int = 500) -> np.ndarray:
    """float64 [N, N]: the pairs of different experts if partners were drawn independently, with each expert's number of pairs.

    That is w_i w_j off the diagonal (quasi-independence), fitted by iteration; w_i w_j with shares as w would count pairs of
    an expert with itself.

    Args:
      pairs: [N, N], symmetric; the diagonal does not count.
    """
    off = pairs.astype(np.float64)
    np.fill_diagonal(off, 0)
    wanted = off.sum(axis=1)
    w = np.sqrt(wanted)
    for _ in range(rounds):
        partners = w.sum() - w
        goal = np.divide(wanted, partners, out=np.zeros_like(w), where=partners > 0)
        w = np.sqrt(w * goal)
    expected = np.outer(w, w)
    np.fill_diagonal(expected, 0)
    return expected


def pair_lift(pairs: np.ndarray) -> np.ndarray:
    """[N, N]: the pairs over `independent_pairs`; NaN on the diagonal and where none are expected."""
    expected = independent_pairs(pairs)
    return np.divide(pairs, expected, out=np.full(pairs.shape, np.nan), where=expected > 1e-9)


class Churn(NamedTuple):
    """How the choices of the same tokens differ between two checkpoints.

    sets, first: shares of the tokens whose set of experts, whose first expert changed. first_by_chance: the latter if the
    second checkpoint's first experts were dealt out anew among the tokens.
    """

    sets: float
    first: float
    first_by_chance: float


def churn(chosen: np.ndarray, first: np.ndarray, old_chosen: np.ndarray, old_first: np.ndarray) -> Churn:
    """`Churn` of two checkpoints.

    Args:
      chosen, old_chosen: bool [T, N].
      first, old_first: int [T], each token's expert with the largest gate; -1: none.
    """
    tokens = max(len(first), 1)
    experts = chosen.shape[1] + 1
    p, q = (np.bincount(f + 1, minlength=experts) / tokens for f in (first, old_first))
    return Churn(
        float(np.any(chosen != old_chosen, axis=1).sum() / tokens),
        float((first != old_first).sum() / tokens),
        float(1 - p @ q) if len(first) else 0.0,
    )


def changed_labels(
    labels: np.ndarray, changed: np.ndarray, limit: int, *, minimum: int = 5, prior: float = 10.0
) -> list[tuple[int, int, int]]:
    """The labels whose tokens changed most: (label, tokens that changed, tokens), at most `limit`.

    By the share that changed, with `prior` tokens of the overall share added; labels of fewer than `minimum` tokens are left
    out.

    Args:
      labels: int [T].
      changed: bool [T].
    """
    names, counts = contingency(labels, np.stack([changed, ~changed], axis=1))
    total = counts.sum(axis=1)
    score = (counts[:, 0] + prior * changed.mean() if len(changed) else counts[:, 0]) / (total + prior)
    rows = np.flatnonzero((total >= minimum) & (counts[:, 0] > 0))
    order = rows[np.lexsort((rows, -counts[rows, 0], -score[rows]))][:limit]
    return [(int(names[r]), int(counts[r, 0]), int(total[r])) for r in order]
