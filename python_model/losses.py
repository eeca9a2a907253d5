"""Aggregation of the next-token loss. The per-token and contrastive losses themselves are grit_kernels'.

Source: GRIT, arXiv 2402.09906 equations 1-3 and the loss ablation (appendix).
"""

from __future__ import annotations

import torch
from torch import Tensor

from python_model.prompts import IGNORE_INDEX

GENERATIVE_LOSSES = ("mixed", "token", "sample")


def generative_loss(
    token_losses: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str = "mixed",
    token_count: int | Tensor | None = None,
) -> Tensor:
    """One scalar out of the per-token losses (float32 (tokens)) of generative samples.

    * ``"mixed"``: mean over the loss-carrying tokens of the micro-batch, so that averaging n micro-batches gives the paper's
      "mix (rows -> n)". With ``token_count`` (loss-carrying tokens of the whole step on all ranks) it is
      ``sum / token_count``, which summed over micro-batches and ranks is the exact token mean of the step.
    * ``"token"``: sum over tokens divided by the number of samples.
    * ``"sample"``: mean over samples of each sample's token mean.

    Samples without a loss-carrying token count as 0 in ``"sample"``; a batch without any gives 0, never NaN.
    """
    _check_kind(kind)
    if token_count is not None and kind != "mixed":
        raise ValueError(f"token_count: only kind 'mixed' divides by it, got kind {kind!r}")
    samples = cu_seqlens.shape[0] - 1
    used = labels != IGNORE_INDEX
    total = token_losses.sum()
    if kind == "token":
        return total / samples
    if kind == "mixed":
        count = used.sum() if token_count is None else token_count
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)
    sample = torch.repeat_interleave(torch.arange(samples, device=labels.device), cu_seqlens.diff().to(labels.device))
    sums = token_losses.new_zeros(samples).index_add(0, sample, token_losses)
    counts = token_losses.new_zeros(samples).index_add(0, sample, used.to(token_losses.dtype))
    return (sums / counts.clamp(min=1)).sum() / samples


def sample_weights(counts: Tensor, *, kind: str = "mixed", group: int = 0) -> Tensor:
    """Every aggregation as one weight per sample: the step's loss is ``sum_b weight[b] * sum of b's token losses``.

    So a step may be cut into chunks and shared among ranks in any way without changing its loss.

    Args:
        counts: int64 (samples), loss-carrying tokens of all samples of the step, on all ranks.
        kind: as in :func:`generative_loss`.
        group: with ``"mixed"``, samples per token mean, and the loss is the mean of these means (the paper's
            "mix (group -> samples / group)"); 0: one mean over everything.

    Returns:
        float64 (samples); a sample without loss-carrying tokens has a weight that is multiplied by nothing.
    """
    _check_kind(kind)
    samples = counts.shape[0]
    counts = counts.double()
    if kind == "token":
        return torch.full_like(counts, 1 / samples)
    if kind == "sample":
        return 1 / (samples * counts.clamp(min=1))
    size = group or samples
    if samples % size:
        raise ValueError(f"group: got {group}, accepted is a divisor of the number of samples ({samples})")
    means = counts.view(-1, size).sum(dim=1).clamp(min=1)
    return (size / (samples * means)).repeat_interleave(size)


def _check_kind(kind: str) -> None:
    if kind not in GENERATIVE_LOSSES:
        raise ValueError(f"kind: got {kind!r}, accepted are {', '.join(map(repr, GENERATIVE_LOSSES))}")
