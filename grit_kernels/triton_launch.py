"""Shared by all Triton kernels: launching on the right device, products in full precision."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from grit_kernels.backend import interpreting


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the device of ``x``, whatever the current one is."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors (compute units); a small number in the interpreter, so that tests split work as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def architecture(device: torch.device) -> str:
    """What tile sizes are chosen by: ``"sm80"``, ``"sm90"``, ``"sm100"``, ``"gfx9"``; ``"cpu"`` in the interpreter."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return "gfx9"
    major, _ = torch.cuda.get_device_capability(device)
    # consumer Blackwell (12.x) has the matrix instructions and the shared memory of the 8.x generation
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def upcast_operands() -> bool:
    """Triton's interpreter multiplies bfloat16 wrongly; there, dot operands become float32 first."""
    return interpreting()


@triton.jit
def dot(a, b, c, UPCAST: tl.constexpr):
    """a @ b + c in FP32; float32 operands are multiplied in full precision, never in TF32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")
