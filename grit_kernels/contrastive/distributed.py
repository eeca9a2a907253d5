"""Gathering of queries and passages across ranks, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all ranks in rank order (uneven counts allowed); the backward keeps this rank's rows, times ``scale``.

    Every rank computes the same loss of all rows, so the gradient of this rank's rows is complete without communication.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int, group: Any, scale: float) -> Tensor:
        ctx.start, ctx.count, ctx.scale = sum(counts[:rank]), counts[rank], scale
        parts = [rows.new_empty((max(counts), *rows.shape[1:])) for _ in counts]
        padded = torch.zeros_like(parts[0])
        padded[: rows.shape[0]] = rows
        dist.all_gather(parts, padded.contiguous(), group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad[ctx.start : ctx.start + ctx.count] * ctx.scale, None, None, None, None


def _counts(rows: int, device: torch.device, group: Any) -> list[int]:
    mine = torch.tensor([rows], device=device)
    parts = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return [int(x) for x in torch.cat(parts)]


def gather(
    queries: Tensor,
    passages: Tensor,
    targets: Tensor,
    mask_ids: tuple[Tensor, Tensor] | None,
    weights: Tensor | None,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
    """Everything :func:`contrastive_loss` needs, of all ranks; targets are shifted to the gathered passages.

    DDP and FSDP average gradients over ranks, and each rank keeps only its own rows' part, so that part is multiplied by the
    world size.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    query_counts = _counts(queries.shape[0], queries.device, group)
    passage_counts = _counts(passages.shape[0], passages.device, group)

    def rows(x: Tensor, counts: list[int], factor: float = 1.0) -> Tensor:
        return _Gather.apply(x, counts, rank, group, factor)

    shifted = rows(targets.to(queries.device) + sum(passage_counts[:rank]), query_counts)
    ids = None if mask_ids is None else (rows(mask_ids[0], query_counts), rows(mask_ids[1], passage_counts))
    return (
        rows(queries, query_counts, float(world)),
        rows(passages, passage_counts, float(world)),
        shifted,
        ids,
        None if weights is None else rows(weights, query_counts),
    )
