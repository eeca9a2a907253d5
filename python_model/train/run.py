"""Runs training from settings: model, data and trainer of each rank; or only estimates its memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from python_model.train.config import TrainConfig

if TYPE_CHECKING:
    from python_model.train.distributed import Ranks


def run(config: TrainConfig) -> Path:
    """Train (or resume an interrupted run) and save; returns the checkpoint's folder."""
    from python_model.train.distributed import ranks

    with ranks() as here:
        return _run_rank(config, here)


def _run_rank(config: TrainConfig, here: Ranks) -> Path:
    """A separate function, so that model and shards are freed before the process group."""
    from python_model.data.stream import check_data, open_stream
    from python_model.train.plot import plot_losses
    from python_model.train.setup import load_model
    from python_model.train.trainer import Trainer

    in_batch_negatives = config.losses.in_batch_negatives
    teacher = config.losses.distillation_weight > 0
    # before minutes are spent on loading a model
    check_data(config.data, config.mode, in_batch_negatives=in_batch_negatives, teacher=teacher)
    # with FSDP only rank 0 reads the weights; the others get their shards from it
    sharded = here.group is not None and config.parallel.strategy == "fsdp"
    model = load_model(
        config.model,
        here.device,
        mode=config.mode,
        settings=config.settings_given,
        seed=config.seed,
        weights=here.first or not sharded,
    )
    stream = open_stream(
        config.data,
        config.batch,
        model.tokenizer,
        settings=model.settings,
        mode=config.mode,
        in_batch_negatives=in_batch_negatives,
        teacher=teacher,
        seed=config.seed,
        rank=here.rank,
        world=here.world,
    )
    trainer = Trainer(model, config, stream, here)
    records = trainer.train()
    checkpoint = trainer.save()
    if here.first:  # last, so that a failure here costs no weights
        plot_losses(records, Path(config.output_dir) / "loss.png")
        if config.push_to_hub:
            from python_model.model.hub import push_to_hub

            print(f"uploaded to {push_to_hub(checkpoint, config.push_to_hub)}")
    return checkpoint


def dry_run(config: TrainConfig) -> str:
    """Memory per rank and tokens per step for WORLD_SIZE ranks, without weights or data."""
    from python_model.train.memory import plan_tokens
    from python_model.train.setup import plan_dry_run

    world = int(os.environ.get("WORLD_SIZE", "1"))
    tokens = plan_tokens(config.mode, config.data, config.batch, world)
    projection = config.settings_given.get("projection")
    plan, limit = plan_dry_run(config.model, config.parallel, tokens, world, mode=config.mode, projection=projection)
    return "\n".join(plan.lines(limit))
