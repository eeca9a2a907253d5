"""Engines over the tiny checkpoint, stepped by hand and on a clock of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from python_model import GritLM
from python_model.serve.engine import Engine, Event, Generation, TextWork


class SteppedEngine(Engine):
    """No thread: a test calls ``step()``. Keeps the logits that each token was chosen from."""

    def __init__(self, model: GritLM, **options: Any) -> None:
        self.now = 0.0
        self.logits: dict[int, list[Tensor]] = {}
        super().__init__(model, clock=lambda: self.now, **options)
        for memory in (self.arena.keys, self.arena.values):
            memory.fill_(float("nan"))  # rows that no sequence has written are never read

    def _next_token(self, work: Generation, logits: Tensor) -> Any:
        self.logits.setdefault(id(work), []).append(logits.float().clone())
        return super()._next_token(work, logits)

    def run(self, limit: int = 10_000) -> None:
        """Steps until nothing is left."""
        for _ in range(limit):
            if not self.step():
                break
            self.now += 0.05
        assert self.scheduler.idle, "work is left"


def collect(work: TextWork | Generation) -> list[Event]:
    """The list that will hold the events of ``work``."""
    events: list[Event] = []
    work.sink = events.append
    return events


@pytest.fixture(scope="session")
def served_model(checkpoint: Path) -> GritLM:
    """The tiny Mistral in float32."""
    return GritLM(checkpoint, dtype=torch.float32)
