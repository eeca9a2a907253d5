"""Which rows a step takes: a function of (seed, step), so that resuming and worker processes need no state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class BatchOrder:
    """Batches without end: every row once per epoch, each epoch in another order; a batch may span two epochs.

    With ``same_dataset`` a batch holds rows of one data set; what is left of the data sets at the end of an epoch makes mixed
    batches. The order of the batches is shuffled too.

    Args:
        sizes: rows of each data set.
        batch_size: rows of a batch.
        seed: of the order.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int, *, same_dataset: bool = True) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, accepted is an int >= 1")
        if sum(sizes) == 0:
            raise ValueError("sizes: got no rows, accepted is at least one")
        self.sizes, self.batch_size, self.seed, self.same_dataset = list(sizes), batch_size, seed, same_dataset
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (data set, row in it) pairs of a step."""
        rows = int(self._starts[-1])
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = [int(self._order(int(place // rows))[place % rows]) for place in places]
        return [self._place(row) for row in chosen]

    def _place(self, row: int) -> tuple[int, int]:
        dataset = int(np.searchsorted(self._starts, row, side="right")) - 1
        return dataset, row - int(self._starts[dataset])

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._epoch = (epoch, self._shuffled(generator))
        return self._epoch[1]

    def _shuffled(self, generator: np.random.Generator) -> np.ndarray:
        total = int(self._starts[-1])
        if not self.same_dataset or len(self.sizes) == 1:
            return generator.permutation(total)
        whole, rest = [], []
        for start, size in zip(self._starts, self.sizes, strict=False):
            order = generator.permutation(size) + start
            cut = size - size % self.batch_size
            whole += list(order[:cut].reshape(-1, self.batch_size))
            rest.append(order[cut:])
        left = generator.permutation(np.concatenate(rest))
        full = len(left) - len(left) % self.batch_size
        whole += list(left[:full].reshape(-1, self.batch_size))
        batches = [whole[i] for i in generator.permutation(len(whole))]
        return np.concatenate([*batches, left[full:]]).astype(np.int64)
