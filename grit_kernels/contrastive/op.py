"""torch.library registration of the contrastive ops: schema, fake, autograd. Arguments as in ``chunked.py``.

The forward keeps three FP32 numbers per query; the backward recomputes the scores. No backend holds all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_kernels.backend import define_op
from grit_kernels.contrastive import chunked

_INPUTS = "Tensor queries, Tensor passages, Tensor temperature, Tensor targets, Tensor? query_ids, Tensor? passage_ids"
_OPTIONS = "bool in_batch_negatives, bool normalize"
_TRITON = "grit_kernels.contrastive.triton_contrastive"

define_op(
    f"contrastive_forward({_INPUTS}, {_OPTIONS}) -> (Tensor losses, Tensor positive, Tensor excess, Tensor best)",
    reference=chunked.contrastive_forward,
    triton=f"{_TRITON}:contrastive_forward",
)
define_op(
    f"contrastive_backward(Tensor grad_losses, {_INPUTS}, Tensor losses, Tensor positive, {_OPTIONS}) "
    "-> (Tensor grad_queries, Tensor grad_passages)",
    reference=chunked.contrastive_backward,
    triton=f"{_TRITON}:contrastive_backward",
)


@torch.library.register_fake("grit_kernels::contrastive_forward")
def _forward_fake(queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, positive, excess = (queries.new_empty(queries.shape[0], dtype=torch.float32) for _ in range(3))
    return losses, positive, excess, queries.new_empty(queries.shape[0], dtype=torch.int64)


@torch.library.register_fake("grit_kernels::contrastive_backward")
def _backward_fake(grad_losses: Tensor, queries: Tensor, passages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), passages.new_empty(passages.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, in_batch_negatives, normalize = inputs
    losses, positive, excess, best = output
    ctx.save_for_backward(*tensors, losses, positive, excess)
    ctx.options = (in_batch_negatives, normalize)
    ctx.mark_non_differentiable(positive, excess, best)


def _backward(ctx: Any, grad_losses: Tensor, *unused: Any) -> tuple[Any, ...]:
    *tensors, losses, positive, excess = ctx.saved_tensors
    grads = torch.ops.grit_kernels.contrastive_backward(
        grad_losses.contiguous(), *tensors, losses, positive, *ctx.options
    )
    temperature = tensors[2]
    grad_temperature = None
    if ctx.needs_input_grad[2]:
        grad_temperature = (-(grad_losses * excess).sum() / temperature).reshape(temperature.shape)
    return *grads, grad_temperature, None, None, None, None, None


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "the contrastive loss has no second derivative on the compiled backends; "
        "use `with grit_kernels.backend('reference')` for double backward"
    )


torch.library.register_autograd("grit_kernels::contrastive_forward", _backward, setup_context=_save)
torch.library.register_autograd("grit_kernels::contrastive_backward", _refuse_double_backward)
