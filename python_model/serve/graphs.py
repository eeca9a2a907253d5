"""Decoding steps on a GPU as CUDA graphs: all kernels of a step in one launch.

In a step in which every sample is one token, the kernels and their sizes depend on the number of samples only; the rest is
numbers that they read from memory. So such a step is captured once for each of a few numbers of rows, over buffers that stay,
and replayed from then on. Missing rows are filled up with rows without keys, which write to scratch and which nobody reads.

What the capture contains reads nothing back, and no size in it depends on data: the longest sequence is taken to be the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from python_model.support.arguments import check_at_least

if TYPE_CHECKING:
    from python_model.serve.step import Item, PackedStep

Recorder = Callable[[Callable[[], Tensor]], "tuple[Callable[[], None], Tensor]"]
"""Captures a function of no arguments: what replays it, and the tensor that every replay fills."""


class CudaRecorder:
    """Captures on the current device; all graphs share one pool of memory, since they never run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # kernels are compiled and loaded here, which a capture forbids
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = function()
        return graph.replay, output


@dataclass(frozen=True)
class _Graph:
    numbers: Tensor  # int64 (4, rows): token, position, first row of the sequence in layer 0, keys (0: a spare row)
    replay: Callable[[], None]
    states: Tensor  # (rows, hidden)


class DecodingGraphs:
    """The captured steps of one :class:`~python_model.serve.step.PackedStep`.

    Args:
        step: of a model without experts, whose sizes would depend on data (:attr:`PackedStep.can_be_captured`).
        most_rows: sequences that may decode at the same time.
        record: what captures; :class:`CudaRecorder` by default.
    """

    def __init__(self, step: PackedStep, most_rows: int, record: Recorder | None = None) -> None:
        check_at_least("most_rows", most_rows, 1)
        self.step = step
        record = record or CudaRecorder()
        # the largest first: the smaller ones find room in its memory
        sizes = [rows for rows in captured_rows(most_rows) if rows <= step.arena.scratch]
        self.graphs = {rows: self._captured(rows, record) for rows in reversed(sizes)}

    def takes(self, items: Sequence[Item]) -> bool:
        """Whether a step of these samples is a captured one."""
        return len(items) <= max(self.graphs, default=0) and all(
            len(item.ids) == 1 and item.causal and item.interval is not None and item.causal_prefix is None
            for item in items
        )

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """States after the last norm (B, hidden), valid until the next step."""
        rows = min(rows for rows in self.graphs if rows >= len(items))
        graph = self.graphs[rows]
        numbers = [
            (item.ids[0], item.past, item.interval.start, item.past + 1) for item in items if item.interval is not None
        ]
        numbers += [(0, 0, 0, 0)] * (rows - len(numbers))
        graph.numbers.copy_(torch.tensor(numbers).T)
        graph.replay()
        return graph.states[: len(items)]

    @torch.inference_mode()
    def _captured(self, rows: int, record: Recorder) -> _Graph:
        device = self.step.arena.keys.device
        numbers = torch.zeros(4, rows, dtype=torch.int64, device=device)
        causal = torch.ones(rows, dtype=torch.bool, device=device)
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device)
        replay, states = record(lambda: self.step.decode(numbers, causal, cu_seqlens))
        return _Graph(numbers, replay, states)


def captured_rows(most: int) -> list[int]:
    """1, 2, 4, then multiples of 8, up to the first that is not below ``most``."""
    small = [rows for rows in (1, 2, 4) if rows < most]
    return [*small, most] if most <= 4 else [*small, *range(8, most + 8, 8)]
