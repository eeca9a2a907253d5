"""What lies between the matrix products of a decoder layer, each in one pass over memory: RMSNorm with the residual addition
in front of it, rotary embedding into the layout that attention reads, and the gate of an MLP.

Arithmetic is FP32 inside, so a result carries one rounding to its dtype; the definitions are in ``reference.py``.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from grit_kernels.backend import use_reference
from grit_kernels.checks import dense_rows, described
from grit_kernels.fused import op as _op  # noqa: F401  (registers the ops)
from grit_kernels.fused import reference

__all__ = ["gelu_tanh_mul", "rms_norm", "rotary", "silu_mul"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(name: str, x: object, like: Tensor | None = None, *, shape: bool = True) -> None:
    """TypeError or ValueError unless ``x`` is a floating tensor with dimensions, on the device of ``like`` and, if asked, of its
    shape.
    """
    if not isinstance(x, Tensor) or x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"{name}: expected a float32, bfloat16 or float16 tensor, got {described(x)}")
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, got {described(x)}")
    if like is not None and (x.device != like.device or (shape and x.shape != like.shape)):
        wanted = f"{tuple(like.shape)} on {like.device}" if shape else f"a tensor on {like.device}"
        raise ValueError(f"{name}: expected {wanted}, got {tuple(x.shape)} on {x.device}")


def _use_reference(device: torch.device, **tensors: Tensor | None) -> bool:
    if use_reference(device):
        return True
    for name, x in tensors.items():
        if x is not None and x.dtype == torch.float64:
            raise TypeError(f"{name}: got torch.float64, which only `with grit_kernels.backend('reference')` accepts")
    return False


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = ..., *, offset: float = ..., dtype: torch.dtype | None = ...
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = ...,
    *,
    residual: Tensor,
    offset: float = ...,
    dtype: torch.dtype | None = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x * rsqrt(mean(x^2) + eps) * (weight + offset)``, the mean over the last dimension; of ``x + residual`` when given.

    Args:
        x: (..., C) float32, bfloat16 or float16; any strides.
        weight: (C,).
        eps: added to the mean of squares, >= 0.
        residual: of x's shape, in x's dtype or with one of the two float32. The sum is rounded to the wider dtype first.
        offset: 1 for weights stored as their distance from 1, as in Gemma.
        dtype: of the result; default that of x (of the sum). float32 or x's own for 16-bit inputs, any of the three for float32.

    Returns:
        (..., C), contiguous; with a ``residual`` the pair (normed, x + residual).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    _check("x", x)
    _check("weight", weight, x, shape=False)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    wide = x.dtype
    if residual is not None:
        _check("residual", residual, x)
        wide = torch.promote_types(x.dtype, residual.dtype)
        if residual.dtype != x.dtype and wide not in (x.dtype, residual.dtype):
            raise TypeError(f"residual: expected {x.dtype} or torch.float32, got {residual.dtype}")
    result = wide if dtype is None else dtype
    if result != wide and (result not in DTYPES or torch.float32 not in (result, wide)):
        raise TypeError(f"dtype: expected {wide} or torch.float32, got {result}")
    if _use_reference(x.device, x=x, weight=weight, residual=residual):
        out, total = reference.rms_norm_forward(x, weight, residual, eps, offset, result)
    else:
        added = None if residual is None else dense_rows(residual)
        out, total = torch.ops.grit_kernels.rms_norm_forward(
            dense_rows(x), weight.contiguous(), added, eps, offset, result
        )
    return out if residual is None else (out, total)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, ``x * cos + rotate_half(x) * sin`` on the first R values of each head.

    ``rotate_half((x1, x2)) = (-x2, x1)``; the rest of a head is copied. The results are contiguous in
    (B, T, heads, D), the layout that :func:`grit_kernels.switch_attention` reads in place, whatever the inputs' strides.

    Args:
        q, k: (B, T, Hq, D) and (B, T, Hkv, D) of one dtype.
        cos, sin: (B, T, R) or (1, T, R), R even and <= D; in the dtype of q or float32 (for float32 q any of the
            three). They are constants: no gradient flows to them.

    Returns:
        Rotated q and k, in their dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Source: Su et al., RoFormer, arXiv 2104.09864.
    """
    _check("q", q)
    _check("k", k, q, shape=False)
    if q.ndim != 4 or k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or k.dtype != q.dtype:
        raise ValueError(
            f"q, k: expected (B, T, heads, D) of one dtype, differing in heads only, got {described(q)} and {described(k)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        _check(name, table, q, shape=False)
        fits = table.ndim == 3 and table.shape[0] in (1, q.shape[0]) and table.shape[1] == q.shape[1]
        if not fits or table.shape[2] % 2 or table.shape[2] > q.shape[3] or table.shape != cos.shape:
            raise ValueError(
                f"{name}: expected (B or 1, T, R) with B, T and R even <= D of q {tuple(q.shape)}, got {tuple(table.shape)}"
            )
        if table.dtype not in (q.dtype, torch.float32) and q.dtype != torch.float32:
            raise TypeError(f"{name}: expected {q.dtype} or torch.float32, got {table.dtype}")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a constant table, got one that requires grad")
    if _use_reference(q.device, q=q, cos=cos, sin=sin):
        return reference.rotary(q, k, cos, sin, False)
    tables = (dense_rows(cos), dense_rows(sin.to(cos.dtype)))
    return torch.ops.grit_kernels.rotary(dense_rows(q), dense_rows(k), *tables, False)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` with ``silu(x) = x * sigmoid(x)``: the gate of a SwiGLU MLP. Keeps only its inputs for the backward.

    Args:
        gate, up: (..., C) of one shape and dtype; any strides, so halves of one product are fine.

    Returns:
        (..., C), contiguous, in their dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    return _gated(gate, up, 0)


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with GELU's tanh form, as in Gemma's MLP. Arguments as :func:`silu_mul`."""
    return _gated(gate, up, 1)


def _gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    _check("gate", gate)
    _check("up", up, gate)
    if up.dtype != gate.dtype:
        raise TypeError(f"up: expected {gate.dtype}, the dtype of gate, got {up.dtype}")
    if _use_reference(gate.device, gate=gate):
        return reference.gated_forward(gate, up, kind)
    return torch.ops.grit_kernels.gated_forward(dense_rows(gate), dense_rows(up), kind)
