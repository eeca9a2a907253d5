"""``python -m python_model.train --config FILE [--key value ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from python_model.train.config import TrainConfig


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The settings of the command line over those of the file over the defaults."""
    try:
        import jsonargparse
    except ImportError as error:
        raise SystemExit("grit train needs the extra 'train': pip install 'grit-kernels[train]'") from error
    parser = jsonargparse.ArgumentParser(
        prog="grit train", description="GRIT training: contrastive and next-token loss in one packed pass."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(TrainConfig, None)
    values = parser.parse_args(argv)
    return TrainConfig(**{key: value for key, value in vars(values).items() if key != "config"})


def run(config: TrainConfig) -> Path:
    """Train and save; returns the checkpoint's folder."""
    from python_model.data.jsonl import read_rows
    from python_model.modeling import GritLM
    from python_model.plot import plot_losses
    from python_model.small_model import resolve_model
    from python_model.train.trainer import Trainer

    embedding, generative = read_rows(Path(config.train_data))
    model = GritLM(
        resolve_model(config.model),
        mode=config.mode,
        pooling_method=config.pooling_method,
        normalized=config.normalized,
        attn=config.attn,
        is_inference=False,
        dtype="float32",
    )
    trainer = Trainer(model, config, embedding, generative)
    records = trainer.train()
    plot_losses(records, Path(config.output_dir) / "loss.png")
    return trainer.save()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``grit train``."""
    try:
        checkpoint = run(parse(argv))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        raise SystemExit(f"grit train: {error}") from error
    print(f"saved {checkpoint}")


if __name__ == "__main__":
    main(sys.argv[1:])
