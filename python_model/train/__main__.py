"""``python -m python_model.train --config FILE [--key value ...]``; under torchrun for several ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from python_model.train.config import TrainConfig

if TYPE_CHECKING:
    from python_model.train.distributed import Ranks


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The settings of the command line over those of the file over the defaults."""
    try:
        import jsonargparse
    except ImportError as error:
        raise SystemExit("grit train needs the extra 'train': pip install 'grit-kernels[train]'") from error
    parser = jsonargparse.ArgumentParser(
        prog="grit train", description="GRIT training: contrastive and next-token loss together."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(TrainConfig, None)
    values = parser.parse_args(argv)
    return TrainConfig(**{key: value for key, value in vars(values).items() if key != "config"})


def run(config: TrainConfig) -> Path:
    """Train (or go on where an interrupted run stopped) and save; returns the checkpoint's folder."""
    from python_model.train.distributed import ranks

    with ranks() as here:
        return _run_rank(config, here)


def _run_rank(config: TrainConfig, here: Ranks) -> Path:
    """A function of its own, so that model and shards are gone before the process group is."""
    from python_model.data.stream import check_data, open_stream
    from python_model.train.plot import plot_losses
    from python_model.train.setup import load_model
    from python_model.train.trainer import Trainer

    check_data(config)  # before minutes go into a model
    # with FSDP only rank 0 reads the weights; the others get their shards from it
    sharded = here.group is not None and config.parallel == "fsdp"
    model = load_model(config, here.device, weights=here.first or not sharded)
    stream = open_stream(config, model.tokenizer, here.rank, here.world, settings=model.settings)
    trainer = Trainer(model, config, stream, here)
    records = trainer.train()
    checkpoint = trainer.save()
    if here.first:  # last: a plot that fails costs no weights
        plot_losses(records, Path(config.output_dir) / "loss.png")
    return checkpoint


def dry_run(config: TrainConfig) -> str:
    """Memory per rank and tokens per step for WORLD_SIZE ranks, without weights or data."""
    from python_model.train.setup import plan_dry_run

    plan, limit = plan_dry_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    return "\n".join(plan.lines(limit))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``grit train``."""
    from python_model.corpora.small_model import SmallModelError
    from python_model.train.trainer import Interrupted

    try:
        config = parse(argv)
        if config.dry_run:
            print(dry_run(config))
            return
        checkpoint = run(config)
    except (ValueError, TypeError, OSError, FloatingPointError, SmallModelError) as error:
        raise SystemExit(f"grit train: {error}") from error
    except Interrupted as reason:
        print(f"grit train: {reason}", file=sys.stderr)
        raise SystemExit(143) from None
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"saved {checkpoint}")


if __name__ == "__main__":
    main(sys.argv[1:])
