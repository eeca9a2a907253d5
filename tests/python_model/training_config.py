"""Configurations of training tests, by the bare names of their fields."""

from __future__ import annotations

from typing import Any

from python_model.train.config import MOVED, TrainConfig


def make_config(**changes: Any) -> TrainConfig:
    """A run with these fields, whatever group they stand in; ``model`` and ``parallel`` are the model's name and the strategy."""
    return TrainConfig.from_dict({MOVED.get(name, name): value for name, value in changes.items()})
