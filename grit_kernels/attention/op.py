"""torch.library registration of switch attention: schema, fake, autograd.

A call holds B samples. ``q`` is (Tq, Hq, D), ``k`` and ``v`` are (Tk, Hkv, D); sample b owns the ``q_len[b]`` rows from row
``q_start[b]`` and the ``k_len[b]`` keys from row ``k_start[b]`` (int32 (B)). A pack and a padded batch differ in these
numbers only. ``left``, ``right``, ``hi``: see visibility.py. ``q_rows``: 0 for a pack; in a rectangular batch the number of
rows each sample owns, whose unused part gets out 0 and lse -inf (``k_rows`` likewise for the gradients of k and v).
``max_q``, ``max_k``: upper bounds of the lengths, so nothing is read back from the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import reference
from grit_kernels.backend import define_op, refuse_double_backward

_NUMBERS = (
    "Tensor q_start, Tensor q_len, Tensor k_start, Tensor k_len, Tensor left, Tensor right, Tensor? hi, "
    "SymInt q_rows, SymInt k_rows, SymInt max_q, SymInt max_k, float softmax_scale, float softcap"
)

define_op(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_NUMBERS}) -> (Tensor out, Tensor lse)",
    reference=reference.attention_forward,
    triton="grit_kernels.attention.triton_forward:attention_forward",
)
define_op(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_NUMBERS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    reference=reference.attention_backward,
    triton="grit_kernels.attention.triton_backward:attention_backward",
)


@torch.library.register_fake("grit_kernels::attention_forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("grit_kernels::attention_backward")
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_start, q_len, k_start, k_len, left, right, hi, *plain = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, q_start, q_len, k_start, k_len, left, right, hi)
    ctx.plain = plain
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *bounds = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv = torch.ops.grit_kernels.attention_backward(grad_out, grad_lse, q, k, v, out, lse, *bounds, *ctx.plain)
    return dq, dk, dv, *([None] * 13)


torch.library.register_autograd("grit_kernels::attention_forward", _backward, setup_context=_save)
refuse_double_backward("attention_backward", "switch attention")
