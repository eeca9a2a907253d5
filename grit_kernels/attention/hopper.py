"""Whether a call goes to a Hopper kernel in Gluon: only where GRIT_KERNELS_HOPPER=1 asks for it, until a GPU's record says more.

Gluon is imported only then, as it is an experimental part of Triton whose interface changes.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.backend import interpreting
from grit_kernels.triton_launch import architecture

VARIABLE = "GRIT_KERNELS_HOPPER"
ROWS = 128
"""Of a tile, or its keys; a plan is of tiles of the table's size, which must be the same."""

_INT32 = 2**31


def hopper_kernel(
    name: str, tile: int, problem: AttentionProblem, deterministic: bool = True, **tensors: Tensor
) -> Any:
    """The module ``name`` for a call that is to use it, else None; says once why a wanted one is not used.

    ``tile``: rows, or keys, of the plan's tiles. ``tensors``: those that are copied, q and k among them.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {value!r}")
    if value != "1":
        return None
    if why := unsuitable(tile, problem, deterministic, tensors) or _missing(name):
        _announce(f"{VARIABLE}=1, but the Triton kernel runs: {why}")
        return None
    return _module(name)


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def unsuitable(tile: int, problem: AttentionProblem, deterministic: bool, tensors: dict[str, Tensor]) -> str:
    """What the kernels expect and this call is not, or an empty text."""
    q = tensors["q"]
    if interpreting():
        return "expected compiled kernels, got Triton's interpreter, which has no Gluon"
    if (arch := architecture(q.device)) != "sm90":
        return f"expected a Hopper GPU (sm90), got {arch}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"expected q of bfloat16 or float16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] not in (64, 128):
        return f"expected a head dimension of 64 or 128, got {q.shape[2]}"
    if problem.softcap > 0:
        return f"expected no softcap, got {problem.softcap}"
    if not deterministic:
        return "expected deterministic=True, got False"
    if tile != ROWS:
        return f"expected tiles of {ROWS} rows or keys, got {tile}"
    if not tensors["k"].shape[0]:
        return "expected keys, got none"
    for name, x in tensors.items():
        columns = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
        if x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16:
            return f"expected rows and heads of {name} at multiples of 16 bytes, got strides {tuple(x.stride())}"
        if x.stride(0) < columns:
            return f"expected rows of {name} one after the other, got strides {tuple(x.stride())}"
        if columns >= _INT32 or x.shape[0] >= _INT32:
            return f"expected {name} of less than 2**31 rows and columns, got {(x.shape[0], columns)}"
    return ""


@functools.cache
def _missing(name: str) -> str:
    try:
        _module(name)
    except (ImportError, AttributeError, TypeError) as error:
        import triton

        return f"expected the Gluon of Triton 3.6 to 3.9, got Triton {triton.__version__}: {error}"
    return ""


@functools.cache
def _announce(message: str) -> None:
    warnings.warn(message, stacklevel=2)
