"""The definition of the pooling op in plain torch, differentiable by autograd.

    out_b = (sum_{row_start_b <= t < row_end_b} w_t x_t) / denominators_b
    x_t   = hidden_t,  or with the model's final RMSNorm fused:  hidden_t * rsqrt(mean(hidden_t^2) + norm_eps) * norm_weight

Sums in float64 for float64 inputs and in float32 otherwise. A row of weight 0 contributes nothing whatever it holds; a
sample with ``denominators_b <= 0`` gives zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grit_kernels.pooling.problem import PoolingProblem


def _samples(problem: PoolingProblem) -> Iterator[tuple[int, int, float]]:
    """First row, end of the rows and denominator of each sample."""
    return zip(*(x.tolist() for x in (problem.row_start, problem.row_end, problem.denominators)), strict=True)


def pool_forward(problem: PoolingProblem) -> Tensor:
    """(B, C)."""
    hidden, weights, norm_weight = problem.hidden, problem.weights, problem.norm_weight
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = []
    for start, end, denominator in _samples(problem):
        if start >= end or denominator <= 0:
            rows.append(hidden.new_zeros(hidden.shape[1], dtype=compute))
            continue
        w = weights[start:end].to(compute)
        # a row without weight may hold NaN: it is replaced before any arithmetic, so its gradient is 0 as well
        x = torch.where((w != 0)[:, None], hidden[start:end].to(compute), 0.0)
        if norm_weight is not None:
            x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + problem.norm_eps) * norm_weight.to(compute)
        rows.append((w[:, None] * x).sum(dim=0) / denominator)
    return torch.stack(rows)


def pool_backward(grad_out: Tensor, problem: PoolingProblem) -> tuple[Tensor, Tensor]:
    """The closed form: (grad_hidden (T, C) in hidden's dtype, grad_norm_weight (C) float32, empty without norm_weight).

    With ``g = w_t / denominators_b * grad_out_b`` and, when the norm is fused, ``n = hidden_t * r``, ``r = rsqrt(..)``:
    grad_hidden_t = g without norm, else  r * (g * norm_weight - n * mean(n * g * norm_weight));  grad_norm_weight = sum_t g * n.
    """
    hidden, weights, norm_weight = problem.hidden, problem.weights, problem.norm_weight
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    grad_hidden = torch.zeros(hidden.shape, dtype=compute, device=hidden.device)
    size = 0 if norm_weight is None else hidden.shape[1]
    grad_norm_weight = torch.zeros(size, dtype=compute, device=hidden.device)
    for b, (start, end, denominator) in enumerate(_samples(problem)):
        if start >= end or denominator <= 0:
            continue
        w = weights[start:end].to(compute)
        used = (w != 0)[:, None]
        g = w[:, None] / denominator * grad_out[b].to(compute)
        if norm_weight is not None:
            x = torch.where(used, hidden[start:end].to(compute), 0.0)
            r = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + problem.norm_eps)
            n = x * r
            grad_norm_weight += (g * n).sum(dim=0)
            g = g * norm_weight.to(compute)
            g = r * (g - n * (n * g).mean(dim=1, keepdim=True))
        grad_hidden[start:end] += torch.where(used, g, 0.0)
    if compute == torch.float32:
        grad_norm_weight = grad_norm_weight.float()
    return grad_hidden.to(hidden.dtype), grad_norm_weight
