"""Attention of few rows over many keys: decoding, and a short prompt after a long cache.

Reading the keys and values once is all the work, so the rows of all query heads of a group form one tile (row
``r * GROUP + g``), which reads each key once per group, and the blocks of keys that the tile sees are dealt out evenly to
``splits`` programs. Each writes its own softmax (out, lse); a second kernel merges them in a fixed order:

    lse = ln sum_s exp(lse_s),   out = sum_s exp(lse_s - lse) out_s

Keys may lie in any slots of a cache: a byte per slot says which hold one. Or in pages: then each key is found through the table.

Of a pack that mixes decoding rows with prompts and texts, these kernels take the samples that :func:`splits_sample` names; the
tiles of triton_forward.py take the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grit_kernels.attention.problem import AttentionProblem, SampleTables
from grit_kernels.attention.triton_common import (
    addressable,
    attend_blocks,
    clamp,
    int32_tables,
    key_range,
    load_part,
    load_sample,
    positive_scale,
    softmax_constants,
    split_head_dim,
    store_part,
    tile_keys,
    with_sink,
)
from grit_kernels.attention.triton_configs import Config, choose_config
from grit_kernels.attention.triton_plan import Split, splits_sample
from grit_kernels.triton_launch import on_device, processor_count, upcast_operands

LEAST_COLUMNS = 32
"""Columns of D2 or more: four warps cannot share 16 columns of 16 rows, and would all compute every score."""

_LARGEST_SPLIT = 64
_PROGRAMS_PER_PROCESSOR = 4
_MERGED_ROWS = 16


@triton.jit(do_not_specialize=["slots", "entries", "q_rows", "splits", "most_rows", "least_keys"])
def attention_decode_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_sinks, p_used, p_table, p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, p_hi,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_kb, stride_vb, slots, entries, q_rows, splits,
    most_rows, least_keys, scale, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, HAS_HI: tl.constexpr, HAS_CAP: tl.constexpr, SPLIT: tl.constexpr,
    HAS_USED: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: (splits * row tiles, kv heads, samples). SPLIT: p_out and p_lse are FP32 (splits, samples, most_rows, Hq, ...).

    HAS_USED: p_used (samples, slots), uint8, is 0 where a slot of the sample's keys holds none. HAS_SINKS: p_sinks (Hq), which
    the merge applies where keys are split. PAGE: slots of a page, or 0; p_table has a row of ``entries`` per sample, and k_start
    is the first slot of its keys.
    """
    part = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    head_kv = tl.program_id(1)
    sample = tl.program_id(2)
    q_start, len_q, k_start, len_k, left, right = load_sample(
        p_q_start, p_q_len, p_k_start, p_k_len, p_left, p_right, sample
    )
    p_hi += q_start
    first_row = tile * BM // GROUP
    if SPLIT:
        owned = len_q
    else:
        owned = tl.maximum(len_q, q_rows)
    if (first_row >= owned) | (splits_sample(len_q, len_k, most_rows, least_keys) == 0):
        return
    if PAGE > 0:
        p_k += tl.cast(head_kv, tl.int64) * stride_kh
        p_v += tl.cast(head_kv, tl.int64) * stride_vh
        p_table += tl.cast(sample, tl.int64) * entries
    else:
        p_k += k_start * stride_kt + tl.cast(head_kv, tl.int64) * stride_kh
        p_v += k_start * stride_vt + tl.cast(head_kv, tl.int64) * stride_vh
    if HAS_USED:
        p_used += tl.cast(sample, tl.int64) * slots

    o_m = tile * BM + tl.arange(0, BM)
    row = o_m // GROUP
    head = head_kv * GROUP + o_m % GROUP
    m_row = row < len_q
    p_q += q_start * stride_qt
    o_q = tl.cast(row, tl.int64) * stride_qt + tl.cast(head, tl.int64) * stride_qh
    b_q1 = load_part(p_q, o_q, 1, m_row, 0, D1, D, True)  # [BM, D1]
    if D2 > 0:
        b_q2 = load_part(p_q, o_q, 1, m_row, D1, D2, D, True)
    else:
        b_q2 = b_q1
    b_lo, b_hi = key_range(row, p_hi, len_q, len_k, left, right, HAS_HI)
    first, full_first, full_last, last = tile_keys(
        first_row, tl.cdiv((tile + 1) * BM, GROUP), p_hi, len_q, len_k, left, right, BN, HAS_HI
    )
    if SPLIT:
        share = tl.cdiv(last - first, splits)
        first = tl.minimum(first + part * share, last)
        last = tl.minimum(first + share, last)
        full_first = clamp(full_first, first, last)
        full_last = clamp(full_last, full_first, last)
        empty = full_first >= full_last
        full_first = tl.where(empty, last, full_first)
        full_last = tl.where(empty, last, full_last)
    b_out1, b_out2, b_lse = attend_blocks(
        b_q1, b_q2, p_k, p_v, p_used, p_table, stride_kt, stride_vt, stride_kb, stride_vb, tl.cast(k_start, tl.int32),
        first, full_first, full_last, last, b_lo, b_hi, len_k, scale, cap,
        D, D1, D2, BM, BN, PAGE, HAS_CAP, UPCAST, False, HAS_USED,
    )  # fmt: skip
    if HAS_SINKS and not SPLIT:
        b_lse, b_factor = with_sink(b_lse, tl.load(p_sinks + head, mask=m_row, other=0.0))
        b_out1 = b_out1 * b_factor[:, None]
        b_out2 = b_out2 * b_factor[:, None]
    b_out1 = tl.where(m_row[:, None], b_out1, 0.0)
    b_out2 = tl.where(m_row[:, None], b_out2, 0.0)
    b_lse = tl.where(m_row, b_lse * 0.6931471805599453, float("-inf"))
    if SPLIT:
        place = tl.cast(part, tl.int64) * tl.num_programs(2) + sample
        o_out = (place * most_rows + row) * HEADS + head
    else:
        o_out = (q_start + row) * HEADS + head
    m_store = row < owned
    store_part(p_out, o_out, D, m_store, b_out1, 0, D1, D)
    if D2 > 0:
        store_part(p_out, o_out, D, m_store, b_out2, D1, D2, D)
    tl.store(p_lse + o_out, b_lse, mask=m_store)


