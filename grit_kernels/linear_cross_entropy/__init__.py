"""Per-token next-token loss in FP32 that never materialises all logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grit_kernels.backend import use_reference
from grit_kernels.checks import check_device, described, readable
from grit_kernels.linear_cross_entropy import op as _op  # noqa: F401  (registers the ops)
from grit_kernels.linear_cross_entropy import reference
from grit_kernels.precision import autocast_dtype

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """``loss_t = ln sum_v exp(hidden_t . W_v) - hidden_t . W_label(t)``, float32 (tokens), without all logits in memory.

    Args:
        hidden: (tokens, hidden) float32, bfloat16 or float16.
        lm_head_weight: (vocabulary, hidden), same dtype.
        labels: int64 (tokens); already shifted, so ``labels[t]`` is what position t predicts.
        ignore_index: label of tokens without a loss; they give 0.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).

    Returns:
        float32 (tokens).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.
    """
    if not isinstance(hidden, Tensor) or hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: expected a float tensor (tokens, hidden), got {described(hidden)}")
    if hidden.shape[1] == 0:
        raise ValueError(f"hidden: expected at least one column, got {described(hidden)}")
    if not isinstance(lm_head_weight, Tensor) or lm_head_weight.ndim != 2 or lm_head_weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"lm_head_weight: expected (vocabulary, {hidden.shape[1]}), got {described(lm_head_weight)}")
    if not lm_head_weight.shape[0]:
        raise ValueError(f"lm_head_weight: expected at least one row, got {described(lm_head_weight)}")
    if not isinstance(labels, Tensor) or labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected torch.int64 ({hidden.shape[0]},), got {described(labels)}")
    check_device("lm_head_weight", lm_head_weight, hidden.device)
    check_device("labels", labels, hidden.device)
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap}")
    dtype = autocast_dtype(hidden.device)
    if dtype is not None and hidden.dtype != torch.float64:
        hidden, lm_head_weight = hidden.to(dtype), lm_head_weight.to(dtype)
    if lm_head_weight.dtype != hidden.dtype:
        raise TypeError(f"lm_head_weight: expected {hidden.dtype} as hidden has, got {lm_head_weight.dtype}")
    if readable(labels):
        used = labels[labels != ignore_index]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= lm_head_weight.shape[0]):
            raise ValueError(
                f"labels: expected {ignore_index} or 0..{lm_head_weight.shape[0] - 1}, "
                f"got values in {int(used.min())}..{int(used.max())}"
            )
    if use_reference(hidden.device) or hidden.dtype == torch.float64:
        return reference.linear_cross_entropy(hidden, lm_head_weight, labels, ignore_index, softcap)
    return torch.ops.grit_kernels.linear_cross_entropy_forward(hidden, lm_head_weight, labels, ignore_index, softcap)[0]
