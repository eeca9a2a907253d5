"""The contrastive loss in Triton: a matrix product whose epilogue is an online softmax, so no score reaches memory.

    score_ij = query_scale_i * passage_scale_j * q_i . p_j        (chunked.row_scales: temperature and normalisation)

Forward: a program owns BLOCK_Q queries and a share of the passages; for each tile of BLOCK_P passages it multiplies over
the whole width, masks, and updates per query in registers: top = max score, total = sum exp(score - top), below = sum
exp(score - top) (score - top), the index of the best. The launcher combines the shares in order.

Backward: for one chunk of queries at a time (CHUNK_BYTES of weights) three products
    weight_ij = a_i (softmax_ij - [j = target_i]) * passage_scale_j,    softmax_ij = exp((score_ij - top_i) - log_total_i)
    grad_q_i  = sum_j weight_ij p_j        grad_p_j += sum_i weight_ij q_i       (FP32)
where a is grad_losses * query_scale. The weights are stored in the inputs' dtype; a and passage_scale are first divided by
their largest value, so they fit float16, and multiplied back at the end.
A product fused with its score tile would recompute the scores for each of grad_q and grad_p, and again for every
256 columns of width. FP32 inputs are multiplied in full precision, never in TF32. No atomics: results repeat.

Naming: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block value; capitals are compile-time constants.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grit_kernels.checks import dense_rows
from grit_kernels.contrastive.chunked import chunks, row_scales, unscaled_gradients
from grit_kernels.contrastive.problem import ContrastiveProblem
from grit_kernels.triton_launch import architecture, dot, on_device, processor_count, upcast_operands

CHUNK_BYTES = 256 << 20

# BLOCK_Q, BLOCK_P, BLOCK_D, warps, stages of the score kernels; BLOCK_M, BLOCK_N, BLOCK_K, .. of the product
SCORES_16_BIT, SCORES_32_BIT = (128, 128, 64, 8, 3), (64, 64, 16, 4, 2)
PRODUCT_HOPPER, PRODUCT_16_BIT, PRODUCT_32_BIT = (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 16, 4, 2)


@triton.jit
def _multiply_tile(
    p_a, p_b, o_a, o_b, m_a, m_b, stride_a, stride_b, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of a b^T over the whole width; rows are addressed in 64 bits, rows outside count as 0."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_a + o_a.to(tl.int64)[:, None] * stride_a + o_d[None, :]
    p_columns = p_b + o_b.to(tl.int64)[:, None] * stride_b + o_d[None, :]
    b_out = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for d in range(0, width, BLOCK_D):
        if EVEN_D:
            b_a = tl.load(p_rows, mask=m_a[:, None], other=0.0)
            b_b = tl.load(p_columns, mask=m_b[:, None], other=0.0)
        else:
            m_d = d + o_d < width
            b_a = tl.load(p_rows, mask=m_a[:, None] & m_d[None, :], other=0.0)
            b_b = tl.load(p_columns, mask=m_b[:, None] & m_d[None, :], other=0.0)
        b_out = dot(b_a, tl.trans(b_b), b_out, UPCAST)
        p_rows += BLOCK_D
        p_columns += BLOCK_D
    return b_out


@triton.jit
def _candidates(b_scores, o_q, o_p, b_target, b_query_id, p_passage_ids, passages, group,
                HAS_IDS: tl.constexpr, GROUPED: tl.constexpr):  # fmt: skip
    """-1e30 where reference.candidate_mask is False: its weight is exactly 0 and, unlike -inf, 0 times it is 0."""
    m = (o_p < passages)[None, :]
    if GROUPED:
        m = m & (o_p[None, :] // group == o_q[:, None])
    if HAS_IDS:
        b_passage_id = tl.load(p_passage_ids + o_p, mask=o_p < passages, other=0)
        m = m & ((b_query_id[:, None] != b_passage_id[None, :]) | (o_p[None, :] == b_target[:, None]))
    return tl.where(m, b_scores, -1e30)


@triton.jit(do_not_specialize=["queries", "group", "splits"])
def contrastive_fwd_kernel(
    p_queries, p_passages, p_query_scale, p_passage_scale, p_targets, p_query_ids, p_passage_ids,
    p_top, p_total, p_below, p_positive, p_best,
    stride_q, stride_p, queries, passages, width, group, splits,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_SCALE: tl.constexpr, GROUPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of BLOCK_Q queries, splits). Softmax numbers of a block over one share of the passages, each (splits, Q).

    With GROUPED the share is taken from the block's own passages, else from all of them.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    o_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < queries
    b_scale = tl.load(p_query_scale + o_q, mask=m_q, other=0.0)
    b_target = tl.load(p_targets + o_q, mask=m_q, other=0).to(tl.int32)
    b_query_id = b_target
    if HAS_IDS:
        b_query_id = tl.load(p_query_ids + o_q, mask=m_q, other=0)
    begin, end = 0, passages
    if GROUPED:
        begin = block * BLOCK_Q * group
        end = tl.minimum(begin + BLOCK_Q * group, passages)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_P), splits) * BLOCK_P
    first = begin + split * share
    last = tl.minimum(first + share, end)

    b_top = tl.full([BLOCK_Q], -1e30, dtype=tl.float32)
    b_total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_below = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_positive = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_best = tl.zeros([BLOCK_Q], dtype=tl.int32)
    for start in range(first, last, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = o_p < passages
        b_s = _multiply_tile(
            p_queries, p_passages, o_q, o_p, m_q, m_p, stride_q, stride_p, width,
            BLOCK_Q, BLOCK_P, BLOCK_D, EVEN_D, UPCAST,
        )  # fmt: skip
        b_s *= b_scale[:, None]
        if HAS_SCALE:
            b_s *= tl.load(p_passage_scale + o_p, mask=m_p, other=0.0)[None, :]
        b_positive += tl.sum(tl.where((o_p[None, :] == b_target[:, None]) & m_p[None, :], b_s, 0.0), axis=1)
        b_s = _candidates(b_s, o_q, o_p, b_target, b_query_id, p_passage_ids, passages, group, HAS_IDS, GROUPED)
        b_tile_top, b_tile_best = tl.max(b_s, axis=1, return_indices=True, return_indices_tie_break_left=True)
        b_best = tl.where(b_tile_top > b_top, start + b_tile_best, b_best)
        b_new = tl.maximum(b_top, b_tile_top)
        b_safe = tl.where(b_new > -1e29, b_new, 0.0)  # 0 until there is a candidate
        b_s -= b_safe[:, None]
        b_e = tl.exp(b_s)
        b_decay = tl.exp(b_top - b_safe)
        b_below = b_decay * (b_below + b_total * (b_top - b_safe)) + tl.sum(b_e * b_s, axis=1)
        b_total = b_total * b_decay + tl.sum(b_e, axis=1)
        b_top = b_new
    o_out = split.to(tl.int64) * queries + o_q
    tl.store(p_top + o_out, b_top, mask=m_q)
    tl.store(p_total + o_out, b_total, mask=m_q)
    tl.store(p_below + o_out, b_below, mask=m_q)
    tl.store(p_positive + o_out, b_positive, mask=m_q)
    tl.store(p_best + o_out, b_best, mask=m_q)


@triton.jit(do_not_specialize=["first_query", "last_query", "group"])
def contrastive_weights_kernel(
    p_queries, p_passages, p_query_scale, p_passage_scale, p_targets, p_query_ids, p_passage_ids,
    p_top, p_log_total, p_a, p_factor, p_weights,
    stride_q, stride_p, first_query, last_query, first_passage, last_passage, passages, width, group,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_SCALE: tl.constexpr, GROUPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK_Q queries and BLOCK_P passages of a chunk. Stores weight_ij, see the top of the file.

    The grid has one axis, blocks of queries first: a second axis is limited to 65535 blocks, or 8 million passages.
    p_weights: (last_query - first_query, last_passage - first_passage), contiguous.
    """
    query_blocks = tl.cdiv(last_query - first_query, BLOCK_Q)
    o_row = tl.program_id(0) % query_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_column = tl.program_id(0) // query_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    o_q, o_p = first_query + o_row, first_passage + o_column
    m_q, m_p = o_q < last_query, o_p < last_passage
    b_s = _multiply_tile(
        p_queries, p_passages, o_q, o_p, m_q, m_p, stride_q, stride_p, width,
        BLOCK_Q, BLOCK_P, BLOCK_D, EVEN_D, UPCAST,
    )  # fmt: skip
    b_s *= tl.load(p_query_scale + o_q, mask=m_q, other=0.0)[:, None]
    if HAS_SCALE:
        b_s *= tl.load(p_passage_scale + o_p, mask=m_p, other=0.0)[None, :]
    b_target = tl.load(p_targets + o_q, mask=m_q, other=0).to(tl.int32)
    b_query_id = b_target
    if HAS_IDS:
        b_query_id = tl.load(p_query_ids + o_q, mask=m_q, other=0)
    b_s = _candidates(b_s, o_q, o_p, b_target, b_query_id, p_passage_ids, passages, group, HAS_IDS, GROUPED)
    b_top = tl.load(p_top + o_q, mask=m_q, other=0.0)
    b_log_total = tl.load(p_log_total + o_q, mask=m_q, other=0.0)
    b_softmax = tl.exp((b_s - b_top[:, None]) - b_log_total[:, None])
    b_a = tl.load(p_a + o_q, mask=m_q, other=0.0)
    b_w = b_a[:, None] * (b_softmax - tl.where(o_p[None, :] == b_target[:, None], 1.0, 0.0))
    if HAS_SCALE:
        b_w *= tl.load(p_factor + o_p, mask=m_p, other=0.0)[None, :]
    p_out = p_weights + o_row.to(tl.int64)[:, None] * (last_passage - first_passage) + o_column[None, :]
    tl.store(p_out, b_w.to(p_weights.dtype.element_ty), mask=m_q[:, None] & m_p[None, :])


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    p_a, p_b, p_c, rows, columns, inner, stride_am, stride_ak, stride_bk, stride_cm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ACCUMULATE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """c [rows, columns] (FP32) = or += a [rows, inner] @ b [inner, columns]."""
    # 8 tiles of rows at a time share the tiles of b in the L2 cache
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    first_tile = program // (8 * tiles_n) * 8
    band = tl.minimum(tiles_m - first_tile, 8)
    within = program % (8 * tiles_n)
    o_m = (first_tile + within % band) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = within // band * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < rows, o_n < columns
    b_c = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, inner, BLOCK_K):
        o_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_k = o_k < inner
        p_tile_a = p_a + o_m.to(tl.int64)[:, None] * stride_am + o_k[None, :] * stride_ak
        b_a = tl.load(p_tile_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + o_k[:, None] * stride_bk + o_n[None, :], mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_c = dot(b_a, b_b, b_c, UPCAST)
    p_out = p_c + o_m.to(tl.int64)[:, None] * stride_cm + o_n[None, :]
    m_c = m_m[:, None] & m_n[None, :]
    if ACCUMULATE:
        b_c += tl.load(p_out, mask=m_c, other=0.0)
    tl.store(p_out, b_c, mask=m_c)


def _product_tile(dtype: torch.dtype, arch: str) -> tuple[int, int, int, int, int]:
    if dtype == torch.float32:
        return PRODUCT_32_BIT
    return PRODUCT_HOPPER if arch in ("sm90", "sm100") else PRODUCT_16_BIT


def _product(a: Tensor, b: Tensor, c: Tensor, accumulate: bool) -> None:
    block_m, block_n, block_k, warps, stages = _product_tile(a.dtype, architecture(a.device))
    grid = triton.cdiv(c.shape[0], block_m) * triton.cdiv(c.shape[1], block_n)
    product_kernel[(grid,)](
        a, b, c, c.shape[0], c.shape[1], a.shape[1], a.stride(0), a.stride(1), b.stride(0), c.stride(0),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, ACCUMULATE=accumulate, UPCAST=upcast_operands(),
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


def _tile(queries: Tensor, passage_ids: Tensor | None, passage_scale: Tensor | None, group: int) -> dict[str, Any]:
    block_q, block_p, block_d, warps, stages = SCORES_32_BIT if queries.dtype == torch.float32 else SCORES_16_BIT
    return {
        "BLOCK_Q": block_q, "BLOCK_P": block_p, "BLOCK_D": block_d, "EVEN_D": queries.shape[1] % block_d == 0,
        "HAS_IDS": passage_ids is not None, "HAS_SCALE": passage_scale is not None, "GROUPED": group > 0,
        "UPCAST": upcast_operands(), "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"queries, passages: expected float32, bfloat16 or float16, got {x.dtype}")
    return dense_rows(x)


def contrastive_forward(problem: ContrastiveProblem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As chunked.contrastive_forward."""
    queries, passages = _rows(problem.queries), _rows(problem.passages)
    query_scale, passage_scale = row_scales(problem)
    count, candidates, group = queries.shape[0], passages.shape[0], problem.group
    tile = _tile(queries, problem.passage_ids, passage_scale, group)
    blocks = triton.cdiv(count, tile["BLOCK_Q"])
    # few queries leave processors idle: share the passages then, at least 4 tiles to each
    tiles = triton.cdiv(tile["BLOCK_Q"] * group if group else candidates, tile["BLOCK_P"])
    splits = max(1, min(2 * processor_count(queries.device) // blocks, tiles // 4))
    shape = (4, splits, count)
    top, total, below, positive = torch.empty(shape, dtype=torch.float32, device=queries.device).unbind()
    best = torch.empty((splits, count), dtype=torch.int32, device=queries.device)
    with on_device(queries):
        contrastive_fwd_kernel[(blocks, splits)](
            queries, passages, query_scale, passage_scale, problem.targets, problem.query_ids, problem.passage_ids,
            top, total, below, positive, best,
            queries.stride(0), passages.stride(0), count, candidates, queries.shape[1], group, splits,
            enable_fp_fusion=True, **tile,
        )  # fmt: skip
    highest = top.amax(dim=0)
    share = torch.exp(top - highest)
    everything = (share * total).sum(dim=0)
    scores = positive.sum(dim=0)  # one share holds the target, the others 0
    above = highest - scores
    excess = above + (share * (below + total * (top - highest))).sum(dim=0) / everything
    first_best = torch.where(top == highest, best, candidates).amin(dim=0)
    log_total = everything.log()
    return above + log_total, highest, log_total, excess, first_best.long()


def contrastive_backward(
    grad_losses: Tensor, top: Tensor, log_total: Tensor, problem: ContrastiveProblem
) -> tuple[Tensor, Tensor]:
    """As chunked.contrastive_backward."""
    queries, passages = _rows(problem.queries), _rows(problem.passages)
    query_scale, passage_scale = row_scales(problem)
    tile = _tile(queries, problem.passage_ids, passage_scale, problem.group)
    a = grad_losses * query_scale
    largest = a.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    a = a / largest
    factor = None
    if passage_scale is not None:
        factor = passage_scale / passage_scale.amax()
        largest = largest * passage_scale.amax()
    grad_q = torch.empty(queries.shape, dtype=torch.float32, device=queries.device)
    grad_p = torch.zeros(passages.shape, dtype=torch.float32, device=queries.device)
    with on_device(queries):
        for chunk in chunks(*problem.counts, problem.in_batch_negatives, CHUNK_BYTES, queries.element_size()):
            first, last, begin, end = chunk
            weights = torch.empty((last - first, end - begin), dtype=queries.dtype, device=queries.device)
            blocks = triton.cdiv(last - first, tile["BLOCK_Q"]) * triton.cdiv(end - begin, tile["BLOCK_P"])
            contrastive_weights_kernel[(blocks,)](
                queries, passages, query_scale, passage_scale, problem.targets, problem.query_ids, problem.passage_ids,
                top, log_total, a, factor, weights, queries.stride(0), passages.stride(0),
                first, last, begin, end, passages.shape[0], queries.shape[1], problem.group,
                enable_fp_fusion=True, **tile,
            )  # fmt: skip
            _product(weights, passages[begin:end], grad_q[first:last], accumulate=False)
            _product(weights.T, queries[first:last], grad_p[begin:end], accumulate=True)
    return unscaled_gradients(grad_q.mul_(largest), grad_p.mul_(largest), problem)
