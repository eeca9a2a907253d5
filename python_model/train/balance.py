"""The gradients of the two objectives, kept apart until each is clipped, then added.

At the start of a run the contrastive gradient may be tens of times the generative one, and clipping their sum then leaves next to
nothing of the smaller. With a limit, each objective's gradient is clipped before the sum is formed, so both move the weights
from the first step. The limit of an objective is multiplied by the weight of its losses: the gradient of the loss itself is what
is limited, and then weighted, so the weights keep their effect when every gradient is longer than its limit. Norms are taken
over all trained weights, after summing over chunks and ranks, so they and the result do not depend on the number of either.

A cheaper form would scale one loss by running norms and keep no second gradient. But the norm of the objective that comes second
is only known from a gradient of its own, so the log would lose it, and the scale of a step would come from the steps before it,
which are the most unlike at the start, where the balance matters.

Cost: while the second objective is computed, the gradient of the first is held as well: 4 bytes per trained weight, sharded like
the weights (FSDP). Ranks sum gradients once per objective instead of once per step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ObjectiveGradients:
    """Collects the gradients that the objectives leave in ``parameters``, one objective at a time.

    Args:
        parameters: the trained weights; their ``grad`` must be None at the start.
        limit: norm that each objective's gradient is clipped to before they are added, times its weight; 0: none.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], limit: float) -> None:
        self.parameters, self.limit = parameters, limit
        self._kept: list[tuple[list[Tensor | None], float, float]] = []

    def take(self, weight: float = 1.0) -> float:
        """Move the accumulated gradients out of the parameters as those of one objective; returns their norm.

        ``weight`` is that of the objective's losses, which the gradients contain: they are clipped to ``limit * weight``, or with
        weight 0 (a router's loss alone) to ``limit``.
        """
        grads: list[Tensor | None] = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        norm = total_norm([grad for grad in grads if grad is not None])
        self._kept.append((grads, norm, self.limit * (weight or 1.0)))
        return norm

    @torch.no_grad()
    def add(self) -> list[float]:
        """Clip the gradients taken and put their sum into the parameters; returns the norms of what was added, one each."""
        added = []
        for grads, norm, limit in self._kept:
            factor = limit_factor(norm, limit)
            added.append(norm * factor)
            for p, grad in zip(self.parameters, grads, strict=True):
                if grad is None:
                    continue
                if factor != 1.0:
                    grad.mul_(factor)
                p.grad = grad if p.grad is None else p.grad.add_(grad)
        self._kept.clear()
        return added


def cosine(norms: Sequence[float], total: float) -> float | None:
    """Of two gradients with these norms, whose sum has the norm ``total``; None if one is missing, 0 or not finite."""
    if len(norms) != 2 or not all(norms) or not math.isfinite(sum(norms)):
        return None
    first, second = norms
    return (total**2 - first**2 - second**2) / (2.0 * first * second)


def limit_factor(norm: float, limit: float) -> float:
    """The factor that brings a gradient of this norm to at most ``limit`` (0: no limit).

    A norm that is not finite is left alone: the trainer stops at it.
    """
    if not limit or not math.isfinite(norm):
        return 1.0
    return min(1.0, limit / (norm + 1e-6))  # the 1e-6 is that of torch.nn.utils.clip_grad_norm_


def total_norm(grads: Sequence[Tensor]) -> float:
    """L2 norm over all elements of the gradients, including sharded ones: the same on all ranks."""
    if not grads:
        return 0.0
    norm: Any = torch.nn.utils.get_total_norm(grads)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
