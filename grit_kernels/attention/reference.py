"""The definition of switch attention in plain torch: per sample, a dense mask, a softmax.

    score = cap(softmax_scale * q . k),  cap(s) = softcap * tanh(s / softcap) if softcap > 0 else s
    out_i = sum_j softmax_j(score_ij) v_j over the visible keys j of row i,   lse_i = ln sum_j exp(score_ij)

A sink is one more score of every row of a head that sees a key: it takes part in the softmax and in lse, and no value belongs to
it. A row that sees no key gives 0 and -inf with a sink as well. A sink of -inf is none; inf gives NaN, as in torch.softmax.

Computed in float64 for float64 inputs and in float32 otherwise; differentiable by autograd, twice as well. Every other
implementation is tested against this file.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.precision import without_autocast
from grit_kernels.visibility import dense_mask


def _samples(problem: AttentionProblem, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, keys and mask (Lq, Lk) of each sample."""
    for first_q, len_q, first_k, len_k, left, right in zip(*(x.tolist() for x in problem.tables), strict=True):
        rows, keys = slice(first_q, first_q + len_q), slice(first_k, first_k + len_k)
        hi = None if problem.hi is None else problem.hi[rows]
        yield rows, keys, dense_mask(len_q, len_k, left, right, hi, device=device)


def _sample(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softmax_scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (Lq, Hq, D), k and v (Lk, Hkv, D), mask (Lq, Lk), sinks (Hq) of one sample -> out (Lq, Hq, D), lse (Lq, Hq)."""
    len_q, heads_q, dim = q.shape
    len_k, heads_kv, _ = k.shape
    group = heads_q // heads_kv
    alive = mask.any(dim=-1)
    q = torch.where(alive[:, None, None], q, 0.0)  # a row that sees no key may hold anything, and so may its gradient
    grouped = q.reshape(len_q, heads_kv, group, dim)
    score = torch.einsum("qhgd,khd->hgqk", grouped, k) * softmax_scale  # [Hkv, G, Lq, Lk]
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~mask, float("-inf"))
    # a fully masked row subtracts 0 instead of -inf and divides by 1 instead of 0: output 0, lse -inf, gradient 0
    top = score.detach().amax(dim=-1) if len_k else score.new_full(score.shape[:-1], float("-inf"))
    if sinks is not None:
        sinks = sinks.reshape(heads_kv, group, 1)
        top = torch.maximum(top, sinks.detach())
    top = torch.where(alive, top, 0.0)
    p = torch.exp(score - top[..., None])
    total = p.sum(dim=-1)
    if sinks is not None:
        total = total + torch.exp(torch.where(alive, sinks - top, 0.0))
    safe_total = torch.where(alive, total, 1.0)
    lse = torch.where(alive, top + torch.log(safe_total), float("-inf"))
    out = torch.einsum("hgqk,khd->qhgd", p / safe_total[..., None], v)
    out = torch.where(alive[:, None, None], out.reshape(len_q, heads_q, dim), 0.0)
    return out, lse.permute(2, 0, 1).reshape(len_q, heads_q)


@without_autocast
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out in the dtype of q, lse (Tq, Hq). Rows that no sample owns give 0 and -inf. ``sinks`` (Hq), or none."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=compute, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=compute, device=q.device)
    for rows, keys, mask in _samples(problem, q.device):
        # an empty sample takes the same path: the result stays part of the autograd graph when all samples are empty
        out[rows], lse[rows] = _sample(
            q[rows].to(compute),
            k[keys].to(compute),
            v[keys].to(compute),
            mask,
            problem.softmax_scale,
            problem.softcap,
            None if sinks is None else sinks.to(compute),
        )
    return out.to(q.dtype), lse if compute == torch.float64 else lse.float()


@without_autocast
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: AttentionProblem,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The closed form of the gradients, per sample:

    p = exp(score - lse) on visible pairs,  ds = p * (grad_out . v - rowsum(grad_out * out) + grad_lse) * cap'(score),
    dq = softmax_scale * ds k,  dk = softmax_scale * ds^T q,  dv = p^T grad_out.

    With delta_r = rowsum(grad_out * out) - grad_lse, dsinks = -sum_r exp(sink - lse_r) delta_r; empty without sinks.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = (torch.zeros(x.shape, dtype=compute, device=x.device) for x in (q, k, v))
    delta = (grad_out.to(compute) * out.to(compute)).sum(-1)  # [Tq, Hq]
    if grad_lse is not None:
        delta = delta - grad_lse
    heads_kv, softmax_scale, softcap = k.shape[1], problem.softmax_scale, problem.softcap
    for rows, keys, mask in _samples(problem, q.device):
        if not mask.numel():
            continue
        q_b, do_b, lse_b, delta_b = (
            x[rows].to(compute).unflatten(1, (heads_kv, -1)) for x in (q, grad_out, lse, delta)
        )
        alive = mask.any(dim=-1)[:, None, None, None]  # a row that sees no key may hold anything
        q_b, do_b = (torch.where(alive, x, 0.0) for x in (q_b, do_b))
        k_b, v_b = k[keys].to(compute), v[keys].to(compute)
        score = torch.einsum("qhgd,khd->hgqk", q_b, k_b) * softmax_scale
        slope = torch.ones_like(score)
        if softcap > 0:
            tanh = torch.tanh(score / softcap)
            score, slope = softcap * tanh, 1 - tanh * tanh
        p = torch.where(mask, torch.exp(score - lse_b.permute(1, 2, 0)[..., None]), 0.0)  # [Hkv, G, Lq, Lk]
        dp = torch.einsum("qhgd,khd->hgqk", do_b, v_b)
        ds = torch.where(mask, p * (dp - delta_b.permute(1, 2, 0)[..., None]) * slope, 0.0) * softmax_scale
        dq[rows] = torch.einsum("hgqk,khd->qhgd", ds, k_b).flatten(1, 2)
        dk[keys] = torch.einsum("hgqk,qhgd->khd", ds, q_b)
        dv[keys] = torch.einsum("hgqk,qhgd->khd", p, do_b)
    if sinks is None:
        dsinks = q.new_empty(0)
    else:  # a row that sees no key, whose lse is -inf, may hold anything
        shares = torch.exp(sinks.to(compute) - lse.to(compute)) * delta
        dsinks = -torch.where(lse == float("-inf"), 0.0, shares).sum(0).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks
