"""torch.library registration of the contrastive ops: schema, fake, autograd.

The forward keeps four FP32 numbers per query; the backward recomputes the scores. No backend holds all of them.

``contrastive_step`` is for the CPU: loss and gradients of a weighted sum of the per-query losses from three matrix products.
Forward and backward together need four, since the backward must recompute the scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_kernels import _library
from grit_kernels.backend import define_op, interpreting, refuse_double_backward
from grit_kernels.contrastive import chunked
from grit_kernels.contrastive.problem import ContrastiveProblem

_INPUTS, _OPTIONS = ContrastiveProblem.TENSORS, ContrastiveProblem.OPTIONS
_TRITON = "grit_kernels.contrastive.triton_contrastive"

define_op(
    f"contrastive_forward({_INPUTS}, {_OPTIONS}) -> (Tensor losses, Tensor top, Tensor log_total, Tensor excess, Tensor best)",
    reference=chunked.contrastive_forward,
    triton=f"{_TRITON}:contrastive_forward",
    problem=ContrastiveProblem,
)
define_op(
    f"contrastive_backward(Tensor grad_losses, {_INPUTS}, Tensor top, Tensor log_total, {_OPTIONS}) "
    "-> (Tensor grad_queries, Tensor grad_passages)",
    reference=chunked.contrastive_backward,
    triton=f"{_TRITON}:contrastive_backward",
    problem=ContrastiveProblem,
)
define_op(
    f"contrastive_step({_INPUTS}, Tensor coefficients, {_OPTIONS}) "
    "-> (Tensor loss, Tensor best, Tensor grad_queries, Tensor grad_passages, Tensor grad_temperature)",
    reference=chunked.contrastive_step,
    problem=ContrastiveProblem,
)
define_op(
    "contrastive_scale(Tensor grad_loss, Tensor queries, Tensor passages, Tensor grad_queries, Tensor grad_passages, "
    "Tensor grad_temperature) -> (Tensor, Tensor, Tensor)",
    reference=chunked.contrastive_scale,
)


STEP_IS_COMPILED = _library.status().loaded and not interpreting()
"""Elsewhere ``contrastive_step`` would only save the recomputation, and a loss without a backward would pay for gradients."""


@torch.library.register_fake("grit_kernels::contrastive_forward")
def _forward_fake(queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses, top, log_total, excess = (queries.new_empty(queries.shape[0], dtype=torch.float32) for _ in range(4))
    return losses, top, log_total, excess, queries.new_empty(queries.shape[0], dtype=torch.int64)


@torch.library.register_fake("grit_kernels::contrastive_backward")
def _backward_fake(grad_losses: Tensor, queries: Tensor, passages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), passages.new_empty(passages.shape)


@torch.library.register_fake("grit_kernels::contrastive_step")
def _step_fake(queries: Tensor, passages: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, temperature = (queries.new_empty((), dtype=torch.float32) for _ in range(2))
    grad_q, grad_p = (x.new_empty(x.shape, dtype=torch.float32) for x in (queries, passages))
    return loss, queries.new_empty(queries.shape[0], dtype=torch.int64), grad_q, grad_p, temperature


@torch.library.register_fake("grit_kernels::contrastive_scale")
def _scale_fake(grad_loss: Tensor, queries: Tensor, passages: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return queries.new_empty(queries.shape), passages.new_empty(passages.shape), grad_loss.new_empty(())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, in_batch_negatives, normalize = inputs
    _, top, log_total, excess, best = output
    ctx.save_for_backward(*tensors, top, log_total, excess)
    ctx.options = (in_batch_negatives, normalize)
    ctx.mark_non_differentiable(top, log_total, excess, best)


def _backward(ctx: Any, grad_losses: Tensor, *unused: Any) -> tuple[Any, ...]:
    *tensors, top, log_total, excess = ctx.saved_tensors
    grads = torch.ops.grit_kernels.contrastive_backward(
        grad_losses.contiguous(), *tensors, top, log_total, *ctx.options
    )
    temperature = tensors[2]
    grad_temperature = None
    if ctx.needs_input_grad[2]:
        grad_temperature = (-(grad_losses * excess).sum() / temperature).reshape(temperature.shape)
    return *grads, grad_temperature, None, None, None, None, None


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, best, *grads = output
    ctx.save_for_backward(*inputs[:3], *grads)
    ctx.mark_non_differentiable(best, *grads)


def _step_backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Any, ...]:
    queries, passages, temperature, *grads = ctx.saved_tensors
    found = torch.ops.grit_kernels.contrastive_scale(grad_loss, queries, passages, *grads)
    return found[0], found[1], found[2].reshape(temperature.shape), *[None] * 6


torch.library.register_autograd("grit_kernels::contrastive_forward", _backward, setup_context=_save)
torch.library.register_autograd("grit_kernels::contrastive_step", _step_backward, setup_context=_save_step)
refuse_double_backward("contrastive_backward", "the contrastive loss")
refuse_double_backward("contrastive_scale", "the contrastive loss")
