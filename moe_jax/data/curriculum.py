"""The order of the rows of an epoch by how many experts their tokens took in the one before (arXiv:2310.07188, section 3.2).

Rows that need alike come together, so that the shards of a batch have alike much to do.
"""

from typing import Any

import grain
import numpy as np

from moe_jax.config import ConfigError
from moe_jax.data.hashing import hash64

# Batches between what an order is made of and its first batch: those that are read ahead or in progress meanwhile.
MARGIN = 8


class RandomOrder:
    """Which row of which source stands where in the training stream: every pass over a source has an order of its own,
    sources take turns in proportion to their weights.

    Args:
      lengths: rows of each source.
      weights: of each source.
      seed: of the orders.
    """

    def __init__(self, lengths: list[int], weights: list[float], seed: int):
        self.lengths = lengths
        self._orders = [
            grain.MapDataset.range(length).shuffle(hash64(f"{seed}/{i}") % 2**32).repeat() for i, length in enumerate(lengths)
        ]
        numbers = [grain.MapDataset.range(len(order)).map(lambda n, i=i: (i, n)) for i, order in enumerate(self._orders)]
        self._turns = None if len(numbers) == 1 else grain.MapDataset.mix(numbers, weights)

    def turn(self, position: int) -> tuple[int, int]:
        """(source, which of the examples drawn from it) at a position of the stream."""
        return (0, position) if self._turns is None else self._turns[position]

    def row(self, source: int, number: int) -> int:
        """The row of that source that is drawn as its `number`-th."""
        return int(self._orders[source][number])

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, row) at a position of the stream."""
        source, number = self.turn(position)
        return source, self.row(source, number)


class Curriculum(RandomOrder):
    """`RandomOrder` in the first epoch of a source; later ones go by how many experts their rows took before, fewest first.

    "mean" orders by the mean number of experts of a row's tokens over the layers; "cosine", the paper's rule, by the cosine of
    the row's numbers above 1, a vector over layers, with those of the row that has fewest. The order is cut into buckets, and
    random inside each. A row that is not known yet stands at random.

    An epoch is ordered by the rows of batches up to `MARGIN` before its first one: the order does not depend on how far the
    reader is ahead. All processes report the same shares and make the same orders.

    Args:
      lengths, weights, seed: see `RandomOrder`.
      batch_size: rows B of a global batch.
      layers: L, of those that decide how many experts run.
      rule: "mean" or "cosine".
      buckets: how many.

    Raises:
      ConfigError: a source has too few rows for an order to be ready in time.
    """

    def __init__(
        self, lengths: list[int], weights: list[float], seed: int, batch_size: int, layers: int, rule: str, buckets: int
    ):
        super().__init__(lengths, weights, seed)
        if min(lengths) < (least := (MARGIN + 2) * batch_size):
            limit = f"a source has {min(lengths)} rows, and an order is made {MARGIN} batches ahead, of {least} rows at least"
            raise ConfigError("data.curriculum", rule, limit, "lower data.batch_size, use more text, or none")
        self.batch_size, self._seed, self._rule, self._buckets = batch_size, seed, rule, buckets
        self._starts = np.cumsum([0, *lengths])
        self.shares = np.full((self._starts[-1], layers), np.nan, np.float32)
        self.epochs = np.full((len(lengths), 2), -1, np.int32)
        self.order = np.zeros((2, self._starts[-1]), np.int32)
        self.reported = 0

    def row(self, source: int, number: int) -> int:
        """See `RandomOrder.row`.

        Raises:
          RuntimeError: the row is further ahead of the reported batches than any reader may be.
        """
        epoch, number = divmod(number, self.lengths[source])
        if epoch == 0:
            return super().row(source, number)
        if self.epochs[source, epoch % 2] != epoch:
            raise RuntimeError(f"epoch {epoch} of source {source} has no order after {self.reported} reported batches")
        return int(self._of(self.order[epoch % 2], source)[number])

    def report(self, batch: int, shares: np.ndarray) -> None:
        """Takes how many experts the tokens of each row of a batch took, float [B, L]; batches come one after the other.

        Raises:
          ValueError: this is not the next batch, or a layer that decides how many experts run has no shares.
        """
        if batch != self.reported:
            raise ValueError(f"batch {batch} is reported after {self.reported} batches")
        if np.shape(shares) != (wanted := (self.batch_size, self.shares.shape[1])):
            raise ValueError(f"shares {list(np.shape(shares))}: {list(wanted)} are wanted, of every layer that decides")
        for row, share in enumerate(shares):
            source, of_source = self[batch * self.batch_size + row]
            self._of(self.shares, source)[of_source] = share
        self.reported += 1
        ahead = batch + 1 + MARGIN
        for row in range(self.batch_size):
            source, number = self.turn(ahead * self.batch_size + row)
            epoch, place = divmod(number, self.lengths[source])
            if epoch and place < self.batch_size and self.epochs[source, epoch % 2] != epoch:
                self._of(self.order[epoch % 2], source)[:] = self._ordered(source, epoch)
                self.epochs[source, epoch % 2] = epoch

    def _of(self, array, source):
        return array[self._starts[source] : self._starts[source + 1]]

    def _ordered(self, source: int, epoch: int) -> np.ndarray:
        random = np.random.default_rng(hash64(f"{self._seed}/curriculum/{source}/{epoch}"))
        keys = order_keys(self._of(self.shares, source), self._rule)
        known = np.flatnonzero(~np.isnan(keys))
        if len(known):
            unknown = np.isnan(keys)
            keys[unknown] = keys[random.choice(known, unknown.sum())]
        order = random.permutation(len(keys))
        order = order[np.argsort(keys[order], kind="stable")]  # equal ones at random
        return np.concatenate([random.permutation(bucket) for bucket in np.array_split(order, self._buckets)])

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of what a checkpoint keeps, after the batches reported so far."""
        return {"shares": self.shares.copy(), "order": self.order.copy(), "epochs": self.epochs.copy()}

    def load(self, arrays: dict[str, Any], batches: int) -> None:
        """Goes on from `arrays` of a checkpoint, after that many batches."""
        self.shares, self.order, self.epochs = (np.array(arrays[name]) for name in ("shares", "order", "epochs"))
        self.reported = batches


def order_keys(shares: np.ndarray, rule: str) -> np.ndarray:
    """float [N]: what rows are ordered by, the least first; NaN: not known.

    Args:
      shares: [N, L], experts per token of each row and layer; NaN: not known.
      rule: "mean": their mean over layers. "cosine": minus the cosine of a row's numbers above 1, a vector over layers, with
        those of the row that has fewest; rows without any come first.
    """
    mean = np.mean(shares, axis=1)
    if rule == "mean" or np.all(np.isnan(mean)):
        return mean
    above = np.maximum(shares - 1, 0)
    norms = np.linalg.norm(above, axis=1)
    # A row of zeros has no direction, and is the paper's anchor all the same: the nearest row that has one stands for it.
    anchor = above[np.nanargmin(np.where(norms > 0, mean, np.nan))] if np.nanmax(norms) > 0 else np.ones(shares.shape[1])
    length = np.maximum(norms * np.linalg.norm(anchor), 1e-12)
    return np.where(np.isnan(mean), np.nan, np.where(norms == 0, -2.0, -(above @ anchor) / length))
