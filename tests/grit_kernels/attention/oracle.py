"""An oracle of switch attention that shares no code with the package: float64, one row at a time, rule spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Case:
    """A batch of samples as lists; ``first_slots``: where each sample's keys start in a padded layout."""

    q: list[Tensor]  # (len_q, H_q, D)
    k: list[Tensor]  # (len_k, H_kv, D)
    v: list[Tensor]
    causal: list[bool]
    window: list[tuple[int, int]]
    hi: list[list[int]] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None  # (H_q), one more score of every row that sees a key


def visible_keys(row: int, len_q: int, len_k: int, causal: bool, window: tuple[int, int], hi: int | None) -> list[int]:
    position = row + len_k - len_q
    keys = []
    for j in range(len_k):
        if window[0] >= 0 and position - j > window[0]:
            continue
        if hi is not None:
            if j >= hi:
                continue
        elif causal:
            if j > position:
                continue
        elif window[1] >= 0 and j - position > window[1]:
            continue
        keys.append(j)
    return keys


def attention(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and log-sum-exps per sample, computed eagerly in ``dtype``; differentiable."""
    outs, lses = [], []
    for b, (q, k, v) in enumerate(zip(case.q, case.k, case.v, strict=True)):
        (len_q, heads, dim), len_k = q.shape, k.shape[0]
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        rows, row_lse = [], []
        for r in range(len_q):
            hi = None if case.hi is None else case.hi[b][r]
            keys = visible_keys(r, len_q, len_k, case.causal[b], case.window[b], hi)
            if not keys:
                rows.append(torch.zeros(heads, dim, dtype=dtype))
                row_lse.append(torch.full((heads,), float("-inf"), dtype=dtype))
                continue
            score = torch.einsum("hd,khd->hk", q[r], k[keys]) * (case.softmax_scale or dim**-0.5)
            if case.softcap:
                score = case.softcap * torch.tanh(score / case.softcap)
            if case.sinks is not None:
                score = torch.cat([score, case.sinks.to(dtype)[:, None]], dim=1)
            rows.append(torch.einsum("hk,khd->hd", score.softmax(dim=-1)[:, : len(keys)], v[keys]))
            row_lse.append(score.logsumexp(dim=-1))
        outs.append(torch.stack(rows) if rows else torch.zeros(0, heads, dim, dtype=dtype))
        lses.append(torch.stack(row_lse) if rows else torch.zeros(0, heads, dtype=dtype))
    return outs, lses


def gradients(
    case: Case, grads: Sequence[Tensor], dtype: torch.dtype = torch.float64
) -> tuple[list[list[Tensor]], Tensor | None]:
    """d(sum out * grads) by autograd, in ``dtype``: per sample [dq, dk, dv], and that of the sinks."""
    leaves = [[x.detach().to(dtype).requires_grad_() for x in group] for group in (case.q, case.k, case.v)]
    sinks = [] if case.sinks is None else [case.sinks.detach().to(dtype).requires_grad_()]
    copy = Case(*leaves, case.causal, case.window, case.hi, case.softmax_scale, case.softcap, *sinks)
    outs, _ = attention(copy, dtype)
    total = sum((o * g.to(dtype)).sum() for o, g in zip(outs, grads, strict=True))
    flat = [*(x for group in leaves for x in group), *sinks]
    if not isinstance(total, Tensor) or not total.requires_grad:
        found: list[Tensor | None] = [None] * len(flat)
    else:
        found = list(torch.autograd.grad(total, flat, allow_unused=True))
    full = [torch.zeros_like(x) if g is None else g for x, g in zip(flat, found, strict=True)]
    batch = len(case.q)
    by_sample = [[full[b], full[batch + b], full[2 * batch + b]] for b in range(batch)]
    return by_sample, full[-1] if sinks else None


def padded(parts: Sequence[Tensor], length: int, poison: float = float("nan"), first: int = 0) -> Tensor:
    """(B, length, ...) with each part from row ``first`` on and ``poison`` everywhere else."""
    out = torch.full((len(parts), length, *parts[0].shape[1:]), poison, dtype=parts[0].dtype)
    for b, part in enumerate(parts):
        out[b, first : first + part.shape[0]] = part
    return out


def make_case(
    lens_q: Sequence[int],
    lens_k: Sequence[int],
    causal: Sequence[bool],
    *,
    window: Sequence[tuple[int, int]] | None = None,
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    hi: list[list[int]] | None = None,
    sinks: Tensor | None = None,
) -> Case:
    """Random samples; values are rounded to ``dtype`` once, so every implementation sees the same numbers."""

    def draw(length: int, count: int) -> Tensor:
        return torch.randn(length, count, dim).to(dtype)

    return Case(
        [draw(n, heads[0]) for n in lens_q],
        [draw(n, heads[1]) for n in lens_k],
        [draw(n, heads[1]) for n in lens_k],
        list(causal),
        list(window) if window is not None else [(-1, -1)] * len(lens_q),
        hi,
        softmax_scale,
        softcap,
        None if sinks is None else sinks.to(dtype),
    )
