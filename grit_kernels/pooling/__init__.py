"""Pooling of hidden states to one FP32 vector per sample, skipping each sample's instruction tokens."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from grit_kernels.backend import use_reference
from grit_kernels.checks import (
    check_cu_seqlens,
    check_mask,
    dense_rows,
    described,
    is_integer,
    neither_0_nor_1,
    readable,
)
from grit_kernels.pooling import op as _op  # noqa: F401  (registers the ops)
from grit_kernels.pooling import reference
from grit_kernels.pooling.problem import PoolingProblem
from grit_kernels.visibility import sample_ids

__all__ = ["pool"]

METHODS = ("mean", "weightedmean", "lasttoken", "cls")


def pool(
    hidden_states: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    instruction_lens: Tensor | None = None,
    method: Literal["mean", "weightedmean", "lasttoken", "cls"] = "mean",
    normalize: bool = False,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    empty: Literal["error", "zeros"] = "error",
) -> Tensor:
    """One float32 vector per sample from its hidden states; all sums are FP32 whatever the input dtype.

    With t running over the pooled tokens of a sample (its real tokens without the first ``instruction_lens[b]``):

    * ``mean``:          ``sum_t h_t / n``
    * ``weightedmean``:  ``sum_t r_t h_t / sum_t r_t``, ``r_t = 1, 2, 3, ..`` from the first pooled token on
    * ``lasttoken``:     ``h`` of the last real token
    * ``cls``:           ``h`` of the first real token (the instruction is not skipped)

    Args:
        hidden_states: (B, T, hidden) or, with ``cu_seqlens``, a pack (tokens, hidden).
        attention_mask: (B, T), 0 at padding and 1 at real tokens; left padding and holes are fine. Only with 3-D input.
        cu_seqlens: int32 (B + 1), where each sample of a pack starts.
        instruction_lens: int (B), leading real tokens that attend but are not pooled. Default 0.
        method: one of the four above.
        normalize: divide each vector by its L2 norm (``eps`` 1e-12).
        norm_weight: (hidden), fuses the model's final RMSNorm: pools ``h_t * rsqrt(mean(h_t^2) + norm_eps) * norm_weight``.
        norm_eps: epsilon of that norm.
        empty: a sample with nothing to pool is an ``"error"`` (seen where the lengths lie on the CPU; a GPU batch gives zeros)
            or pools to ``"zeros"``.

    Returns:
        float32 (B, hidden); float64 for float64 input on the reference backend.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Source: GRIT, arXiv 2402.09906 section 2; the formulas are those of its public implementation.
    """
    hidden, starts, real = _flatten(hidden_states, attention_mask, cu_seqlens)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if empty not in ("error", "zeros"):
        raise ValueError(f"empty: expected 'error' or 'zeros', got {empty!r}")
    if not (math.isfinite(norm_eps) and norm_eps >= 0):
        raise ValueError(f"norm_eps: expected a finite number >= 0, got {norm_eps}")
    if norm_weight is not None:
        if norm_weight.shape != hidden.shape[1:] or norm_weight.device != hidden.device:
            raise ValueError(
                f"norm_weight: expected ({hidden.shape[1]},) on {hidden.device}, "
                f"got {tuple(norm_weight.shape)} on {norm_weight.device}"
            )
        norm_weight = norm_weight.contiguous()
    skip = _instruction_lens(instruction_lens, starts.shape[0] - 1, hidden.device)
    weights, row_start, row_end, denominators = _pooling_weights(starts, real, skip, method, hidden.shape[0])
    if empty == "error" and readable(denominators):
        bad = (denominators <= 0).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"instruction_lens: samples {bad[:10]} have no token left to pool (empty, or the instruction covers them); "
                "empty='zeros' gives zeros instead"
            )
    problem = PoolingProblem(hidden, weights, row_start, row_end, denominators, norm_weight, norm_eps)
    if use_reference(hidden.device):
        pooled = reference.pool_forward(problem)
    elif hidden.dtype == torch.float64:
        raise TypeError(
            "hidden_states: expected float32, bfloat16 or float16; torch.float64 needs `with grit_kernels.backend('reference')`"
        )
    else:
        pooled = torch.ops.grit_kernels.pool_forward(*problem.flat())
    return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled


def _flatten(
    hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden (T, C), starts int64 (B + 1), real tokens bool (T) or None when all are real."""
    if not isinstance(hidden_states, Tensor) or hidden_states.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
    ):
        raise TypeError(
            f"hidden_states: expected a float32, bfloat16 or float16 tensor, got {described(hidden_states)}"
        )
    shape = tuple(hidden_states.shape)
    if cu_seqlens is not None:
        if hidden_states.ndim != 2:
            raise ValueError(f"hidden_states: expected (tokens, hidden) with cu_seqlens, got shape {shape}")
        if attention_mask is not None:
            raise ValueError("attention_mask: a pack (cu_seqlens) has no padding to mask")
        check_cu_seqlens("cu_seqlens", cu_seqlens, shape[0])
        return dense_rows(hidden_states), cu_seqlens.to(hidden_states.device, torch.int64), None
    if hidden_states.ndim != 3 or shape[0] == 0:
        raise ValueError(
            f"hidden_states: expected (B, T, hidden), or (tokens, hidden) with cu_seqlens, got shape {shape}"
        )
    batch, length, _ = shape
    real = None
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch, length):
            raise ValueError(f"attention_mask: expected {(batch, length)}, got {tuple(attention_mask.shape)}")
        if readable(attention_mask):
            check_mask("attention_mask", attention_mask, int(neither_0_nor_1(attention_mask).sum()))
        real = attention_mask.to(hidden_states.device).reshape(-1) != 0
    starts = torch.arange(batch + 1, device=hidden_states.device) * length
    return dense_rows(hidden_states.reshape(batch * length, shape[2])), starts, real


