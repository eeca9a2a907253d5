"""Switch attention: attention with a causal flag for each sample, in one call.

Three public functions, one op. ``switch_attention`` takes rectangular (B, T, H, D) tensors, ``switch_attention_varlen``
packs of (tokens, H, D), ``switch_attention_with_kvcache`` queries that continue a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import op as _op  # noqa: F401  (registers the ops)
from grit_kernels.attention import reference
from grit_kernels.attention.checks import (
    causal_flags,
    check_lengths,
    check_qkv,
    check_ranges,
    check_sinks,
    check_softmax_options,
    check_writable,
    length_tensor,
    refuse_gradients,
    upper_bounds,
    window_argument,
)
from grit_kernels.attention.pages import (
    append,
    attention_in_pages,
    check_block_table,
    check_entries,
    gather_pages,
    has_paged_kernel,
)
from grit_kernels.attention.problem import AttentionProblem, Shapes
from grit_kernels.backend import has_kernel, runs_triton, use_reference
from grit_kernels.checks import dense_rows, readable
from grit_kernels.precision import autocast_dtype
from grit_kernels.visibility import window_bounds

__all__ = ["switch_attention", "switch_attention_varlen", "switch_attention_with_kvcache"]


def switch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | Tensor,
    *,
    window_size: tuple[int, int] | Tensor = (-1, -1),
    hi: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a right-padded batch in which every sample is causal or bidirectional on its own.

    ``out_i = sum_j softmax_j(cap(softmax_scale * q_i . k_j)) v_j`` over the keys j that row i sees: ``lo(i) <= j < hi(i)``
    with ``lo(i) = max(0, i - left)`` and ``hi(i) = min(L, i + right + 1)``; a causal sample has ``right = 0``; the queries
    are the last positions of the keys (bottom-right aligned). Scores, softmax and sums are FP32.

    Args:
        q: (B, T_q, H_q, D) in float32, bfloat16 or float16 (float64 on the reference backend); D a multiple of 8 in 32..512.
        k, v: (B, T_k, H_kv, D), H_q a multiple of H_kv.
        causal: bool, or bool tensor (B): True sees only the past, False sees both sides.
        window_size: (left, right) inclusive distances for all samples or an integer tensor (B, 2); -1 is unlimited. Mistral's
            ``sliding_window=W`` is (W - 1, 0) for a causal sample.
        hi: int32 (B, T_q), optional upper bound per token, replaces ``right``: row i sees keys below ``hi[i]``; non-decreasing.
        seqlens_q, seqlens_k: int (B), real rows of each sample; the rest is padding (output 0, lse -inf). ``seqlens_k`` defaults
            to T_k, ``seqlens_q`` to ``minimum(T_q, seqlens_k)``.
        softmax_scale: defaults to D ** -0.5.
        softcap: ``cap(s) = softcap * tanh(s / softcap)`` when positive.
        sinks: (H_q) in float32 or the dtype of q, optional attention sinks (GPT-OSS): one more score of every row of a head, to
            which no value belongs, so ``out_i = sum_j exp(s_ij - lse_i) v_j`` with ``lse_i = ln(exp(sink) + sum_j exp(s_ij))``.
            Finite, or -inf for none (+inf and NaN are refused on a CPU). A row that sees no key gives 0 and -inf nonetheless.
        return_lse: also return the log-sum-exp of the scores, float32 (B, T_q, H_q); -inf where a row sees nothing.
        deterministic: the same inputs give gradients of the same bits. False lets the GPU's backward pass add up the gradient of
            q by atomics, in one kernel instead of two; ``torch.use_deterministic_algorithms(True)`` forbids it, and CPUs always
            give the same bits.

    Returns:
        (B, T_q, H_q, D) in the dtype of q; 0 for rows that see no key.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.

    Source: GRIT, arXiv 2402.09906 section 2; window convention of flash-attn; sinks: GPT-OSS, arXiv 2508.10925 section 2.
    """
    q, k, v = check_qkv(q, k, v, ndim=4)
    batch, max_q, _, dim = q.shape
    max_k = k.shape[1]
    device = q.device
    flags = causal_flags(causal, batch, device)
    k_len = length_tensor("seqlens_k", seqlens_k, batch, max_k, device)
    if seqlens_q is None:
        q_len = (
            k_len.clamp(max=max_q) if seqlens_k is not None else length_tensor("seqlens_q", None, batch, max_q, device)
        )
    else:
        q_len = length_tensor("seqlens_q", seqlens_q, batch, max_q, device)
    out, lse = _rectangular(
        q,
        k,
        v,
        (q_len, torch.zeros_like(k_len), k_len),
        window_bounds(flags, window_argument(window_size, batch), max_q, max_k),
        upper_bounds(hi, (batch, max_q), device, q_len),
        check_softmax_options(softmax_scale, softcap, dim),
        check_sinks(sinks, q),
        deterministic,
    )
    return (out, lse) if return_lse else out


