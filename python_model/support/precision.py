"""Which dtype a device computes in without losing time.

A CPU without instructions for products of 16-bit numbers emulates them: on an Intel Xeon with AVX512 alone, PyTorch's products
take 5 times as long in bfloat16 as in float32, and 11 times in float16. There a default computes in float32, which is also the
more exact.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch

from python_model.support.optional import find

INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp"),
}
"""Instruction sets with products of each dtype, of x86-64 and ARM, as torch and /proc/cpuinfo spell them."""
CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def cpu_capabilities() -> frozenset[str]:
    """The CPU's instruction sets; empty if nothing tells them."""
    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, []))


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``device`` emulates products of ``dtype``."""
    known = cpu_capabilities()
    return device.type == "cpu" and dtype in INSTRUCTIONS and bool(known) and known.isdisjoint(INSTRUCTIONS[dtype])


def device_of(device: str | torch.device | None) -> torch.device:
    """``device``, by default CUDA if available, else the CPU.

    Raises:
        ValueError: torch knows no such device, or this machine has no such CUDA device.
    """
    try:
        found = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        raise ValueError(f"device: expected a device such as cpu or cuda:1, got {str(device)!r}") from None
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if not count:
        raise ValueError(f"device: expected cpu, as torch sees no CUDA device, got {str(device)!r}")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"device: expected one of the {count} CUDA devices, from cuda:0, got {str(device)!r}")
    return found


def widen_if_emulated(model: Any, device: torch.device) -> None:
    """Turn the weights of transformers' ``model`` into float32 if ``device`` emulates products in their dtype.

    They take twice the memory then; where that is not free they stay as they are, with a warning.
    """
    if getattr(model, "hf_quantizer", None) is not None or not is_emulated(model.dtype, device):
        return
    more = sum(parameter.nbytes for parameter in model.parameters())
    psutil = find("psutil")
    if psutil is not None and 2 * more > psutil.virtual_memory().available:
        warnings.warn(
            f"dtype: this CPU emulates products in {str(model.dtype).removeprefix('torch.')}, which takes several times as long "
            "as float32, but weights in float32 would not fit into memory",
            stacklevel=3,
        )
        return
    model.float()


def computes_in_bfloat16(wanted: bool | None, device: torch.device) -> bool:
    """``wanted``, or where it is None, whether ``device`` computes in bfloat16 without losing time."""
    return not is_emulated(torch.bfloat16, device) if wanted is None else wanted


def computing(device: torch.device, bf16: bool | None = None) -> torch.autocast:
    """Autocast to bfloat16; ``bf16``: see :func:`computes_in_bfloat16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(bf16, device))