@triton.jit(do_not_specialize=["q_rows", "splits", "most_rows", "least_keys"])
def merge_splits_kernel(
    p_part, p_part_lse, p_out, p_lse, p_sinks, p_q_start, p_q_len, p_k_len, q_rows, splits, most_rows, least_keys,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of BM (row, head) pairs, samples)."""
    sample = tl.program_id(1)
    len_q = tl.load(p_q_len + sample)
    if splits_sample(len_q, tl.load(p_k_len + sample), most_rows, least_keys) == 0:
        return
    q_start = tl.cast(tl.load(p_q_start + sample), tl.int64)
    pair = tl.program_id(0) * BM + tl.arange(0, BM)
    m_real = pair < len_q * HEADS
    m_store = pair < tl.maximum(len_q, q_rows) * HEADS
    o_pair = q_start * HEADS + pair
    o_d = tl.arange(0, DP)
    m_d = o_d[None, :] < D
    b_top = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([BM], dtype=tl.float32)
    b_acc = tl.zeros([BM, DP], dtype=tl.float32)
    for part in range(0, splits):
        o_part = (tl.cast(part, tl.int64) * tl.num_programs(1) + sample) * most_rows * HEADS + pair
        b_lse = tl.load(p_part_lse + o_part, mask=m_real, other=float("-inf"))
        b_out = tl.load(p_part + o_part[:, None] * D + o_d[None, :], mask=m_real[:, None] & m_d, other=0.0)
        b_new = tl.maximum(b_top, b_lse)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_keep = tl.exp2((b_top - b_shift) * 1.4426950408889634)
        b_weight = tl.exp2((b_lse - b_shift) * 1.4426950408889634)
        b_total = b_total * b_keep + b_weight
        b_acc = b_acc * b_keep[:, None] + b_out * b_weight[:, None]
        b_top = b_new
    dead = b_total == 0.0
    b_total = tl.where(dead, 1.0, b_total)
    b_out = tl.where(dead[:, None], 0.0, b_acc / b_total[:, None])
    b_lse = tl.where(dead, float("-inf"), b_top + tl.log2(b_total) * 0.6931471805599453)
    if HAS_SINKS:
        b_lse, b_factor = with_sink(b_lse * 1.4426950408889634, tl.load(p_sinks + pair % HEADS))
        b_lse = b_lse * 0.6931471805599453
        b_out = b_out * b_factor[:, None]
    tl.store(p_out + o_pair[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_store[:, None] & m_d)
    tl.store(p_lse + o_pair, b_lse, mask=m_store)


def choose_splits(programs: int, max_k: int, block_keys: int, processors: int) -> int:
    """Enough programs to fill the GPU several times over, but at least two blocks of keys for each."""
    wanted = triton.cdiv(processors * _PROGRAMS_PER_PROCESSOR, programs)
    return max(1, min(wanted, _LARGEST_SPLIT, triton.cdiv(max_k, 2 * block_keys)))


def largest_tile(dim: int, element_size: int) -> int:
    """Rows of a tile where a sample has that many: all of a GQA group's heads read the keys once. What fits 99 KiB of shared
    memory and spills no registers; tests compile these too."""
    if element_size == 4:
        return 16
    return 64 if dim <= 128 else 32 if dim <= 256 else 16


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, used: Tensor | None, sinks: Tensor | None, problem: AttentionProblem
) -> tuple[Tensor, Tensor]:
    """The op ``grit_kernels::attention_decode``: all samples have few rows. No plan, nothing read back."""
    return _decode(q, addressable(k), addressable(v), used, sinks, problem, None)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    used: Tensor | None,
    sinks: Tensor | None,
    problem: AttentionProblem,
    pages: Pages | None,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not q.shape[0]:
        return out, lse
    q, softmax_scale = positive_scale(q, problem.softmax_scale)
    q = addressable(q)
    used = None if used is None else used.contiguous().view(torch.uint8)
    sinks = None if sinks is None else sinks.contiguous()
    every = Split(max(problem.q_rows, problem.max_q), 0)
    constants = softmax_constants(softmax_scale, problem.softcap)
    with on_device(q):
        decode_samples(q, k, v, out, lse, problem, int32_tables(problem), every, *constants, used, sinks, pages)
    return out, lse


def paged_config(config: Config) -> Config:
    """``config`` where keys lie in pages. Looking up the table takes a step of its own ahead of each copy, so that keys come as
    early as without pages. Addresses take registers: in large tiles each thread has fewer."""
    return config._replace(warps=8 if config.rows > 16 else config.warps, stages=2 * config.stages - 1)


class Pages(NamedTuple):
    """``table`` (B, entries), int32, of the blocks of a cache (num_blocks, ``size``, H, D), whose strides are ``k_block`` and
    ``v_block``."""

    table: Tensor
    size: int
    k_block: int
    v_block: int


def attention_decode_paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, sinks: Tensor | None, problem: AttentionProblem
) -> tuple[Tensor, Tensor]:
    """The op ``grit_kernels::attention_decode_paged``: :func:`attention_decode` of keys in pages (num_blocks, block_size, Hkv,
    D), ``problem.k_start`` the slot of a sample's first key. No page is copied.
    """
    pages = Pages(block_table, k_cache.shape[1], k_cache.stride(0), v_cache.stride(0))
    return _decode(q, k_cache[0], v_cache[0], None, sinks, problem, pages)


def decode_samples(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: AttentionProblem,
    bounds: SampleTables,
    split: Split,
    scale: float,
    cap: float,
    used: Tensor | None = None,
    sinks: Tensor | None = None,
    pages: Pages | None = None,
) -> None:
    """Fill ``out`` and ``lse`` of the samples of ``split``; arguments as triton_forward.attention_forward prepares them.

    ``used``: uint8 (B, slots), 0 where a slot of a sample's keys, counted from its first, holds none. ``sinks``: (Hq), see
    :func:`grit_kernels.attention.prepared_attention`; they are part of ``lse``. ``pages``: of which ``k`` and ``v`` are
    the first blocks.
    """
    _, heads, dim = q.shape
    heads_kv = k.shape[1]
    group = heads // heads_kv
    batch, hi, q_rows = bounds[0].shape[0], problem.hi, problem.q_rows
    most_rows = split.rows
    config = choose_config("decode", dim, q.dtype, q.device)
    block_rows = max(config.rows, min(largest_tile(dim, q.element_size()), triton.next_power_of_2(most_rows * group)))
    if pages is not None:
        config = paged_config(config._replace(rows=block_rows))
    row_tiles = triton.cdiv(most_rows * group, block_rows)
    splits = choose_splits(row_tiles * heads_kv * batch, problem.max_k, config.keys, processor_count(q.device))
    if splits > 1:
        part = torch.empty((splits, batch, most_rows, heads, dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, batch, most_rows, heads), dtype=torch.float32, device=q.device)
    else:
        part, part_lse = out, lse
    d1, d2 = split_head_dim(dim, LEAST_COLUMNS)
    table, page, k_block, v_block = pages or (bounds[0], 0, 0, 0)
    attention_decode_kernel[(splits * row_tiles, heads_kv, batch)](
        q, k, v, part, part_lse, lse if sinks is None else sinks, bounds[0] if used is None else used, table,
        *bounds, bounds[0] if hi is None else hi,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_block, v_block,
        0 if used is None else used.stride(0), table.stride(0), q_rows, splits, *split, scale, cap,
        HEADS=heads, GROUP=group, D=dim, D1=d1, D2=d2, BM=block_rows, BN=config.keys, PAGE=page,
        HAS_HI=hi is not None, HAS_CAP=cap > 0, SPLIT=splits > 1, HAS_USED=used is not None,
        HAS_SINKS=sinks is not None, UPCAST=upcast_operands(),
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        merge_splits_kernel[(triton.cdiv(most_rows * heads, _MERGED_ROWS), batch)](
            part, part_lse, out, lse, lse if sinks is None else sinks, bounds[0], bounds[1], bounds[3], q_rows, splits, *split,
            HEADS=heads, D=dim, DP=triton.next_power_of_2(dim), BM=_MERGED_ROWS, HAS_SINKS=sinks is not None, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
