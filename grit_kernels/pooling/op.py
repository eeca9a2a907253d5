"""torch.library registration of pooling: schema, fake, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_kernels.backend import define_op, refuse_double_backward
from grit_kernels.pooling import reference
from grit_kernels.pooling.problem import PoolingProblem

_PROBLEM = f"{PoolingProblem.TENSORS}, {PoolingProblem.OPTIONS}"
_TRITON = "grit_kernels.pooling.triton_pooling"

define_op(
    f"pool_forward({_PROBLEM}) -> Tensor",
    reference=reference.pool_forward,
    triton=f"{_TRITON}:pool_forward",
    problem=PoolingProblem,
)
define_op(
    f"pool_backward(Tensor grad_out, {_PROBLEM}) -> (Tensor grad_hidden, Tensor grad_norm_weight)",
    reference=reference.pool_backward,
    triton=f"{_TRITON}:pool_backward",
    problem=PoolingProblem,
)


@torch.library.register_fake("grit_kernels::pool_forward")
def _forward_fake(*arguments: Any) -> Tensor:
    problem = PoolingProblem(*arguments)
    shape = (problem.row_start.shape[0], problem.hidden.shape[1])
    return problem.hidden.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("grit_kernels::pool_backward")
def _backward_fake(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    problem = PoolingProblem(*arguments)
    hidden, size = problem.hidden, 0 if problem.norm_weight is None else problem.hidden.shape[1]
    return hidden.new_empty(hidden.shape), hidden.new_empty((size,), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, norm_eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.norm_eps = norm_eps


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    norm_weight = ctx.saved_tensors[-1]
    grad_hidden, grad_norm_weight = torch.ops.grit_kernels.pool_backward(
        grad_out.contiguous(), *ctx.saved_tensors, ctx.norm_eps
    )
    grad_norm_weight = None if norm_weight is None else grad_norm_weight.to(norm_weight.dtype)
    return grad_hidden, None, None, None, None, grad_norm_weight, None


torch.library.register_autograd("grit_kernels::pool_forward", _backward, setup_context=_save)
refuse_double_backward("pool_backward", "pooling")
