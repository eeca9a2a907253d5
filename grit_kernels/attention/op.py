"""torch.library registration of switch attention: schema, fake, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import reference
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.backend import define_op, refuse_double_backward

_PROBLEM = f"{AttentionProblem.TENSORS}, {AttentionProblem.OPTIONS}"

define_op(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_PROBLEM}) -> (Tensor out, Tensor lse)",
    reference=reference.attention_forward,
    triton="grit_kernels.attention.triton_forward:attention_forward",
    problem=AttentionProblem,
)
define_op(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_PROBLEM}) -> (Tensor dq, Tensor dk, Tensor dv)",
    reference=reference.attention_backward,
    triton="grit_kernels.attention.triton_backward:attention_backward",
    problem=AttentionProblem,
)


@torch.library.register_fake("grit_kernels::attention_forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("grit_kernels::attention_backward")
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    problem, tensors = inputs[3:], AttentionProblem.TENSOR_COUNT
    ctx.save_for_backward(*inputs[:3], *output, *problem[:tensors])
    ctx.options = problem[tensors:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        grad_out = torch.zeros_like(ctx.saved_tensors[3])
    grads = torch.ops.grit_kernels.attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.options)
    return *grads, *([None] * len(AttentionProblem.NAMES))


torch.library.register_autograd("grit_kernels::attention_forward", _backward, setup_context=_save)
refuse_double_backward("attention_backward", "switch attention")
