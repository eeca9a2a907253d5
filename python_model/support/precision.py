"""Which dtype a device computes in without losing time.

A CPU without instructions for products of 16-bit numbers emulates them: on an Intel Xeon with AVX512 alone, PyTorch's products
take 5 times as long in bfloat16 as in float32, and 11 times in float16. There a default computes in float32, which is also the
more exact.
"""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import torch

from python_model.support.optional import find

HALVES = (torch.bfloat16, torch.float16)
SLOW = 1.5
"""A product in 16 bits that takes so many times as long as in float32 is slow; elsewhere it takes about half as long, or less."""


@functools.cache
def times_float32(dtype: torch.dtype) -> float:
    """The time of a matrix product in ``dtype`` over that in float32 on this CPU, measured once, in about 20 ms."""
    best = {}
    for each in (torch.float32, dtype):
        x, weight = (torch.full((rows, 512), 0.5, dtype=each) for rows in (128, 512))
        seconds = []
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for _ in range(5):  # the first one also generates its code
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds.append(time.perf_counter() - start)
        best[each] = min(seconds)
    return best[dtype] / best[torch.float32]


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products of ``dtype`` are emulated on ``device``."""
    return device.type == "cpu" and dtype in HALVES and times_float32(dtype) > SLOW


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


def widen_where_slow(model: Any, device: torch.device) -> None:
    """Turn the weights of transformers' ``model`` into float32 if ``device`` emulates products in their dtype.

    They take twice the memory then; where that is not free they stay as they are, with a warning.
    """
    if getattr(model, "hf_quantizer", None) is not None or not is_slow(model.dtype, device):
        return
    more = sum(parameter.nbytes for parameter in model.parameters())
    psutil = find("psutil")
    if psutil is not None and 2 * more > psutil.virtual_memory().available:
        warnings.warn(
            f"dtype: this CPU emulates products in {str(model.dtype).removeprefix('torch.')}, which takes "
            f"{times_float32(model.dtype):.0f} times as long as float32, whose weights would not fit into memory",
            stacklevel=3,
        )
        return
    model.float()


def computes_in_bfloat16(wanted: bool | None, device: torch.device) -> bool:
    """``wanted``, or where it is None, whether ``device`` computes in bfloat16 without losing time."""
    return not is_slow(torch.bfloat16, device) if wanted is None else wanted


def computing(device: torch.device, bf16: bool | None = None) -> torch.autocast:
    """Autocast to bfloat16; ``bf16``: see :func:`computes_in_bfloat16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(bf16, device))
