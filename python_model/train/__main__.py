"""``python -m python_model.train --config FILE [--GROUP.FIELD VALUE ...]``; under torchrun for several ranks."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from python_model.support.checked import describe
from python_model.train.config import MOVED, REMOVED, TYPES, TrainConfig, flatten, unknown

if TYPE_CHECKING:
    from python_model.train.distributed import Ranks


def build_parser() -> Any:
    """A jsonargparse parser with an option for each field, explained by the docstrings."""
    try:
        import docstring_parser  # noqa: F401  (without it the help explains nothing)
        import jsonargparse
    except ImportError as error:
        raise SystemExit("grit train needs the extra 'train': pip install 'grit-kernels[train]'") from error
    parser = jsonargparse.ArgumentParser(
        prog="grit train",
        description="GRIT training: contrastive and next-token loss together.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(TrainConfig, None)
    return parser


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The settings of the command line over those of the file over the defaults.

    Raises:
        ValueError: a setting of version 0.1 (the message has its new place), an unknown one in a file, or a value that is not
            accepted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for index, argument in enumerate(given):
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            continue
        if name in MOVED or name in REMOVED:
            raise ValueError(unknown(name))
        file = value or (given[index + 1] if index + 1 < len(given) else "")
        if name == "config" and Path(file).is_file():
            _check_file(Path(file))
    parser = build_parser()
    try:
        values = parser.parse_args(given).as_dict()
    except argparse.ArgumentError as error:
        raise ValueError(_readable(str(error))) from None
    del values["config"]
    return TrainConfig.from_dict(values)


def _readable(message: str) -> str:
    """The parser's message about a value of the wrong type, in this program's words."""
    found = re.search(r'Parser key "([\w.]+)":(?:.|\n)*Got value: (.*)', message)
    if not found or found[1] not in TYPES:
        return message
    return f"{found[1]}: expected {describe(TYPES[found[1]])}, got {found[2]!r}"


def _check_file(path: Path) -> None:
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        raise ValueError(f"config: expected settings in {path}, got {type(content).__name__}")
    try:
        flatten(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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

    in_batch_negatives = config.losses.in_batch_negatives
    check_data(config.data, config.mode, in_batch_negatives=in_batch_negatives)  # before minutes go into a model
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
        seed=config.seed,
        rank=here.rank,
        world=here.world,
    )
    trainer = Trainer(model, config, stream, here)
    records = trainer.train()
    checkpoint = trainer.save()
    if here.first:  # last: a plot that fails costs no weights
        plot_losses(records, Path(config.output_dir) / "loss.png")
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
