"""``grit train``: the options are the fields of TrainConfig; ``python -m python_model.train`` is the same under torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from python_model.commands.runner import Command


@dataclass(frozen=True)
class _Train(Command):
    """Its parser is made of the settings, and it knows how an interrupted run ends."""

    def parser(self) -> Any:
        from python_model.train.__main__ import build_parser

        return build_parser()

    def __call__(self, argv: Sequence[str] | None = None) -> None:
        from python_model.train.__main__ import main

        main(argv)


COMMAND = _Train("train", "GRIT training: contrastive and next-token loss together.", lambda _: None, lambda _: None)
