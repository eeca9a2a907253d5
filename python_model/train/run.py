"""Runs training from settings: trains, saves and plots; or only estimates the memory of a run."""

from __future__ import annotations

import os
from pathlib import Path

from python_model.data.config import BatchConfig, DataConfig
from python_model.model.hub import check_credentials, push_to_hub
from python_model.train.config import Mode, ModelConfig, OptimizerKind, ParallelConfig, TrainConfig
from python_model.train.distributed import ranks
from python_model.train.memory import plan_tokens
from python_model.train.plot import plot_losses
from python_model.train.setup import plan_dry_run
from python_model.train.trainer import Trainer


def run(config: TrainConfig) -> Path:
    """Train (or resume an interrupted run) and save; returns the checkpoint's folder."""
    with ranks() as here:
        if config.push_to_hub and here.first:
            check_credentials("push_to_hub")  # now, rather than after the training
        # no name holds the trainer: model and shards are freed before the process group
        return _finish(Trainer.from_config(config, here))


def _finish(trainer: Trainer) -> Path:
    records = trainer.train()
    checkpoint = trainer.save()
    if trainer.ranks.first:  # last, so that a failure here costs no weights
        plot_losses(records, trainer.folder / "loss.png")
        if trainer.config.push_to_hub:
            print(f"uploaded to {push_to_hub(checkpoint, trainer.config.push_to_hub)}")
    return checkpoint


def dry_run(
    model: ModelConfig,
    parallel: ParallelConfig,
    data: DataConfig,
    batch: BatchConfig,
    *,
    mode: Mode = "unified",
    projection: int | None = None,
    optimizer: OptimizerKind = "adamw",
) -> str:
    """Memory per rank and tokens per step for WORLD_SIZE ranks, without weights or data."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    tokens = plan_tokens(mode, data, batch, world)
    plan, limit = plan_dry_run(model, parallel, tokens, world, mode=mode, projection=projection, optimizer=optimizer)
    return "\n".join(plan.lines(limit))
