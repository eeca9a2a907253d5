"""The tiny checkpoint behind a live server, and in engines that are stepped by hand on a clock of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from python_model import GritLM
from python_model.serve.engine import Engine, Event, Generation, TextWork
from tests.python_model.serve.server import Server, serving


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


@pytest.fixture(scope="module")
def server(served_model: GritLM) -> Iterator[Server]:
    from python_model.serve.service import Limits

    with serving(served_model, limits=Limits(body_bytes=4 << 20, texts=64)) as running:
        yield running


@pytest.fixture(scope="module")
def documents(served_model: GritLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An index of three documents, and the store of their states."""
    from python_model.rag.answer import RAG, open_store
    from python_model.rag.index import add_documents, open_index
    from python_model.rag.modes import Document

    folder = tmp_path_factory.mktemp("rag")
    texts = ["Paris is the capital of France. " * 3, "A river flows through the city. " * 3, "A word is short."]
    given = [Document(f"doc-{i}", text, f"Title {i}") for i, text in enumerate(texts)]
    index = open_index(str(folder / "index"), served_model)
    add_documents(index, served_model, given)
    RAG(served_model, store=open_store(str(folder / "store"), served_model)).add_to_store(given)
    return folder / "index", folder / "store"