def switch_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    window_size: tuple[int, int] | Tensor = (-1, -1),
    hi: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    k_starts: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`switch_attention` over a pack: samples one after another, no padding.

    With ``k_starts`` and ``seqlens_k`` the keys of sample b are the ``seqlens_k[b]`` rows of k and v from ``k_starts[b]`` on,
    wherever they lie: the ranges may leave gaps, come in any order and overlap. This is the call a server makes, whose sequences
    own parts of one key memory: decoding rows, pieces of prompts and texts to embed are samples like any other. Not
    differentiable.

    Args:
        q: (tokens_q, H_q, D); k, v: (tokens_k, H_kv, D).
        causal: bool, or bool tensor (B).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1), where each sample starts; 0 first, the number of tokens last. ``cu_seqlens_k``
            is None with ``k_starts``.
        max_seqlen_q, max_seqlen_k: the longest sample (ints; an upper bound is fine).
        hi: int32 (tokens_q), positions counted inside the sample.
        window_size, softmax_scale, softcap, sinks, deterministic: as in :func:`switch_attention`.
        return_lse: also return the log-sum-exp, float32 (tokens_q, H_q).
        k_starts, seqlens_k: int (B), first key row and number of keys of each sample; both or none.

    Returns:
        (tokens_q, H_q, D) in the dtype of q. No value is read back from a GPU.

    Raises:
        ValueError, TypeError: as :func:`switch_attention`; a range that leaves k (where the numbers lie on the CPU); ``k_starts``
            with an input that requires a gradient while gradients are on.
    """
    q, k, v = check_qkv(q, k, v, ndim=3)
    if k_starts is not None or seqlens_k is not None:
        refuse_gradients("k_starts", q=q, k=k, v=v, sinks=sinks)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options: dict[str, Any] = {"window_size": window_size, "hi": hi, "softmax_scale": softmax_scale, "softcap": softcap}
    problem = packed_problem(q, k, causal, *lengths, k_starts=k_starts, seqlens_k=seqlens_k, **options)
    out, lse = _call(q, k, v, problem, check_sinks(sinks, q), deterministic=deterministic)
    return (out, lse) if return_lse else out


def switch_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    causal: bool | Tensor = True,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    window_size: tuple[int, int] | Tensor = (-1, -1),
    hi: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Queries that continue a cache: decoding, and prefill of a prompt after cached states. Not differentiable.

    Args:
        q: (B, T_q, H_q, D), right-padded; row r of sample b stands at the end of its keys (bottom-right aligned).
        k_cache, v_cache: (B, S, H_kv, D), or with ``block_table`` (num_blocks, block_size, H_kv, D). With ``k`` and ``v`` given
            they are written in place first.
        cache_seqlens: int (B), filled slots of each cache, before ``k`` is added.
        causal: bool or bool tensor (B).
        k, v: (B, T_q, H_kv, D), optional new states, written from slot ``cache_seqlens[b]`` on (the ``seqlens_q[b]`` real rows).
        cache_leftpad: int (B), optional first used slot of each cache.
        block_table: int32 (B, max_blocks), optional: slot s of sample b lies in block ``block_table[b, s // block_size]`` at
            ``s % block_size``, as in flash-attn; any block size. Entries without a filled or new slot may hold anything. Samples
            may share blocks, but not one to which ``k`` is added. The pages are read in place, on a GPU by up to 64 pairs of a
            row and a head of a group; for more they are gathered into rows first, as are caches whose last dimension is strided.
        seqlens_q: int (B), real query rows, default T_q for all.
        hi: int32 (B, T_q), positions counted from the first used slot. Other arguments as in :func:`switch_attention`.

    Returns:
        (B, T_q, H_q, D) in the dtype of q, and with ``return_lse`` float32 (B, T_q, H_q).

    Raises:
        ValueError, TypeError: as :func:`switch_attention`; where the numbers lie on the CPU, also a table that names no block of
            the cache, or a shared one for new states. Then nothing is written.
    """
    # what the caller holds; the checked ones are copies where their last dimension is strided
    caches = k_cache, v_cache
    names, pages = ("q", "k_cache", "v_cache"), block_table is not None
    q, k_cache, v_cache = check_qkv(q, k_cache, v_cache, ndim=4, names=names, pages=pages)
    batch, max_q, _, dim = q.shape
    slots = k_cache.shape[1]
    device = q.device
    if block_table is not None:
        block_table = check_block_table(block_table, k_cache, batch, device)
        slots *= block_table.shape[1]
    q_len = length_tensor("seqlens_q", seqlens_q, batch, max_q, device)
    used = length_tensor("cache_seqlens", cache_seqlens, batch, slots, device)
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or none, got one")
    leftpad = length_tensor("cache_leftpad", cache_leftpad, batch, slots, device, default=0)
    bounds = window_bounds(causal_flags(causal, batch, device), window_argument(window_size, batch), max_q, slots)
    hi = upper_bounds(hi, (batch, max_q), device, q_len)
    options = check_softmax_options(softmax_scale, softcap, dim)
    end = used if k is None else used + q_len
    if k is not None and v is not None:
        check_qkv(q, k, v, ndim=4)
        check_writable(*caches)
        if k.shape != (batch, max_q, *k_cache.shape[2:]):
            raise ValueError(f"k, v: expected {(batch, max_q, *k_cache.shape[2:])}, got {tuple(k.shape)}")
        if readable(used) and bool((end > slots).any()):
            raise ValueError(
                f"cache_seqlens: expected room for the new states in {slots} slots, got {used.tolist()} + {q_len.tolist()}"
            )
    if block_table is not None and readable(used):
        check_entries(block_table, k_cache, leftpad, used, end)
    sinks = check_sinks(sinks, q)
    # nothing is written before everything is checked
    with torch.no_grad():
        if k is not None and v is not None:
            append(caches, (k, v), used, q_len, block_table)
        if block_table is not None and has_paged_kernel(q, *caches):
            lengths = q_len, leftpad, end
            out, lse = attention_in_pages(q, caches, block_table, lengths, bounds, hi, options, sinks)
            return (out, lse) if return_lse else out
        if block_table is not None:
            k_cache, v_cache = (gather_pages(x, block_table, leftpad, end) for x in caches)
        elif k is not None:
            k_cache, v_cache = dense_rows(caches[0]), dense_rows(caches[1])
        out, lse = _rectangular(q, k_cache, v_cache, (q_len, leftpad, end), bounds, hi, options, sinks)
    return (out, lse) if return_lse else out


