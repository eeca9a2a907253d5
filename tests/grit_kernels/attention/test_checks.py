"""Wrong input of the attention functions: an error that names the argument, on every backend the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


INF = float("inf")
Q = (2, 3, 4, 32)
KV = (2, 5, 2, 32)


def dense(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {"q": t(*Q), "k": t(*KV), "v": t(*KV), "causal": True, **changes}
    return lambda: gk.switch_attention(**arguments)


def varlen(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {
        "q": t(3, 2, 32),
        "k": t(4, 2, 32),
        "v": t(4, 2, 32),
        "causal": True,
        "cu_seqlens_q": ints(0, 2, 3),
        "cu_seqlens_k": ints(0, 3, 4),
        "max_seqlen_q": 2,
        "max_seqlen_k": 3,
        **changes,
    }
    return lambda: gk.switch_attention_varlen(**arguments)


def ranges(**changes: Any) -> Callable[[], Any]:
    return varlen(**{"cu_seqlens_k": None, "k_starts": ints(1, 0), "seqlens_k": ints(3, 1), **changes})


def cached(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {
        "q": t(*Q),
        "k_cache": t(*KV),
        "v_cache": t(*KV),
        "cache_seqlens": ints(5, 2),
        **changes,
    }
    return lambda: gk.switch_attention_with_kvcache(**arguments)


def paged(**changes: Any) -> Callable[[], Any]:
    """Caches of 4 blocks of 2 slots, which hold NaN: sample 0 needs three blocks, sample 1 one."""
    blocks = {name: torch.full((4, 2, 2, 32), float("nan")) for name in ("k_cache", "v_cache")}
    return cached(**{**blocks, "block_table": table([3, 0, 1], [2, -1, 9]), **changes})


def table(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


NEW = {"k": t(2, 1, 2, 32), "v": t(2, 1, 2, 32), "q": t(2, 1, 4, 32)}

REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "q no tensor": (TypeError, "q: expected .*got list", dense(q=[1])),
    "q of three dimensions": (ValueError, "q: expected .*got shape", dense(q=t(3, 4, 32))),
    "integer q": (TypeError, "q: expected .*got torch.int64", dense(q=t(*Q, dtype=torch.int64))),
    "k of another dtype": (TypeError, "k: expected .*got torch.bfloat16", dense(k=t(*KV, dtype=torch.bfloat16))),
    "v on another device": (ValueError, "v: expected a tensor on cpu", dense(v=torch.zeros(KV, device="meta"))),
    "head dim not a multiple of 8": (ValueError, "q: expected .*got 36", dense(q=t(2, 3, 4, 36))),
    "head dim too small": (ValueError, "q: expected .*got 24", dense(q=t(2, 3, 4, 24))),
    "head dim too large": (ValueError, "q: expected .*got 520", dense(q=t(2, 3, 4, 520))),
    "k of another head dim": (ValueError, "k, v: expected .*got", dense(k=t(2, 5, 2, 64))),
    "v longer than k": (ValueError, "k, v: expected .*got", dense(v=t(2, 6, 2, 32))),
    "k of another batch": (ValueError, "k: expected .*got 3", dense(k=t(3, 5, 2, 32), v=t(3, 5, 2, 32))),
    "heads no multiple": (ValueError, "q: expected .*got 4", dense(k=t(2, 5, 3, 32), v=t(2, 5, 3, 32))),
    "empty batch": (ValueError, "q: expected .*got shape", dense(q=t(0, 3, 4, 32), k=t(0, 5, 2, 32), v=t(0, 5, 2, 32))),
    "integer flag": (TypeError, "causal: expected .*got int", dense(causal=1)),
    "integer flags": (ValueError, "causal: expected .*got torch.int32", dense(causal=ints(1, 0))),
    "flags of another length": (ValueError, "causal: expected .*got torch.bool", dense(causal=torch.tensor([True]))),
    "window entry below -1": (ValueError, "window_size: expected .*got left -2", dense(window_size=(-2, 0))),
    "float window": (TypeError, "window_size: expected .*got right 1.5", dense(window_size=(0, 1.5))),
    "one window number": (TypeError, "window_size: expected .*got 3", dense(window_size=3)),
    "window tensor of another shape": (ValueError, "window_size: expec", dense(window_size=torch.zeros(3, 2, dtype=torch.int32))),
    "window tensor below -1": (ValueError, "window_size: expected .*got", dense(window_size=torch.tensor([[0, -2], [0, 0]]))),
    "hi of another shape": (ValueError, "hi: expected", dense(hi=ints(1, 2))),
    "hi of floats": (ValueError, "hi: expected", dense(hi=t(2, 3))),
    "hi that falls": (ValueError, "hi: expected .*row 1 of sample 1", dense(hi=torch.tensor([[4, 5, 5], [3, 2, 3]]))),
    "packed hi that falls": (ValueError, "hi: expected .*row 1 of sample 0", varlen(hi=ints(2, 1, 1))),
    "hi on another device": (ValueError, "hi: expected a tensor", dense(hi=torch.zeros(2, 3, dtype=torch.int32, device="meta"))),
    "seqlens_q too long": (ValueError, "seqlens_q: expected", dense(seqlens_q=ints(3, 4))),
    "seqlens_k negative": (ValueError, "seqlens_k: expected", dense(seqlens_k=ints(-1, 4))),
    "seqlens_k of floats": (ValueError, "seqlens_k: expected", dense(seqlens_k=t(2))),
    "seqlens_k as a list": (ValueError, "seqlens_k: expected .*got list", dense(seqlens_k=[1, 2])),
    "infinite scale": (ValueError, "softmax_scale: expected .*got inf", dense(softmax_scale=float("inf"))),
    "negative softcap": (ValueError, "softcap: expected .*got -1", dense(softcap=-1.0)),
    "NaN softcap": (ValueError, "softcap: expected .*got nan", dense(softcap=float("nan"))),
    "sinks as a list": (TypeError, r"sinks: expected a tensor \(4,\).*got list", dense(sinks=[0.0] * 4)),
    "sinks per key head": (ValueError, r"sinks: expected \(4,\), one score per head of q, got shape \(2,\)", dense(sinks=t(2))),
    "sinks per sample": (ValueError, r"sinks: expected \(2,\).*got shape \(2, 2\)", varlen(sinks=t(2, 2))),
    "sinks of another dtype": (TypeError, "sinks: expected float32 or .*bfloat16", dense(sinks=t(4, dtype=torch.bfloat16))),
    "infinite sink": (ValueError, "sinks: .*or -inf .*got inf for head 2", dense(sinks=torch.tensor([0, -INF, INF, INF]))),
    "sink of NaN": (ValueError, "sinks: expected finite .*got nan for head 0", varlen(sinks=torch.tensor([float("nan"), INF]))),
    "sinks beside a cache": (ValueError, r"sinks: expected \(4,\)", cached(sinks=t(1))),
    "sinks on another device": (ValueError, "sinks: expected a tensor on cpu", cached(sinks=torch.zeros(4, device="meta"))),
    "lengths that do not sum up": (ValueError, "cu_seqlens_q: expected", varlen(cu_seqlens_q=ints(0, 2, 4))),
    "table that decreases": (ValueError, "cu_seqlens_k: expected", varlen(cu_seqlens_k=ints(0, 5, 4))),
    "table that starts late": (ValueError, "cu_seqlens_q: expected", varlen(cu_seqlens_q=ints(1, 2, 3))),
    "table of no sample": (ValueError, "cu_seqlens_q: expected .*got an empty batch", varlen(cu_seqlens_q=ints(0))),
    "tables of different batches": (ValueError, "cu_seqlens_k: expected .* 1", varlen(cu_seqlens_k=ints(0, 4), max_seqlen_k=4)),
    "max_seqlen too small": (ValueError, "max_seqlen_k: expected .*got 2", varlen(max_seqlen_k=2)),
    "float max_seqlen": (TypeError, "max_seqlen_q: expected .*got float", varlen(max_seqlen_q=2.0)),
    "two-dimensional table": (ValueError, "cu_seqlens_q: expected", varlen(cu_seqlens_q=torch.zeros(2, 2, dtype=torch.int32))),
    "packed q of four dimensions": (ValueError, "q: expected .*got shape", varlen(q=t(1, 3, 2, 32))),
    "neither table nor ranges": (ValueError, "cu_seqlens_k: .*or k_starts.*got None", varlen(cu_seqlens_k=None)),
    "starts without lengths": (ValueError, "k_starts, seqlens_k: expected both or none", ranges(seqlens_k=None)),
    "lengths without starts": (ValueError, "k_starts, seqlens_k: expected both or none", ranges(k_starts=None)),
    "ranges beside a table": (ValueError, "cu_seqlens_k: expected None beside k_starts", ranges(cu_seqlens_k=ints(0, 3, 4))),
    "ranges of another batch": (ValueError, "k_starts: expected .*got torch.int32", ranges(k_starts=ints(1), seqlens_k=ints(3))),
    "range that begins before k": (ValueError, "k_starts: expected values in 0..4, got", ranges(k_starts=ints(1, -1))),
    "range that leaves k": (ValueError, r"k_starts, .* k's 4 rows, got \[4, 5\) for sample 1", ranges(k_starts=ints(1, 4))),
    "range longer than the longest": (ValueError, "max_seqlen_k: expected at least .* 3, got 2", ranges(max_seqlen_k=2)),
    "float max_seqlen_k of ranges": (TypeError, "max_seqlen_k: expected .*got float", ranges(max_seqlen_k=3.0)),
    "cache named": (ValueError, "k_cache: expected .*got 3", cached(k_cache=t(3, 5, 2, 32), v_cache=t(3, 5, 2, 32))),
    "cache longer than its slots": (ValueError, "cache_seqlens: expected", cached(cache_seqlens=ints(6, 2))),
    "no room in the cache": (ValueError, "cache_seqlens: expected room for", cached(k=t(2, 3, 2, 32), v=t(2, 3, 2, 32))),
    "k without v": (ValueError, "k, v: expected both or none", cached(k=t(2, 3, 2, 32))),
    "k of another length": (ValueError, "k, v: expected", cached(k=t(2, 1, 2, 32), v=t(2, 1, 2, 32))),
    "k of other heads than its cache": (ValueError, "k, v: expected", cached(k=t(2, 3, 1, 32), v=t(2, 3, 1, 32))),
    "leftpad too large": (ValueError, "cache_leftpad: expected", cached(cache_leftpad=ints(0, 9))),
    "table of one dimension": (ValueError, r"block_table: .*\(2, max_blocks\), got .* \(2,\)", paged(block_table=ints(1, 2))),
    "table of another batch": (ValueError, r"block_table: expected .*got .*\(1, 3\)", paged(block_table=table([3, 0, 1]))),
    "table of floats": (ValueError, "block_table: expected int32 .*got torch.float32", paged(block_table=t(2, 3))),
    "table as a list": (ValueError, "block_table: expected int32 .*got list", paged(block_table=[[3, 0, 1], [2, 2, 2]])),
    "table on another device": (ValueError, "block_table: .* on cpu", paged(block_table=table([0], [1]).to("meta"))),
    "pages of three dimensions": (ValueError, r"k_cache: expected \(num_blocks, block_size, H, D\)", paged(k_cache=t(4, 2, 32))),
    "pages without slots": (ValueError, "k_cache: .* at least one slot", paged(k_cache=t(4, 0, 2, 32), v_cache=t(4, 0, 2, 32))),
    "no pages": (ValueError, "k_cache: expected at least one block", paged(k_cache=t(0, 2, 2, 32), v_cache=t(0, 2, 2, 32))),
    "more slots than the table has": (ValueError, "cache_seqlens: expected values in 0..6", paged(cache_seqlens=ints(7, 2))),
    "no room in the table": (ValueError, "cache_seqlens: expected room for .* 6 slots", paged(cache_seqlens=ints(6, 1), **NEW)),
    "entry beyond the cache": (
        ValueError,
        "block_table: expected entries in 0..3, the blocks of k_cache, for the 5 slots of sample 0, got 4 as entry 2",
        paged(block_table=table([3, 0, 4], [2, -1, 9])),
    ),
    "negative entry": (ValueError, "block_table: .* 1, got -1 as entry 0", paged(block_table=table([3, 0, 1], [-1, 2, 2]))),
    "no entry for new states": (ValueError, "block_table: .* sample 1, got -1 as entry 1", paged(**NEW)),
    "new states in a block of two samples": (
        ValueError,
        "block_table: .* k and v are added, got block 1, entry 2 of sample 0, more than once",
        paged(block_table=table([3, 0, 1], [1, 2, 9]), **NEW),
    ),
    "new states in a block that is twice in a row": (
        ValueError,
        "block_table: .* added, got block 3, entry 2 of sample 0, more than once",
        paged(block_table=table([3, 0, 3], [2, 1, 9]), **NEW),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_by_name(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_float64_is_refused_outside_the_reference_backend() -> None:
    q = t(1, 2, 1, 32, dtype=torch.float64)
    with gk.backend("reference"):
        assert gk.switch_attention(q, q, q, True).dtype == torch.float64
    with pytest.raises(TypeError, match="^q: expected .*got torch.float64.*reference"):
        gk.switch_attention(q, q, q, True)


def test_upper_bounds_may_decrease_between_samples_and_in_padding() -> None:
    with gk.backend("reference"):
        varlen(hi=ints(1, 3, 1))()
        dense(hi=torch.tensor([[4, 5, 0], [3, 3, 3]]), seqlens_q=ints(2, 3))()


def test_good_input_of_these_cases_is_accepted() -> None:
    with gk.backend("reference"):
        ends = ranges(k_starts=ints(1, 4), seqlens_k=ints(3, 0)), cached(cache_leftpad=ints(5, 0))
        pages = {"k_cache": t(4, 2, 2, 32), "v_cache": t(4, 2, 2, 32)}
        for call in (dense(), varlen(), ranges(), cached(), *ends, paged(**pages)):
            assert bool(call().isfinite().all())


def test_a_refused_call_writes_nothing() -> None:
    caches = [torch.full((4, 2, 2, 32), 7.0) for _ in "kv"]
    for wrong in (table([3, 0, 1], [2, -1, 9]), table([3, 0, 1], [2, 1, 9])):
        with pytest.raises(ValueError, match="block_table"):
            paged(k_cache=caches[0], v_cache=caches[1], block_table=wrong, **NEW)()
    assert all(bool((x == 7).all()) for x in caches)
