"""What is pooled, and how."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grit_kernels.problem import Problem


@dataclass(frozen=True)
class PoolingProblem(Problem):
    """Sample b pools rows ``row_start[b] <= t < row_end[b]`` (int32 (B)) of hidden (T, C).

    ``weights`` (T) of the rows; the sum is divided by ``denominators[b]`` (B). ``norm_weight`` (C), ``norm_eps``: the model's
    final RMSNorm, applied to each row first; without a weight there is none.
    """

    hidden: Tensor
    weights: Tensor
    row_start: Tensor
    row_end: Tensor
    denominators: Tensor
    norm_weight: Tensor | None
    norm_eps: float
