"""Random inputs of the fused ops, and the same computation as a model writes it: the eager results of the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager_norm(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float) -> tuple[Tensor, ...]:
    """As transformers' decoders norm, in the inputs' dtype but for the statistics."""
    total = x if residual is None else x + residual
    wide = total if total.dtype == torch.float64 else total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out = (weight + offset) * normed.to(total.dtype)
    return (out,) if residual is None else (out, total)


def eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """x cos + rotate_half(x) sin on the first R values."""

    def turned(x: Tensor) -> Tensor:
        size = cos.shape[-1]
        part = x[..., :size]
        half = torch.cat([-part[..., size // 2 :], part[..., : size // 2]], dim=-1)
        return torch.cat([part * cos[:, :, None] + half * sin[:, :, None], x[..., size:]], dim=-1)

    return turned(q), turned(k)


def eager_silu_mul(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (torch.nn.functional.silu(gate) * up,)


def eager_gelu_mul(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up,)


def results(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor], leaves: int, **options: Any
) -> list[Tensor]:
    """Outputs of ``function``, then the gradients of its first ``leaves`` tensors; ``grads`` flow into the outputs."""
    taken = [x.detach().requires_grad_(i < leaves) if x is not None else None for i, x in enumerate(inputs)]
    out = function(*taken, **options)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])
    return [o.detach() for o in out] + [x.grad for x in taken[:leaves] if x is not None and x.grad is not None]


def in_float64(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in inputs]
