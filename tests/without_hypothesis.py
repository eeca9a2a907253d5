"""Stands in for hypothesis where it is not installed: its tests are skipped with the reason, the others of a file still run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


class _Anything:
    """A strategy, whatever is asked of it."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Anything:
        return self

    def __or__(self, _: Any) -> _Anything:
        return self


class _Strategies(ModuleType):
    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):  # what a module of Python's own has, such as __file__
            raise AttributeError(name)
        return _Anything()


class settings:
    """A decorator that changes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, test: Callable[..., Any]) -> Callable[..., Any]:
        return test

    @staticmethod
    def register_profile(*_: Any, **__: Any) -> None: ...

    @staticmethod
    def load_profile(_: str) -> None: ...


def given(*_: Any, **__: Any) -> Any:
    return pytest.mark.skip(reason="hypothesis is not installed")


def install() -> None:
    """Make ``import hypothesis`` give this."""
    module = ModuleType("hypothesis")
    module.__dict__.update(given=given, settings=settings, HealthCheck=_Anything(), strategies=_Anything())
    sys.modules["hypothesis"] = module
    sys.modules["hypothesis.strategies"] = _Strategies("hypothesis.strategies")
