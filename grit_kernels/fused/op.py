"""torch.library registration of the fused ops: schema, fake, autograd. Arguments as in ``reference.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_kernels.backend import define_op, refuse_double_backward
from grit_kernels.checks import dense_rows
from grit_kernels.fused import reference

_TRITON = "grit_kernels.fused.triton_fused"

for _schema in (
    "rms_norm_forward(Tensor x, Tensor weight, Tensor? residual, float eps, float offset, ScalarType out_dtype) "
    "-> (Tensor out, Tensor total)",
    "rms_norm_backward(Tensor grad_out, Tensor? grad_total, Tensor total, Tensor weight, float eps, float offset, "
    "bool need_weight) -> (Tensor grad_x, Tensor grad_weight)",
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)",
    "gated_forward(Tensor gate, Tensor up, int kind) -> Tensor",
    "gated_backward(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor grad_gate, Tensor grad_up)",
):
    _name = _schema.split("(")[0]
    define_op(_schema, reference=getattr(reference, _name), triton=f"{_TRITON}:{_name}")


@torch.library.register_fake("grit_kernels::rms_norm_forward")
def _norm_fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=out_dtype)
    if residual is None:
        return out, x.new_empty(0)
    return out, x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


@torch.library.register_fake("grit_kernels::rms_norm_backward")
def _norm_backward_fake(
    grad_out: Tensor, grad_total: Tensor | None, total: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    columns = total.shape[-1] if rest[-1] else 0  # need_weight
    return total.new_empty(total.shape), total.new_empty(columns, dtype=torch.float32)


@torch.library.register_fake("grit_kernels::rotary")
def _rotary_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("grit_kernels::gated_forward")
def _gated_fake(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("grit_kernels::gated_backward")
def _gated_backward_fake(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, residual, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight)
    ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
    if residual is None:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, grad_out: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    grad_weight = None
    if residual_dtype is None:
        grad_total = None
    if grad_out is None:
        grad = grad_total
    else:
        grad, grad_weight = torch.ops.grit_kernels.rms_norm_backward(
            dense_rows(grad_out),
            None if grad_total is None else dense_rows(grad_total),
            total,
            weight,
            ctx.eps,
            ctx.offset,
            ctx.needs_input_grad[1],
        )
        grad_weight = grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
    grads: list[Tensor | None] = [
        grad.to(dtype) if grad is not None and dtype is not None and needed else None
        for dtype, needed in ((x_dtype, ctx.needs_input_grad[0]), (residual_dtype, ctx.needs_input_grad[2]))
    ]
    return grads[0], grad_weight, grads[1], None, None, None


def _save_rotary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    # the rotation is linear in q and k; its tables are constants
    cos, sin = ctx.saved_tensors
    grads = torch.ops.grit_kernels.rotary(dense_rows(grad_q), dense_rows(grad_k), cos, sin, not ctx.transposed)
    return *grads, None, None, None


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    return *torch.ops.grit_kernels.gated_backward(dense_rows(grad), gate, up, ctx.kind), None


torch.library.register_autograd("grit_kernels::rms_norm_forward", _norm_backward, setup_context=_save_norm)
torch.library.register_autograd("grit_kernels::rotary", _rotary_backward, setup_context=_save_rotary)
torch.library.register_autograd("grit_kernels::gated_forward", _gated_backward, setup_context=_save_gated)
refuse_double_backward("rms_norm_backward", "rms_norm")
refuse_double_backward("gated_backward", "a gated activation")
