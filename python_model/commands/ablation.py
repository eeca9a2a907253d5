"""``grit ablation``: train variants one after another, evaluate each, write one table and its plot."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import TERMINATED, Command, location, path


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit ablation``."""
    parser.add_argument("--config", type=path, required=True, help="YAML file (see configs/ablations)")
    parser.add_argument("--model", type=location, help="base model of variants that name none")
    parser.add_argument("--train-data", type=location, help="jsonl file or folder")
    parser.add_argument("--steps", type=int, help="optimiser steps of variants that set none")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep trained weights after evaluation")


def run(arguments: Namespace) -> None:
    """Train and evaluate the variants without a result."""
    from python_model.train import ablation
    from python_model.train.trainer import Interrupted

    given = {"model.name": arguments.model, "data.train_data": arguments.train_data, "steps": arguments.steps}
    try:
        found = ablation.read_ablation(arguments.config, {k: v for k, v in given.items() if v is not None})
        rows = ablation.run(found, keep_checkpoints=arguments.keep_checkpoints)
    except Interrupted as reason:
        print(f"grit ablation: {reason}", file=sys.stderr)
        raise SystemExit(TERMINATED) from None
    print(ablation.table(rows))


COMMAND = Command("ablation", "Train variants, evaluate each, write one table and its plot.", configure, run)
