"""Memory of one call: growth of the peak above what is in use before it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.common import peak_resident_bytes


def growth(device: str) -> Callable[[], float]:
    """Start counting; the returned function tells by how many MB (2^20) the peak has grown since.

    On a GPU of the allocated bytes. On the CPU of the resident set: memory that the allocator holds free goes back to the system
    first, and the kernel's mark of the highest set is lowered to the present one, so that neither hides what a call takes.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - start) / 2**20
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident_bytes()
    return lambda: (peak_resident_bytes() - before) / 2**20
