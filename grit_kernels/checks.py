"""Argument checks that the public functions share: how a message describes an argument, which values may be read, layouts."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def described(x: object) -> str:
    """A wrong argument as a message shows it: dtype and shape of a tensor, else the type."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def is_integer(x: object, *shape: int) -> bool:
    """Whether ``x`` is an int32 or int64 tensor of this shape."""
    return isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64) and tuple(x.shape) == shape


def neither_0_nor_1(mask: Tensor) -> Tensor:
    """Which elements of a mask are neither 0 (padding) nor 1 (a real token)."""
    return (mask != 0) & (mask != 1)


def mask_faults(mask: Tensor) -> Tensor | None:
    """How many elements of a mask are neither 0 (padding) nor 1 (a real token) nor, among integers, the number of a sample, as in
    a mask that is added to scores; int64 scalar. None: none, by its dtype."""
    if mask.is_floating_point():
        return neither_0_nor_1(mask).sum()
    return (mask < 0).sum() if mask.dtype.is_signed else None


def check_mask(name: str, mask: Tensor, faults: int) -> None:
    """ValueError if ``faults`` elements of ``mask`` are not what it may hold."""
    if faults:
        raise ValueError(f"{name}: expected 0 at padding and 1 at real tokens, got {described(mask)} with other values")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """ValueError unless ``x`` is on ``device``."""
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like the first argument, got one on {x.device}")


def readable(x: Tensor) -> bool:
    """Whether values may be checked: reading them back would make a GPU wait and would break a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def may_read_back(x: Tensor) -> bool:
    """Whether a value of ``x`` may decide what happens next: a compiled graph, or a CUDA graph being captured, reads nothing."""
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def dense_rows(x: Tensor) -> Tensor:
    """``x`` with a last dimension of stride 1, which every kernel requires; the other strides are free."""
    # not contiguous(): it leaves a dimension of one element as it is, whatever its stride
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int) -> int | None:
    """ValueError unless ``cu_seqlens`` is int32 (B + 1), B >= 1, and, where readable, non-decreasing from 0 to ``tokens``.

    Returns the length of the longest sample, None where values may not be read.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or not is_integer(cu_seqlens, *cu_seqlens.shape):
        raise ValueError(f"{name}: expected int32 (B + 1,), got {described(cu_seqlens)}")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name}: expected int32 (B + 1,) with B >= 1, got an empty batch")
    if not readable(cu_seqlens):
        return None
    table = cu_seqlens.tolist()  # in Python: for the samples of a batch, quicker than a handful of tensor operations
    steps = [end - start for start, end in pairwise(table)]
    if table[0] != 0 or table[-1] != tokens or min(steps) < 0:
        raise ValueError(f"{name}: expected a non-decreasing table from 0 to {tokens}, got {table}")
    return max(steps)
