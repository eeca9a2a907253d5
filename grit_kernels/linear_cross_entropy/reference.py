"""The definition of the per-token loss in plain torch, with all logits; differentiable by autograd.

logits = cap(hidden W^T),  cap(s) = softcap * tanh(s / softcap)
loss_t = ln sum_v exp(logits_tv) - logits_{t, label_t},  0 where label_t == ignore_index
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_kernels.precision import without_autocast


@without_autocast
def linear_cross_entropy(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, ignore_index: int, softcap: float | None
) -> Tensor:
    """hidden (T, C), lm_head_weight (V, C), labels int64 (T) -> (T), float64 for float64 inputs, else float32."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(compute) @ lm_head_weight.to(compute).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    used = labels != ignore_index
    picked = logits.gather(1, torch.where(used, labels, 0)[:, None])[:, 0]
    return torch.where(used, torch.logsumexp(logits, dim=1) - picked, 0.0)
