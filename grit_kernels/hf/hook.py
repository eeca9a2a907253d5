"""Registers ``attn_implementation="grit"`` with transformers without importing it.

The name must exist before ``from_pretrained`` is called, but importing transformers takes seconds, which users of the kernels
alone should not pay for. If transformers' modelling code is loaded already, registering is free and happens at once; otherwise
an import hook waits for that module and then removes itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from grit_kernels.hf.interface import register

_TARGET = "transformers.modeling_utils"


class _Loader(importlib.abc.Loader):
    """The module's own loader, then :func:`register`."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # the module keeps the loader it would otherwise have
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.inner
        self.inner.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        register()


class _Finder(importlib.abc.MetaPathFinder):
    """Gives the module :class:`_Loader`; stays until it has been loaded, since a module may be looked for without that."""

    looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_when_imported() -> None:
    """Register now if transformers' modelling code is loaded, otherwise as soon as it is."""
    if _TARGET in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())
