"""Which rows a step uses: a function of (seed, step), so that resuming and worker processes need no state.

Nothing as long as the data is ever built: an order of millions of rows is computed on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from python_model.support.arguments import check_at_least


def rank_share(count: int, rank: int, world: int) -> range:
    """This rank's rows of a step: contiguous, and split as evenly as possible."""
    return range(count * rank // world, count * (rank + 1) // world)


class BatchOrder:
    """An endless sequence of batches, each a function of the seed and its number.

    An epoch takes ``rows_per_epoch[d]`` rows of data set d, by default all, in a new order. Each data set is traversed in
    shuffled passes: no row is repeated before all others of its data set have been used, whatever the rows per epoch.

    With ``same_dataset`` a batch holds rows of one data set; the remainders of the data sets form mixed batches. The last batch
    of an epoch, if it is not full, is completed with remaining rows of the next one. The order of the batches is shuffled too.

    The order does not depend on the machine or the NumPy version (see :class:`Permutation`).

    Args:
        sizes: number of rows of each data set.
        batch_size: number of rows in a batch.
        seed: seed of the order, >= 0.
        same_dataset: see above.
        rows_per_epoch: rows of each data set in an epoch; 0 excludes it.

    Raises:
        ValueError: ``batch_size`` < 1, negative counts, rows requested from an empty data set, or no rows at all.
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
        self._epochs: dict[int, _Epoch] = {}
        self._passes: dict[tuple[int, int], Permutation] = {}

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (data set, row within it) pairs of a step."""
        first = step * self.batch_size
        chosen: list[int] = []
        while len(chosen) < self.batch_size:
            epoch, place = divmod(first + len(chosen), self.rows)
            stop = min(place + self.batch_size - len(chosen), self.rows)
            chosen += self._epoch(epoch).rows(np.arange(place, stop)).tolist()
        datasets = np.searchsorted(self._starts, chosen, side="right") - 1
        return [(int(d), row - int(self._starts[d])) for d, row in zip(datasets, chosen, strict=True)]

    def taken(self, dataset: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Rows, numbered across the data sets, at ``places`` of an epoch's share of a data set: the next ones of its shuffled
        passes."""
        size = self.sizes[dataset]
        numbers, starts = np.divmod(places + epoch * self.wanted[dataset], size)
        rows = np.empty(len(places), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            rows[numbers == number] = self._pass(dataset, number)(starts[numbers == number])
        return rows + self._starts[dataset]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}, "_passes": {}}

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if abs(e - epoch) <= 1}
            self._passes = {}
            self._epochs[epoch] = _Epoch(self, epoch)
        return self._epochs[epoch]

    def _pass(self, dataset: int, number: int) -> Permutation:
        key = (dataset, number)
        if key not in self._passes:
            self._passes[key] = Permutation(self.sizes[dataset], self.seed, 4 + dataset, number)
        return self._passes[key]


class _Epoch:
    """The order of one epoch: maps places 0 to ``order.rows - 1`` to rows, numbered across the data sets."""

    def __init__(self, order: BatchOrder, epoch: int) -> None:
        self.order, self.epoch = order, epoch
        wanted, size = np.array(order.wanted), order.batch_size
        self.mixed_only = not order.same_dataset or len(order.sizes) == 1
        if self.mixed_only:
            self._ends = np.cumsum(wanted)
            self._shuffled = Permutation(order.rows, order.seed, 0, epoch)
            return
        # the epoch starts within a batch if the previous one did not fill its last batch
        self.head = min(-epoch * order.rows % size, order.rows)
        self.tail = (order.rows - self.head) % size
        self._ends = np.cumsum(wanted // size)  # of each data set's whole batches
        self._whole = Permutation(int(self._ends[-1]), order.seed, 1, epoch)
        left = [order.taken(d, epoch, np.arange(n - n % size, n)) for d, n in enumerate(order.wanted)]
        rest = np.concatenate(left)
        self._broken = int(len(rest) < self.head + self.tail)  # they differ by at most one batch
        if self._broken:
            rest = np.concatenate([rest, self._rows_of_whole(np.zeros(size, dtype=np.int64), np.arange(size))])
        self.rest = rest[permutation(len(rest), order.seed, 2, epoch)]
        self.mixed = self.rest[self.head : len(rest) - self.tail].reshape(-1, size)
        self.whole = int(self._ends[-1]) - self._broken
        self._batches = Permutation(self.whole + len(self.mixed), order.seed, 3, epoch)

    def rows(self, places: np.ndarray) -> np.ndarray:
        """The rows at ``places``."""
        if self.mixed_only:
            return self._rows_of_all(self._shuffled(places))
        size, rows = self.order.batch_size, np.empty(len(places), dtype=np.int64)
        end = self.order.rows - self.tail
        first, last = places < self.head, places >= end
        rows[first] = self.rest[places[first]]
        rows[last] = self.rest[places[last] - end + len(self.rest) - self.tail]
        within = ~(first | last)
        batch, place = np.divmod(places[within] - self.head, size)
        batch = self._batches(batch)
        found = np.empty(len(batch), dtype=np.int64)
        mixed = batch >= self.whole
        found[mixed] = self.mixed[batch[mixed] - self.whole, place[mixed]]
        found[~mixed] = self._rows_of_whole(batch[~mixed] + self._broken, place[~mixed])
        rows[within] = found
        return rows

    def _rows_of_whole(self, batches: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Rows at ``places`` within the whole batches, in their shuffled order."""
        number = self._whole(batches)
        return self._by_data_set(number, lambda inside, chosen: inside * self.order.batch_size + places[chosen])

    def _rows_of_all(self, numbers: np.ndarray) -> np.ndarray:
        return self._by_data_set(numbers, lambda inside, chosen: inside)

    def _by_data_set(self, numbers: np.ndarray, place: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Rows from numbers that count across the data sets (``_ends``)."""
        datasets = np.searchsorted(self._ends, numbers, side="right")
        rows = np.empty(len(numbers), dtype=np.int64)
        for dataset in np.unique(datasets).tolist():
            chosen = datasets == dataset
            inside = numbers[chosen] - (self._ends[dataset - 1] if dataset else 0)
            rows[chosen] = self.order.taken(dataset, self.epoch, place(inside, chosen))
        return rows


class Permutation:
    """A permutation of ``count`` numbers that is a function of ``key``, computed on demand.

    Up to ``SORTED`` numbers it is an array (:func:`permutation`). Beyond that, a number passes through a Feistel network over the
    next power of four repeatedly until it is below ``count``: a bijection that takes no memory.
    """

    SORTED = 1 << 22
    ROUNDS = 6

    def __init__(self, count: int, *key: int) -> None:
        self.count = count
        self._array = permutation(count, *key) if count <= self.SORTED else None
        self._bits = np.uint64(max((max(count - 1, 0).bit_length() + 1) // 2, 1))
        self._keys = np.random.Philox(np.random.SeedSequence(key)).random_raw(self.ROUNDS)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """The images of ``numbers``."""
        if self._array is not None:
            return self._array[numbers]
        found = self._network(numbers.astype(np.uint64))
        while (outside := found >= self.count).any():
            found[outside] = self._network(found[outside])
        return found.astype(np.int64)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self._bits) - np.uint64(1)
        left, right = numbers >> self._bits, numbers & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << self._bits) | right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every bit depends on every bit."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of ``count`` rows that is a function of ``key``: raw Philox numbers, sorted."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count), kind="stable")
