"""The keys and values of all running sequences, in one memory of fixed size.

A sequence owns an interval of rows, the same one in every layer, from the moment it is accepted until it ends: room for its
prompt and its longest possible reply, so memory never runs out midway. When no single gap is large enough but all gaps together
are, the intervals are moved to the front (:meth:`Arena.compact`): no row is wasted, and a kernel reads each sequence as one run.

    rows of layer 0 | rows of layer 1 | .. | scratch

Texts that are read whole in one step (to embed, or to score) need no memory beyond it and none per layer: they use the scratch
rows, which every layer overwrites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from python_model.support.arguments import check_at_least

if TYPE_CHECKING:
    from python_model.generate.states import TextStates


@dataclass(eq=False)
class Interval:
    """``rows`` rows beginning at ``start``, of which the first ``filled`` hold states. :meth:`Arena.compact` may change
    ``start``.
    """

    start: int
    rows: int
    filled: int = 0


class Arena:
    """Keys and values (layers * rows + scratch, kv_heads, head_dim); see the top of the file.

    ``memory_dim``: the last dimension in memory where it is larger than ``head_dim``; states are stored with zeros behind them.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        rows: int,
        scratch: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory_dim: int | None = None,
    ) -> None:
        check_at_least("rows", rows, 1)
        check_at_least("scratch", scratch, 1)
        if layers * rows + scratch >= 2**31:
            raise ValueError(f"rows: expected layers * rows + scratch below 2**31, got {layers} * {rows} + {scratch}")
        self.layers, self.rows, self.scratch, self.head_dim = layers, rows, scratch, head_dim
        shape = (layers * rows + scratch, kv_heads, memory_dim or head_dim)
        # empty: a CPU's operating system allocates pages only when they are first written; uninitialised rows are never read
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.intervals: list[Interval] = []  # in row order

    @property
    def used(self) -> int:
        """Rows owned by intervals."""
        return sum(interval.rows for interval in self.intervals)

    @property
    def scratch_start(self) -> int:
        """First scratch row, the same in all layers."""
        return self.layers * self.rows

    def allocate(self, rows: int) -> Interval | None:
        """An interval in the first gap that is large enough (after compacting, if necessary); None if too few rows are free."""
        check_at_least("rows", rows, 1)
        if rows > self.rows - self.used:
            return None
        found = self._place(rows)
        if found is None:
            self.compact()
            found = self._place(rows)
        assert found is not None
        place, start = found
        interval = Interval(start, rows)
        self.intervals.insert(place, interval)
        return interval

    def free(self, interval: Interval) -> None:
        """Release an interval; ValueError if it does not belong to this arena, for instance because it was released before."""
        self.intervals.remove(interval)

    def compact(self) -> None:
        """Move all intervals to the front, keeping their order."""
        place = 0
        for interval in self.intervals:
            if interval.start != place:
                self._copy(interval.start, place, interval.filled)
                interval.start = place
            place += interval.rows

    def share(self, source: Interval, target: Interval, rows: int) -> None:
        """Copy the first ``rows`` states of one sequence to another that begins with the same tokens."""
        if rows > min(source.filled, target.rows):
            raise ValueError(f"rows: expected at most {min(source.filled, target.rows)}, got {rows}")
        self._copy(source.start, target.start, rows)
        target.filled = rows

    def write(self, target: Interval, states: TextStates) -> None:
        """Fill the beginning of an interval with states that were computed elsewhere."""
        rows = len(states)
        geometry = (self.layers, self.keys.shape[1], self.head_dim)
        if rows > target.rows or states.geometry != geometry:
            raise ValueError(
                f"states: expected at most {target.rows} tokens of (layers, kv_heads, head_dim) = "
                f"{geometry}, got {rows} of {states.geometry}"
            )
        for index, memory in enumerate((self.keys, self.values)):
            rows_of_layers = self._per_layer(memory)[:, target.start : target.start + rows]
            rows_of_layers[..., self.head_dim :].zero_()
            new = states.keys_values[:, index].transpose(1, 2)  # (layers, tokens, heads, dim)
            rows_of_layers[..., : self.head_dim].copy_(new)
        target.filled = rows

    def _place(self, rows: int) -> tuple[int, int] | None:
        """Index in the list and first row of the first gap of at least ``rows`` rows."""
        end = 0
        for index, interval in enumerate(self.intervals):
            if interval.start - end >= rows:
                return index, end
            end = interval.start + interval.rows
        return (len(self.intervals), end) if self.rows - end >= rows else None

    def _per_layer(self, memory: Tensor) -> Tensor:
        return memory[: self.scratch_start].unflatten(0, (self.layers, self.rows))

    def _copy(self, source: int, target: int, rows: int) -> None:
        for memory in (self.keys, self.values):
            for layer in self._per_layer(memory):
                # the two may overlap
                layer[target : target + rows] = layer[source : source + rows].clone()
