"""Which rows a step takes: a function of (seed, step), so that resuming and worker processes need no state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from python_model.support.arguments import check_at_least


def rank_share(count: int, rank: int, world: int) -> range:
    """The rows of a step that are this rank's: contiguous, as even as possible."""
    return range(count * rank // world, count * (rank + 1) // world)


class BatchOrder:
    """Batches without end, each a function of the seed and its number.

    An epoch takes ``rows_per_epoch[d]`` rows of data set d, by default all, in a new order. Each data set is walked through in
    shuffled passes: no row comes a second time before all others of its data set came once, whatever the rows per epoch.

    With ``same_dataset`` a batch holds rows of one data set; what is left of the data sets makes mixed batches. The last batch of
    an epoch, where it is not full, is completed by left-over rows of the next one. The order of the batches is shuffled too.

    Permutations sort raw Philox numbers, so they do not depend on the NumPy version.

    Args:
        sizes: rows of each data set.
        batch_size: rows of a batch.
        seed: of the order, >= 0.
        same_dataset: see above.
        rows_per_epoch: rows of each data set in an epoch; 0 leaves it out.

    Raises:
        ValueError: ``batch_size`` < 1, negative counts, rows wanted of an empty data set, or no rows at all.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        same_dataset: bool = True,
        rows_per_epoch: Sequence[int] | None = None,
    ) -> None:
        wanted = list(sizes if rows_per_epoch is None else rows_per_epoch)
        check_at_least("batch_size", batch_size, 1)
        check_at_least("seed", seed, 0)
        if len(wanted) != len(sizes) or any(n < 0 or (n and not size) for n, size in zip(wanted, sizes, strict=False)):
            raise ValueError(f"rows_per_epoch: expected an int >= 0 for each of the sizes {list(sizes)}, got {wanted}")
        if sum(wanted) == 0:
            raise ValueError("sizes: expected at least one, got no rows")
        self.sizes, self.wanted = list(sizes), wanted
        self.batch_size, self.seed, self.same_dataset = batch_size, seed, same_dataset
        self.rows = sum(wanted)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (data set, row in it) pairs of a step."""
        first = step * self.batch_size
        chosen: list[int] = []
        while len(chosen) < self.batch_size:
            epoch, place = divmod(first + len(chosen), self.rows)
            chosen += self._order(epoch)[place : place + self.batch_size - len(chosen)].tolist()
        datasets = np.searchsorted(self._starts, chosen, side="right") - 1
        return [(int(d), row - int(self._starts[d])) for d, row in zip(datasets, chosen, strict=True)]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}

    def _order(self, epoch: int) -> np.ndarray:
        """All rows of an epoch, numbered over the data sets, in the order they are taken."""
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if abs(e - epoch) <= 1}
            self._epochs[epoch] = self._shuffled(epoch)
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        size = self.batch_size
        rows = [self._taken(dataset, epoch) for dataset in range(len(self.sizes))]
        if not self.same_dataset or len(rows) == 1:
            order = np.concatenate(rows)
            return order[permutation(len(order), self.seed, 0, epoch)]
        # the epoch starts inside of a batch if those before it did not fill their last one
        head = min(-epoch * self.rows % size, self.rows)
        tail = (self.rows - head) % size
        whole = np.concatenate([taken[: len(taken) - len(taken) % size].reshape(-1, size) for taken in rows])
        rest = np.concatenate([taken[len(taken) - len(taken) % size :] for taken in rows])
        whole = whole[permutation(len(whole), self.seed, 1, epoch)]
        if len(rest) < head + tail:  # they differ by one batch
            whole, rest = whole[1:], np.concatenate([rest, whole[0]])
        rest = rest[permutation(len(rest), self.seed, 2, epoch)]
        mixed = rest[head : len(rest) - tail].reshape(-1, size)
        batches = np.concatenate([whole, mixed])
        batches = batches[permutation(len(batches), self.seed, 3, epoch)]
        return np.concatenate([rest[:head], batches.reshape(-1), rest[len(rest) - tail :]])

    def _taken(self, dataset: int, epoch: int) -> np.ndarray:
        """The rows an epoch takes of a data set: the next ones of its shuffled passes."""
        size, wanted = self.sizes[dataset], self.wanted[dataset]
        parts = [np.empty(0, dtype=np.int64)]
        place, end = epoch * wanted, (epoch + 1) * wanted
        while place < end:
            number, start = divmod(place, size)
            order = permutation(size, self.seed, 4 + dataset, number)
            parts.append(order[start : start + end - place])
            place += len(parts[-1])
        return np.concatenate(parts) + self._starts[dataset]


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of ``count`` rows that is a function of ``key``."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")
