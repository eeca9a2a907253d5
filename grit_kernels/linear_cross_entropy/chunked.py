"""Per-token loss in chunks of rows: only the logits of one chunk exist at a time, forward and backward.

The forward keeps each row's highest logit and the log-sum-exp above it (FP32); the backward recomputes a chunk's logits. Matrix
products take the input dtype, everything after them is FP32, the weight gradient is summed in FP32. Logits of 16-bit inputs leave
the product in FP32 on a GPU; plain torch on the CPU rounds them to the inputs' dtype first.

With the compiled library the CPU runs the contrastive kernels instead: without a cap this loss is the contrastive one of
queries ``hidden`` and passages ``weight`` at temperature 1, so its logits are FP32 and never reach memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_kernels import _library
from grit_kernels.checks import dense_rows

CHUNK_BYTES = 64 << 20
"""Upper bound of the FP32 logits held at once; at a vocabulary of 49152 that is 341 rows."""


def _chunk_rows(vocabulary: int) -> int:
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in FP32, not rounded to a 16-bit dtype on the way where torch can.

    On a CPU with AMX torch's bfloat16 product reads what lies between strided rows, and a NaN there reaches the result; so
    operands are contiguous or transposes of contiguous ones.
    """
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _use_contrastive(hidden: Tensor, softcap: float | None) -> bool:
    return softcap is None and hidden.device.type == "cpu" and hidden.shape[0] > 0 and _library.status().loaded


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, highest logits and ln sum exp(logits - highest), all float32 (T)."""
    rows = hidden.shape[0]
    if _use_contrastive(hidden, softcap):
        used = labels != ignore_index
        each, top, log_total, *_ = torch.ops.grit_kernels.contrastive_forward(
            dense_rows(hidden),
            dense_rows(weight),
            hidden.new_ones((), dtype=torch.float32),
            torch.where(used, labels, 0),
            None,
            None,
            True,
            False,
        )
        return torch.where(used, each, 0.0), top, log_total
    hidden, weight = hidden.contiguous(), weight.contiguous()  # see _product
    losses = torch.zeros(rows, dtype=torch.float32, device=hidden.device)
    top, log_total = torch.zeros_like(losses), torch.zeros_like(losses)
    step = _chunk_rows(weight.shape[0])
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        logits = _cap(_product(hidden[chunk], weight.T), softcap)
        top[chunk] = logits.amax(dim=1)
        used = labels[chunk] != ignore_index
        picked = logits.gather(1, torch.where(used, labels[chunk], 0)[:, None])[:, 0]
        above = top[chunk] - picked
        log_total[chunk] = logits.sub_(top[chunk, None]).exp_().sum(dim=1).log_()
        losses[chunk] = torch.where(used, above + log_total[chunk], 0.0)
    return losses, top, log_total


def linear_cross_entropy_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    top: Tensor,
    log_total: Tensor,
    ignore_index: int,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight (empty where not needed): (softmax - onehot) * grad, through the cap."""
    used = labels != ignore_index
    scale = torch.where(used, grad.float(), 0.0)
    if need_hidden and need_weight and _use_contrastive(hidden, softcap):
        one = hidden.new_ones((), dtype=torch.float32)
        arguments = (one, torch.where(used, labels, 0), None, None, top, log_total, True, False)
        return torch.ops.grit_kernels.contrastive_backward(scale, dense_rows(hidden), dense_rows(weight), *arguments)
    hidden, weight = hidden.contiguous(), weight.contiguous()  # see _product
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=torch.float32, device=weight.device)
    step = _chunk_rows(weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        chunk = slice(start, start + step)
        logits, slope = _product(hidden[chunk], weight.T), None
        if softcap is not None:
            # from tanh itself: near 1 a product with the cap, divided by it again, would cost the difference its digits
            slope = 1 - logits.div_(softcap).tanh_().square()
            logits.mul_(softcap)
        p = logits.sub_(top[chunk, None]).sub_(log_total[chunk, None]).exp_()
        target = torch.where(used[chunk], labels[chunk], 0)[:, None]
        p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
        p.mul_(scale[chunk, None])
        if slope is not None:
            p.mul_(slope)
        p = p.to(hidden.dtype)
        if need_hidden:
            grad_hidden[chunk] = p @ weight
        if need_weight:
            grad_weight += _product(p.T, hidden[chunk])
    return grad_hidden, grad_weight.to(weight.dtype)
