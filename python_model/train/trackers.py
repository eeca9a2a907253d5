"""Where a run's figures go: always ``log.jsonl``, and any tracker with one method."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from python_model.support.resume import JsonLines
from python_model.train.config import TrainConfig


class Tracker(Protocol):
    """Takes one step's figures."""

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Take the figures of ``step`` (counted from 1)."""

    def close(self) -> None:
        """The run has ended."""


class StepLog:
    """``log.jsonl``: one object per step. Opening keeps the lines up to ``step`` and drops later (or half-written) ones."""

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
        self._writer = _need("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """wandb, and trackio, which has wandb's interface."""

    def __init__(self, package: str, config: TrainConfig) -> None:
        from dataclasses import asdict

        self._module = _need(package, package)
        self._module.init(project="grit_kernels", name=Path(config.output_dir).name, config=asdict(config))

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        self._module.log({name: value for name, value in figures.items() if value is not None}, step=step)

    def close(self) -> None:
        self._module.finish()


def open_trackers(config: TrainConfig) -> list[Tracker]:
    """The trackers a run asks for; ValueError names a package that is missing."""
    made: list[Tracker] = []
    for name in config.trackers:
        made.append(_TensorBoard(Path(config.output_dir)) if name == "tensorboard" else _Run(name, config))
    return made


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"trackers: {package!r} needs the package {package} (pip install {package})") from error
