"""What a benchmark's own parser makes of a command line."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import pytest


def parsed(module: str, arguments: list[str]) -> argparse.Namespace:
    """The arguments of ``python -m module``; its ``main`` is left as soon as they are parsed and accepted."""
    found: list[argparse.Namespace] = []

    class Stop(Exception):
        pass

    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        found.append(real(self, args, namespace))
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Stop):
            importlib.import_module(module).main()
    return found[0]
