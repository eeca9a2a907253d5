"""Logging of a run's figures: always to ``log.jsonl``, and to any trackers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from python_model.support.optional import require
from python_model.support.resume import JsonLines


class Tracker(Protocol):
    """Receives the figures of each step."""

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Record the figures of ``step`` (counted from 1)."""

    def close(self) -> None:
        """Called at the end of the run."""


class StepLog:
    """``log.jsonl``: one object per step. Opening it keeps the lines up to ``step`` and drops later or half-written ones."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self._lines = JsonLines(path, lambda record: bool(record["step"] <= step))

    @property
    def records(self) -> list[dict[str, Any]]:
        """The steps so far."""
        return self._lines.rows

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Append a line; when this returns it is in the file."""
        self._lines.append({"step": step, **figures})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        require("tensorboard")  # torch's own error would not say how to install it
        self._writer = require("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """wandb, or trackio, which has the same interface."""

    def __init__(self, package: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self._module = require(package)
        # wandb would write its files below the current folder; trackio has one place for all runs
        where = {"dir": str(folder.resolve())} if package == "wandb" and "WANDB_DIR" not in os.environ else {}
        self._module.init(project="grit_kernels", name=folder.name, config=dict(settings), **where)

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        self._module.log({name: value for name, value in figures.items() if value is not None}, step=step)

    def close(self) -> None:
        self._module.finish()


def open_trackers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run with these settings and this output folder; an ImportError names a missing package."""
    return [_TensorBoard(folder) if name == "tensorboard" else _Run(name, folder, settings) for name in names]
