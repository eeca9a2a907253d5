"""The definition of the contrastive loss in plain torch, with the whole score matrix; differentiable by autograd.

    score_ij = q_i . p_j / temperature            loss_i = ln sum_{j in C_i} exp(score_ij) - score_{i, target_i}

``C_i`` are the candidates of query i: all passages, less those that ``mask_ids`` marks as duplicates (a passage with the
query's id that is not its target), or with ``in_batch_negatives=False`` only the query's own group of passages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_kernels.precision import without_autocast


def candidate_mask(
    queries: int, passages: int, targets: Tensor, in_batch_negatives: bool, mask_ids: tuple[Tensor, Tensor] | None
) -> Tensor:
    """bool (Q, P), True where passage j is a candidate of query i."""
    device = targets.device
    column = torch.arange(passages, device=device)
    if in_batch_negatives:
        mask = torch.ones(queries, passages, dtype=torch.bool, device=device)
    else:
        group = passages // queries
        mask = column[None, :] // group == torch.arange(queries, device=device)[:, None]
    if mask_ids is not None:
        query_ids, passage_ids = mask_ids
        mask &= (query_ids[:, None] != passage_ids[None, :]) | (column[None, :] == targets[:, None])
    return mask


@without_autocast
def contrastive_scores(queries: Tensor, passages: Tensor, temperature: Tensor | float) -> Tensor:
    """(Q, P) scores in float64 for float64 inputs, float32 otherwise."""
    compute = torch.float64 if queries.dtype == torch.float64 else torch.float32
    return queries.to(compute) @ passages.to(compute).T / temperature


def contrastive_losses(
    queries: Tensor,
    passages: Tensor,
    temperature: Tensor | float,
    targets: Tensor,
    in_batch_negatives: bool,
    mask_ids: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Per-query losses (Q) and whether the target scores highest (bool (Q))."""
    scores = contrastive_scores(queries, passages, temperature)
    mask = candidate_mask(queries.shape[0], passages.shape[0], targets, in_batch_negatives, mask_ids)
    scores = scores.masked_fill(~mask, float("-inf"))
    positive = scores.gather(1, targets[:, None])[:, 0]
    return torch.logsumexp(scores, dim=1) - positive, scores.argmax(dim=1) == targets
