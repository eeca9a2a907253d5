"""torch.library registration of pooling: schema, fake, autograd. Arguments as in ``reference.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_kernels.backend import declare_op, define_op, refuse_double_backward
from grit_kernels.pooling import reference

_NUMBERS = (
    "Tensor hidden, Tensor weights, Tensor row_start, Tensor row_end, Tensor denominators, "
    "Tensor? norm_weight, float norm_eps"
)

_TRITON = "grit_kernels.pooling.triton_pooling"

# the CUDA C++ kernel has a name of its own: Triton serves CUDA tensors wherever it is installed
declare_op(f"pool_forward_cuda({_NUMBERS}) -> Tensor")
define_op(
    f"pool_forward({_NUMBERS}) -> Tensor",
    reference=reference.pool_forward,
    triton=f"{_TRITON}:pool_forward",
    cuda="pool_forward_cuda",
)
define_op(
    f"pool_backward(Tensor grad_out, {_NUMBERS}) -> (Tensor grad_hidden, Tensor grad_norm_weight)",
    reference=reference.pool_backward,
    triton=f"{_TRITON}:pool_backward",
)


@torch.library.register_fake("grit_kernels::pool_forward")
@torch.library.register_fake("grit_kernels::pool_forward_cuda")
def _forward_fake(
    hidden: Tensor, weights: Tensor, row_start: Tensor, row_end: Tensor, denominators: Tensor, *norm: Any
) -> Tensor:
    return hidden.new_empty((row_start.shape[0], hidden.shape[1]), dtype=torch.float32)


@torch.library.register_fake("grit_kernels::pool_backward")
def _backward_fake(
    grad_out: Tensor,
    hidden: Tensor,
    weights: Tensor,
    row_start: Tensor,
    row_end: Tensor,
    denominators: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    size = 0 if norm_weight is None else hidden.shape[1]
    return hidden.new_empty(hidden.shape), hidden.new_empty((size,), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, norm_eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.norm_eps = norm_eps


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    *tensors, norm_weight = ctx.saved_tensors
    grad_hidden, grad_norm_weight = torch.ops.grit_kernels.pool_backward(
        grad_out.contiguous(), *tensors, norm_weight, ctx.norm_eps
    )
    if norm_weight is None:
        return grad_hidden, None, None, None, None, None, None
    return grad_hidden, None, None, None, None, grad_norm_weight.to(norm_weight.dtype), None


torch.library.register_autograd("grit_kernels::pool_forward", _backward, setup_context=_save)
refuse_double_backward("pool_backward", "pooling")
