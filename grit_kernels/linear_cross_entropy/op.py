"""torch.library registration of the per-token loss: schema, fake, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_kernels.backend import define_op, refuse_double_backward
from grit_kernels.linear_cross_entropy import chunked

# plain torch around the contrastive kernels and cuBLAS: nothing faster is missing anywhere
define_op(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor labels, SymInt ignore_index, float? softcap) "
    "-> (Tensor losses, Tensor top, Tensor log_total)",
    reference=chunked.linear_cross_entropy_forward,
    composite=True,
)
define_op(
    "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor labels, Tensor top, Tensor log_total, "
    "SymInt ignore_index, float? softcap, bool need_hidden, bool need_weight) -> (Tensor grad_hidden, Tensor grad_weight)",
    reference=chunked.linear_cross_entropy_backward,
    composite=True,
)


@torch.library.register_fake("grit_kernels::linear_cross_entropy_forward")
def _forward_fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses, top, log_total = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
    return losses, top, log_total


@torch.library.register_fake("grit_kernels::linear_cross_entropy_backward")
def _backward_fake(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_hidden, need_weight = rest[-2:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels, *options = inputs
    ctx.save_for_backward(hidden, weight, labels, *output[1:])
    ctx.options = options
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_losses: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = torch.ops.grit_kernels.linear_cross_entropy_backward(
        grad_losses, *ctx.saved_tensors, *ctx.options, need_hidden, need_weight
    )
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, None, None, None


torch.library.register_autograd("grit_kernels::linear_cross_entropy_forward", _backward, setup_context=_save)
refuse_double_backward("linear_cross_entropy_backward", "linear_cross_entropy")
