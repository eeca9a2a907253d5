"""Whether a forward call goes to hopper_forward.py: only where GRIT_KERNELS_HOPPER=1 asks for it, until a GPU's record says more.

Gluon is imported only then, as it is an experimental part of Triton whose interface changes.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.attention.triton_configs import Config
from grit_kernels.backend import interpreting
from grit_kernels.triton_launch import architecture

VARIABLE = "GRIT_KERNELS_HOPPER"
ROWS = 128
"""Of a tile; a plan is of tiles of the table's rows, which must be as many."""

_INT32 = 2**31


def hopper_kernel(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, config: Config) -> Any:
    """The module hopper_forward for a call that is to use it, else None; says once why a wanted one is not used."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {value!r}")
    if value != "1":
        return None
    if why := unsuitable(q, k, v, problem, config) or _missing():
        _announce(f"{VARIABLE}=1, but the Triton kernel runs: {why}")
        return None
    from grit_kernels.attention import hopper_forward

    return hopper_forward


def unsuitable(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, config: Config) -> str:
    """What the kernel expects and this call is not, or an empty text."""
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
    if config.rows != ROWS:
        return f"expected tiles of {ROWS} rows, got {config}"
    if not k.shape[0]:
        return "expected keys, got none"
    for name, x in (("q", q), ("k", k), ("v", v)):
        columns = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
        if x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16:
            return f"expected rows and heads of {name} at multiples of 16 bytes, got strides {tuple(x.stride())}"
        if x.stride(0) < columns:
            return f"expected rows of {name} one after the other, got strides {tuple(x.stride())}"
        if columns >= _INT32 or x.shape[0] >= _INT32:
            return f"expected {name} of less than 2**31 rows and columns, got {(x.shape[0], columns)}"
    return ""


@functools.cache
def _missing() -> str:
    try:
        from grit_kernels.attention import hopper_forward  # noqa: F401
    except (ImportError, AttributeError, TypeError) as error:
        import triton

        return f"expected the Gluon of Triton 3.6 to 3.9, got Triton {triton.__version__}: {error}"
    return ""


@functools.cache
def _announce(message: str) -> None:
    warnings.warn(message, stacklevel=2)
