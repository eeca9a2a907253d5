"""Memory of one call: growth of the peak above what is in use before it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.common import peak_resident_bytes


def growth(device: str) -> Callable[[], float]:
    """Start counting; the returned function gives the growth of the peak since then, in MiB.

    On a GPU, this is the peak of allocated bytes. On the CPU it is that of the resident set: first, memory that the allocator
    holds free is returned to the system and the kernel's high-water mark is reset, so that neither hides what a call takes.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - start) / 2**20
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only in glibc
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident_bytes()
    return lambda: (peak_resident_bytes() - before) / 2**20