def _instruction_lens(lens: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if lens is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    if not is_integer(lens, batch):
        raise ValueError(f"instruction_lens: expected int32 ({batch},), got {described(lens)}")
    if readable(lens) and bool((lens < 0).any()):
        raise ValueError(f"instruction_lens: expected values >= 0, got {lens.tolist()}")
    return lens.to(device=device, dtype=torch.int64)


def _pooling_weights(
    starts: Tensor, real: Tensor | None, skip: Tensor, method: str, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight per token, range of rows that may have weight, and divisor per sample; a few (tokens)-sized torch ops."""
    begin, end = starts[:-1], starts[1:]
    if tokens == 0:
        zero = torch.zeros_like(begin)
        return torch.zeros(0, device=starts.device), zero.int(), zero.int(), zero.float()
    if real is None and method != "weightedmean":
        return _range_weights(begin, end, skip, method, tokens)
    index = torch.arange(tokens, device=starts.device)
    sample = sample_ids(starts, tokens)
    if real is None:
        rank = index - begin[sample] + 1  # 1 for the first real token of the sample
        count = end - begin
    else:
        total = torch.cat([real.new_zeros(1, dtype=torch.int64), real.cumsum(0)])
        rank = total[1:] - total[begin][sample]
        count = total[end] - total[begin]
    here = torch.ones_like(rank, dtype=torch.bool) if real is None else real
    if method == "cls":
        chosen = here & (rank == 1)
    elif method == "lasttoken":
        chosen = here & (rank == count[sample]) & (rank > skip[sample])
    else:
        chosen = here & (rank > skip[sample])
    left = (count - skip).clamp(min=0)
    if method == "weightedmean":
        weights = torch.where(chosen, rank - skip[sample], 0).to(torch.float32)
        denominators = (left * (left + 1) // 2).to(torch.float32)
    else:
        weights = chosen.to(torch.float32)
        pooled = left if method != "cls" else count
        denominators = (pooled if method == "mean" else pooled.clamp(max=1)).to(torch.float32)
    row_start = begin
    if real is None:  # without holes the pooled rows are known: nothing else is read
        row_start = torch.minimum(begin + skip, end)
    return weights, row_start.to(torch.int32), end.to(torch.int32), denominators


def _range_weights(
    begin: Tensor, end: Tensor, skip: Tensor, method: str, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same without holes and with equal weights: the ranges alone say what is pooled."""
    if method == "cls":
        row_start, row_end = begin, torch.minimum(begin + 1, end)
    else:
        row_start, row_end = torch.minimum(begin + skip, end), end
        if method == "lasttoken":
            row_start = torch.maximum(row_start, end - 1)
    denominators = (row_end - row_start).to(torch.float32)
    return torch.ones(tokens, device=begin.device), row_start.to(torch.int32), row_end.to(torch.int32), denominators
