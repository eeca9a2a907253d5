"""Aggregation of the next-token loss over tokens and samples. The per-token and contrastive losses themselves are grit_kernels'.

Source: GRIT, arXiv 2402.09906 equations 1-3 and the loss ablation (appendix).
"""

from __future__ import annotations

import torch
from torch import Tensor

from python_model.support.arguments import check_choice

GENERATIVE_LOSSES = ("mixed", "token", "sample")


def sample_weights(counts: Tensor, *, kind: str = "mixed", group: int = 0) -> Tensor:
    """Every aggregation as one weight per sample: the step's loss is ``sum_b weight[b] * sum of b's token losses``.

    So a step may be cut into chunks and shared among ranks in any way without changing its loss.

    Args:
        counts: int64 (samples), loss-carrying tokens of all samples of the step, on all ranks.
        kind: ``"token"``: sum of the token losses divided by the number of samples. ``"sample"``: mean over the samples of each
            one's token mean, which is 0 for a sample without loss-carrying tokens. ``"mixed"``: mean over all tokens.
        group: with ``"mixed"``, samples per token mean, and the loss is the mean of these means (the paper's
            "mix (group -> samples / group)"); 0: one mean over everything.

    Returns:
        float64 (samples); a sample without loss-carrying tokens has a weight that is multiplied by nothing.
    """
    check_choice("kind", kind, GENERATIVE_LOSSES)
    samples = counts.shape[0]
    counts = counts.double()
    if kind == "token":
        return torch.full_like(counts, 1 / samples)
    if kind == "sample":
        return 1 / (samples * counts.clamp(min=1))
    size = group or samples
    if samples % size:
        raise ValueError(f"group: expected a divisor of the number of samples ({samples}), got {group}")
    means = counts.view(-1, size).sum(dim=1).clamp(min=1)
    return (size / (samples * means)).repeat_interleave(size)
