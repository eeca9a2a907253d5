"""``grit train``: its options are the fields of TrainConfig. ``python -m python_model.train`` is the same, for torchrun."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from python_model.commands.runner import TERMINATED, Command
from python_model.support.arguments import check_path
from python_model.support.checked import describe
from python_model.support.files import read_yaml
from python_model.train.config import MOVED, REMOVED, TYPES, TrainConfig, flatten, unknown


def configure(parser: ArgumentParser) -> None:
    """Add an option for each field, explained by the docstrings."""
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(TrainConfig, None)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> TrainConfig:
    """The settings: the command line overrides the file, which overrides the defaults.

    Raises:
        ValueError: a setting of version 0.1 (the message gives its new name), an unknown one in a file, or an invalid value.
    """
    for index, argument in enumerate(argv):
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            continue
        if name in MOVED or name in REMOVED:
            raise ValueError(unknown(name))
        if name == "config":
            _check_file(value if equals else argv[index + 1] if index + 1 < len(argv) else "")
    parser.exit_on_error = False
    try:
        values = parser.parse_args(list(argv)).as_dict()
    except argparse.ArgumentError as error:
        raise ValueError(_readable(str(error))) from None
    del values["config"]
    return TrainConfig.from_dict(values)


def _readable(message: str) -> str:
    """The parser's message about a value of the wrong type, reworded."""
    found = re.search(r'Parser key "([\w.]+)":(?:.|\n)*Got value: (.*)', message)
    if not found or found[1] not in TYPES:
        return message
    return f"{found[1]}: expected {describe(TYPES[found[1]])}, got {found[2]!r}"


def _check_file(name: str) -> None:
    check_path("--config", name)
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {path}")
    content = read_yaml(path)
    if not isinstance(content, dict):
        given = "an empty file" if content is None else type(content).__name__
        raise ValueError(f"config: expected settings in {path}, got {given}")
    try:
        flatten(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def run(config: TrainConfig) -> None:
    """Train, or with ``dry_run`` print the memory estimate."""
    from python_model.train import run as training
    from python_model.train.trainer import Interrupted

    if config.dry_run:
        projection = config.settings_given.get("projection")
        print(
            training.dry_run(
                config.model,
                config.parallel,
                config.data,
                config.batch,
                mode=config.mode,
                projection=projection,
                optimizer=config.optimizer.kind,
            )
        )
        return
    try:
        checkpoint = training.run(config)
    except Interrupted as reason:
        print(f"grit train: {reason}", file=sys.stderr)
        raise SystemExit(TERMINATED) from None
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"saved {checkpoint}")


COMMAND = Command("train", "GRIT training: contrastive and next-token loss together.", configure, run, parse)
