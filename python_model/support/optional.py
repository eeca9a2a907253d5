"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """The module, or an ImportError that says how to install what it is in (an optional extra of grit-kernels)."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is missing ({error}): pip install 'grit-kernels[{extra}]'") from error
