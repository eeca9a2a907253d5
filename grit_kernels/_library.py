"""Finds and loads the compiled library (csrc/). Its absence is never an import error: see :func:`status`."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class LibraryStatus:
    """Whether the compiled library serves this process, and if not, why and what to do."""

    loaded: bool
    reason: str
    path: Path | None = None


@functools.cache
def status() -> LibraryStatus:
    """Load the compiled library on the first call and tell how that went."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return LibraryStatus(False, "TRITON_INTERPRET=1 replaces it by the Triton kernels")
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return LibraryStatus(
            False, "the compiled library is missing; `pip install . --no-build-isolation` with a C++ compiler builds it"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return LibraryStatus(
            False, f"{found[0]} does not load ({error}); rebuild it against torch {torch.__version__}", found[0]
        )
    return LibraryStatus(True, "", found[0])
