"""Stands in for hypothesis where it is not installed: its tests are skipped with the reason, the others of a file still run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


class _Anything:
    """A strategy, whatever is asked of it."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):  # such as __wrapped__, which a reader of signatures would follow for ever
            raise AttributeError(name)
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
    module, strategies = ModuleType("hypothesis"), _Strategies("hypothesis.strategies")
    module.__dict__.update(given=given, settings=settings, HealthCheck=_Anything(), strategies=strategies)
    for made in (module, strategies):
        made.__spec__ = ModuleSpec(made.__name__, None)  # others ask for it
        sys.modules[made.__name__] = made
