"""A machine with a GPU may have pytest without hypothesis: tests that draw examples are skipped there, all others run."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest


class _Anything:
    """Stands for whatever test modules make of hypothesis when they are imported."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self


class _Settings(_Anything):
    """As a decorator it leaves the test alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self


def stand_in() -> ModuleType:
    """What is imported as hypothesis."""
    module: Any = ModuleType("hypothesis")
    # shown as skipped, for this reason, where hypothesis is missing only: CI installs it with the extra "dev" and runs them all
    module.given = lambda *args, **kwargs: pytest.mark.skip(reason="hypothesis is not installed")
    module.settings = _Settings()
    module.strategies = module.HealthCheck = _Anything()
    return module


if importlib.util.find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = stand_in()
