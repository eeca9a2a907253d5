"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str | None = None) -> Any:
    """Import a module; if it is missing, the ImportError says how to install it: with an ``extra`` of grit-kernels, or by
    itself.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        install = f"'grit-kernels[{extra}]'" if extra else package
        raise ImportError(f"{package} is missing ({error}): pip install {install}") from error


def find(module: str) -> Any | None:
    """Import a module, or return None if its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
