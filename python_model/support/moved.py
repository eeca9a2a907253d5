"""Modules of version 0.1 under the names its documentation used: importing one warns and returns the moved module."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "python_model.losses": "python_model.model.losses",
    "python_model.modeling": "python_model.model.modeling",
    "python_model.prompts": "python_model.model.prompts",
    "python_model.rag.metrics": "python_model.evaluation.answers",
    "python_model.rerank": "python_model.generate.rerank",
    "python_model.sentence_transformers_export": "python_model.model.export",
    "python_model.small_model": "python_model.corpora.small_model",
}


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # the import system returns what is in sys.modules when the loader is done: the module itself, not a copy
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MOVED:
            return None
        warnings.warn(f"{fullname} has moved to {MOVED[fullname]}", DeprecationWarning, stacklevel=2)
        return importlib.machinery.ModuleSpec(fullname, _Loader())


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