def prepared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    plans: dict[Any, Tensor] | None,
    sinks: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Attention of one layer over a problem whose values were checked when it was made: what the layers of a model call.

    q (Tq, Hq, D), k and v (Tk, Hkv, D) -> (Tq, Hq, D). ``plans`` belongs to the problem and is filled here: what the
    kernels derive from the problem alone is computed once, by the first layer. ``sinks`` (Hq): as of :func:`switch_attention`,
    in any of q's dtypes, as under autocast they may differ from q.
    """
    q, k, v = check_qkv(q, k, v, ndim=3)
    return _call(q, k, v, problem, sinks, plans, deterministic)[0]


def has_decode_kernel(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> bool:
    """Whether :func:`decode_attention` serves these tensors, q, k and v of (B, ...)."""
    if _differentiable(q, k, v, sinks) or q.dtype == torch.float64 or q.shape[0] >= 2**16:  # an axis of the grid
        return False
    return not use_reference(q.device) and has_kernel("attention_decode", q.device)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    *,
    used: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """:func:`prepared_attention` where every sample has few rows and no gradient is asked for: the kernels need no plan.

    ``used`` (bool (B, slots)): which slots, counted from a sample's first key, hold a key. The problem counts slots then, not
    keys. Only where :func:`has_decode_kernel`.
    """
    q, k, v = _casted(*check_qkv(q, k, v, ndim=3))
    return torch.ops.grit_kernels.attention_decode(q, k, v, used, sinks, *problem.flat())[0]


def packed_problem(
    q: Tensor,
    k: Tensor,
    causal: bool | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    window_size: tuple[int, int] | Tensor = (-1, -1),
    hi: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    k_starts: Tensor | None = None,
    seqlens_k: Tensor | None = None,
) -> AttentionProblem:
    """The problem of a pack q (tokens_q, Hq, D) and k (tokens_k, Hkv, D), its values checked; arguments and errors as of
    :func:`switch_attention_varlen`.
    """
    tokens_q, _, dim = q.shape
    device = q.device
    starts_q, q_len = check_lengths("cu_seqlens_q", cu_seqlens_q, tokens_q, "max_seqlen_q", max_seqlen_q, device)
    batch = q_len.shape[0]
    if k_starts is not None or seqlens_k is not None:
        starts_k, k_len = check_ranges(cu_seqlens_k, k_starts, seqlens_k, batch, k.shape[0], max_seqlen_k, device)
    elif cu_seqlens_k is None:
        raise ValueError("cu_seqlens_k: expected int32 (B + 1,), or k_starts and seqlens_k instead, got None")
    else:
        starts_k, k_len = check_lengths("cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k, device)
    if k_len.shape[0] != batch:
        raise ValueError(f"cu_seqlens_k: expected the {batch} samples of cu_seqlens_q, got {k_len.shape[0]}")
    flags = causal_flags(causal, batch, device)
    left, right = window_bounds(flags, window_argument(window_size, batch), max_seqlen_q, max_seqlen_k)
    hi = upper_bounds(hi, (tokens_q,), device, q_len, starts_q)
    scale, cap = check_softmax_options(softmax_scale, softcap, dim)
    ranges = (starts_q, q_len, starts_k, k_len)
    return AttentionProblem(*ranges, left, right, hi, 0, 0, max_seqlen_q, max_seqlen_k, scale, cap)


def rectangular_problem(
    q: Tensor,
    k: Tensor,
    step: int,
    lengths: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    hi: Tensor | None,
    options: tuple[float, float],
) -> AttentionProblem:
    """The problem of q (B, T, Hq, D) and k (B, S, Hkv, D) whose samples' keys lie ``step`` rows apart, see :func:`key_rows`.

    ``lengths``: int32 (B) each, real query rows, first key slot, end of the key slots. ``options``: softmax_scale and softcap.
    """
    max_q, slots = q.shape[1], k.shape[1]
    q_len, first, end = lengths
    index = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    ranges = (index * max_q, q_len, index * step + first, (end - first).clamp(min=0))
    return AttentionProblem(*ranges, *bounds, hi, max_q, slots, max_q, slots, *options)


def _rectangular(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    hi: Tensor | None,
    options: tuple[float, float],
    sinks: Tensor | None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """(B, T, H, D) tensors as rows of one pack; ``lengths`` = real query rows, first key slot, end of the key slots."""
    keys, values, step = key_rows(q, k, v, sinks)
    problem = rectangular_problem(q, k, step, lengths, bounds, hi, options)
    out, lse = _call(q.flatten(0, 1), keys, values, problem, sinks, deterministic=deterministic)
    return out.view(q.shape), lse.view(q.shape[:3])


def key_rows(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """k and v (B, S, H, D) as (rows, H, D), and how many rows lie between the first keys of two samples.

    A cache stored as (B, H, S, D) cannot be flattened without copying it, once per layer and token. Sample b's keys are rows of
    it nonetheless, ``stride(0) / stride(1)`` rows apart. Such a view overlaps itself, so gradients and casts take the copy.
    """
    slots = k.shape[1]
    k_batch, k_row = k.stride()[:2]
    step = k_batch // k_row if k_row > 0 and k_batch % k_row == 0 else 0
    rows = (k.shape[0] - 1) * step + slots
    copies = _differentiable(q, k, v, sinks) or autocast_dtype(q.device) is not None
    if step <= slots or slots == 0 or v.stride()[:2] != (k_batch, k_row) or copies or rows >= 2**31:
        return k.flatten(0, 1), v.flatten(0, 1), slots
    keys, values = (x.as_strided((rows, *x.shape[2:]), (k_row, *x.stride()[2:])) for x in (k, v))
    return keys, values, step


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _casted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors as autocast wants them."""
    dtype = autocast_dtype(q.device)
    if dtype is None or q.dtype == torch.float64:
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    sinks: Tensor | None,
    plans: dict[Any, Tensor] | None = None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """out (Tq, Hq, D) and lse (Tq, Hq) of packed tensors on the requested backend."""
    q, k, v = _casted(q, k, v)
    if use_reference(q.device):
        return reference.attention_forward(q, k, v, problem, sinks)
    if q.dtype == torch.float64:
        raise TypeError(
            "q: expected float32, bfloat16 or float16, got torch.float64, which needs `with grit_kernels.backend('reference')`"
        )
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    plan = None
    if plans is not None and runs_triton("attention_plan", q.device):
        plan = _plan(q, k, _differentiable(q, k, v, sinks), deterministic, problem, plans)
    return torch.ops.grit_kernels.attention_forward(q, k, v, *problem.flat(), sinks, plan, deterministic)


def _plan(
    q: Tensor, k: Tensor, backward: bool, deterministic: bool, problem: AttentionProblem, plans: dict[Any, Tensor]
) -> Tensor:
    """The plan of the problem for tensors of these shapes, made once."""
    shapes = Shapes.of(q, k)
    if torch.compiler.is_compiling():
        # made before the layers, by the first of them, or by each: then the calls are the same, and where a graph has gradients
        # the compiler keeps one for all of its layers
        key = plan_key(shapes, deterministic)
    else:
        # launches of different streams may run at the same time and must not share a counter
        stream = torch.cuda.current_stream(q.device).stream_id if q.is_cuda else None
        key = (shapes, q.device, backward, deterministic or not backward, stream)
    if key not in plans:
        plans[key] = torch.ops.grit_kernels.attention_plan(*shapes, backward, deterministic, *problem.flat())
    return plans[key]


def plan_key(shapes: Shapes, deterministic: bool) -> tuple[Any, ...]:
    """Where a compiled layer looks for its plan. The numbers of tokens, which belong to the problem, would be fixed in its
    graph; the plan of a backward pass serves a forward pass alone too."""
    return shapes.heads, shapes.heads_kv, shapes.dim, shapes.dtype, deterministic
