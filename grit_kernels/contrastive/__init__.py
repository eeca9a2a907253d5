"""Contrastive (InfoNCE) loss with FP32 accumulation that never materialises all scores."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from grit_kernels.backend import forced_backend, use_reference
from grit_kernels.checks import check_device, dense_rows, described, is_integer, readable
from grit_kernels.contrastive import op as _op  # noqa: F401  (registers the ops)
from grit_kernels.contrastive import reference

__all__ = ["contrastive_loss"]


def contrastive_loss(
    queries: Tensor,
    passages: Tensor,
    *,
    temperature: float | Tensor = 0.02,
    targets: Tensor | None = None,
    in_batch_negatives: bool = True,
    mask_ids: tuple[Tensor, Tensor] | None = None,
    symmetric: bool = False,
    weights: Tensor | None = None,
    normalize: bool = False,
    process_group: Any = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE: ``loss_i = ln sum_j exp(q_i . p_j / temperature) - q_i . p_target(i) / temperature``.

    Args:
        queries: (Q, hidden) float32, bfloat16 or float16.
        passages: (P, hidden), laid out ``[pos_0, neg_0.., pos_1, neg_1..]``.
        temperature: positive number, or a scalar tensor that may be learnable.
        targets: int64 (Q), the passage that belongs to each query; defaults to ``i * (P // Q)``.
        in_batch_negatives: every passage is a negative of every other query. False: only the query's own group.
        mask_ids: ``(query_ids (Q), passage_ids (P))``; a passage with the query's id is not a negative for it.
        symmetric: add the reverse direction (positive passage to queries) and halve the sum.
        weights: (Q), weight of each query's loss; ``mean`` divides by their sum.
        normalize: L2-normalise both sides first.
        process_group: gather queries and passages across its ranks; every rank returns the loss over all queries, and gradients
            are scaled so that their mean over ranks (DDP, FSDP) is the gradient of that loss.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (per-query losses).
        return_accuracy: also return the share of queries whose target scores highest.

    On a CPU a mean or sum that needs gradients computes them together with the loss (three matrix products, not four) and holds
    them in FP32 until the backward, which only scales them; under ``torch.no_grad()`` none of this happens.

    Returns:
        float32 scalar (or (Q) for ``"none"``), and with ``return_accuracy`` a float32 scalar.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Source: GRIT, arXiv 2402.09906 equation 1.
    """
    _check(queries, passages)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected one of 'mean', 'sum', 'none', got {reduction!r}")
    _check_temperature(temperature)
    count, candidates = queries.shape[0], passages.shape[0]
    if targets is None:
        if candidates % count:
            raise ValueError(
                f"passages: expected a whole multiple of the {count} queries, or explicit targets, got {candidates} rows"
            )
        targets = torch.arange(count, device=queries.device) * (candidates // count)
    _check_targets(targets, count, candidates, in_batch_negatives)
    _check_rows(mask_ids, weights, count, candidates, queries.device)
    if process_group is not None:
        from grit_kernels.contrastive.distributed import gather

        # what is wrong on one rank would be cut, filled up or taken for another rank's row: it is checked above, before that
        queries, passages, targets, mask_ids, weights = gather(
            queries, passages, targets, mask_ids, weights, process_group
        )
        count, candidates = queries.shape[0], passages.shape[0]
        if not in_batch_negatives:  # groups of another size on another rank
            _check_targets(targets, count, candidates, in_batch_negatives)
    ids = None if mask_ids is None else _comparable(*mask_ids)
    targets = targets.to(device=queries.device, dtype=torch.int64).contiguous()
    # with known coefficients the gradients are computed along the way, without them by a backward pass of its own
    coefficients = None
    if reduction != "none" and _computes_gradients_early(queries, passages, weights):
        coefficients = _coefficients(weights, count, reduction, queries.device) / (2 if symmetric else 1)
    losses, hits = _losses(queries, passages, temperature, targets, in_batch_negatives, ids, normalize, coefficients)
    if symmetric:
        reverse_ids = None if ids is None else (ids[1][targets], ids[0])
        diagonal = torch.arange(count, device=queries.device)
        directions = (passages[targets], queries, temperature, diagonal, True, reverse_ids, normalize)
        reverse, _ = _losses(*directions, coefficients)
        losses = losses + reverse if coefficients is not None else (losses + reverse) / 2
    loss = losses if coefficients is not None else _reduce(losses, weights, reduction)
    return (loss, hits.float().mean()) if return_accuracy else loss


def _computes_gradients_early(queries: Tensor, passages: Tensor, weights: Tensor | None) -> bool:
    """Whether ``contrastive_step`` serves this call: C++ kernels, and gradients of queries or passages are wanted."""
    return (
        _op.STEP_IS_COMPILED
        and queries.device.type == "cpu"
        and queries.dtype != torch.float64
        and not use_reference(queries.device)
        and torch.is_grad_enabled()
        and (queries.requires_grad or passages.requires_grad)
        and not (weights is not None and weights.requires_grad)
    )


def _coefficients(weights: Tensor | None, count: int, reduction: str, device: torch.device) -> Tensor:
    """float32 (Q), contiguous: what each query's loss is multiplied by."""
    if weights is None:
        return torch.full((count,), 1.0 if reduction == "sum" else 1.0 / count, device=device)
    weights = weights.float().contiguous()
    return weights if reduction == "sum" else weights / weights.sum()


def _losses(
    queries: Tensor,
    passages: Tensor,
    temperature: float | Tensor,
    targets: Tensor,
    in_batch_negatives: bool,
    mask_ids: tuple[Tensor, Tensor] | None,
    normalize: bool,
    coefficients: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Per-query losses (Q), or with coefficients their sum, and whether the target scores highest (bool (Q))."""
    device = queries.device
    # float64 has no compiled kernel; asking for one of them is an error that the kernel reports
    if use_reference(device) or (queries.dtype == torch.float64 and forced_backend() is None):
        if normalize:
            compute = torch.float64 if queries.dtype == torch.float64 else torch.float32
            queries, passages = (torch.nn.functional.normalize(x.to(compute), dim=-1) for x in (queries, passages))
        return reference.contrastive_losses(queries, passages, temperature, targets, in_batch_negatives, mask_ids)
    if isinstance(temperature, Tensor):
        divisor = temperature.to(device=device, dtype=torch.float32)
    else:
        divisor = torch.full((), temperature, dtype=torch.float32, device=device)
    given = (dense_rows(queries), dense_rows(passages), divisor, targets, *(mask_ids or (None, None)))
    if coefficients is not None:
        loss, best, *_ = torch.ops.grit_kernels.contrastive_step(*given, coefficients, in_batch_negatives, normalize)
        return loss, best == targets
    losses, *_, best = torch.ops.grit_kernels.contrastive_forward(*given, in_batch_negatives, normalize)
    return losses, best == targets


def _comparable(query_ids: Tensor, passage_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids as int64, contiguous: equal exactly where the given ones are."""
    query_ids, passage_ids = query_ids.contiguous(), passage_ids.contiguous()
    if query_ids.is_floating_point() or passage_ids.is_floating_point():
        # adding 0 turns -0 into 0, so that equal floats have equal bits
        return (query_ids.double() + 0.0).view(torch.int64), (passage_ids.double() + 0.0).view(torch.int64)
    return query_ids.to(torch.int64), passage_ids.to(torch.int64)


def _reduce(losses: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if weights is None else losses.sum() / weights.sum()


def _check(queries: Tensor, passages: Tensor) -> None:
    for name, x in (("queries", queries), ("passages", passages)):
        if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"{name}: expected a float tensor (rows, hidden), got {described(x)}")
        if x.shape[0] == 0:
            raise ValueError(f"{name}: expected at least one row, got an empty batch")
        if x.shape[1] == 0:
            raise ValueError(f"{name}: expected at least one column, got {described(x)}")
    if passages.shape[1] != queries.shape[1] or passages.dtype != queries.dtype or passages.device != queries.device:
        raise ValueError(
            f"passages: expected the dtype, width and device of queries {described(queries)} on {queries.device}, "
            f"got {described(passages)} on {passages.device}"
        )


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature: expected a scalar, got shape {tuple(temperature.shape)}")
        if not readable(temperature):
            return
        temperature = temperature.detach()
    value = float(temperature)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"temperature: expected a finite number > 0, got {value}")


def _check_rows(
    mask_ids: tuple[Tensor, Tensor] | None, weights: Tensor | None, count: int, candidates: int, device: torch.device
) -> None:
    if mask_ids is not None:
        for ids_of_rows in mask_ids:
            check_device("mask_ids", ids_of_rows, device)
        if mask_ids[0].shape != (count,) or mask_ids[1].shape != (candidates,):
            raise ValueError(
                f"mask_ids: expected shapes ({count},) and ({candidates},), "
                f"got {tuple(mask_ids[0].shape)} and {tuple(mask_ids[1].shape)}"
            )
    if weights is not None:
        check_device("weights", weights, device)
        if weights.shape != (count,):
            raise ValueError(f"weights: expected ({count},), got shape {tuple(weights.shape)}")


def _check_targets(targets: Tensor, count: int, candidates: int, in_batch_negatives: bool) -> None:
    if not is_integer(targets, count):
        raise ValueError(f"targets: expected int64 ({count},), got {described(targets)}")
    if not in_batch_negatives and candidates % count:
        raise ValueError(
            f"passages: expected a whole multiple of the queries, got {candidates} rows for {count} queries"
        )
    if readable(targets):
        if bool(((targets < 0) | (targets >= candidates)).any()):
            raise ValueError(f"targets: expected values in 0..{candidates - 1}, got {targets.tolist()}")
        if not in_batch_negatives:
            group = candidates // count
            if bool((targets // group != torch.arange(count, device=targets.device)).any()):
                raise ValueError("targets: with in_batch_negatives=False each target must lie in its query's own group")
