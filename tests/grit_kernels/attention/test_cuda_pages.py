"""The CUDA C++ decode kernel, or on a CPU its templates compiled for it, over keys in pages: the bits of keys side by side."""

from __future__ import annotations

import dataclasses
import importlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from tests.conftest import Backend
from tests.grit_kernels.attention.paged import in_pages, in_rows
from tests.grit_kernels.attention.test_decode import Case, moved, needs_library, on_every_device
from tests.grit_kernels.attention.test_decode import drawn as drawn_rows


def drawn(case: Case, block_size: int, *, shared: bool = False) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of attention_decode_paged_cuda, and of attention_decode_cuda for the same keys side by side.

    ``shared``: the last sample, which begins at slot 0, reads its whole pages where sample 0 has them.
    """
    q, k, v, used, sinks, problem = drawn_rows(case)
    slots = problem.max_k
    first = problem.k_start - torch.arange(len(case.rows), dtype=torch.int32) * slots
    pages, table = in_pages(
        [x.unflatten(0, (-1, slots)) for x in (k, v)], first.tolist(), (first + problem.k_len).tolist(), block_size
    )
    if shared:
        whole = min(case.keys[0], case.keys[-1]) // block_size
        table[-1, :whole] = table[0, :whole]
        k, v = (in_rows(x, table, slots).flatten(0, 1) for x in pages)
    paged = (q, *pages, table, sinks, dataclasses.replace(problem, k_start=first))
    return paged, (q, k, v, used, sinks, problem)


def random_case(rng: random.Random) -> Case:
    heads_kv, batch = rng.choice([1, 2]), 3
    return Case(
        rng.choice([32, 40, 64, 128, 264]),
        heads=heads_kv * rng.choice([1, 3, 4]),
        heads_kv=heads_kv,
        rows=tuple(rng.choice([0, 1, 1, 3]) for _ in range(batch)),
        keys=tuple(rng.choice([0, 1, 16, 17, 255, 600]) for _ in range(batch)),
        window=(rng.choice([-1, -1, 0, 20, 300]), rng.choice([-1, 0, 4])),
        softcap=rng.choice([0.0, 5.0]),
        hi=rng.random() < 0.3,
        sinks=rng.random() < 0.5,
        dtype=rng.choice([torch.float32, torch.bfloat16, torch.float16]),
    )


def ops(where: Backend) -> tuple[Any, Any]:
    key = "CUDA" if where.device == "cuda" else "CPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("grit_kernels::attention_decode_paged_cuda", key):
        pytest.skip("needs the compiled library")
    return torch.ops.grit_kernels.attention_decode_paged_cuda, torch.ops.grit_kernels.attention_decode_cuda


@on_every_device
@pytest.mark.parametrize("seed", range(6))
def test_random_pages_give_the_bits_of_rows(seed: int, where: Backend) -> None:
    in_place, beside = ops(where)
    rng = random.Random(seed)
    for block_size in (1, 7, 16, 100, 256, 1000):
        case = random_case(rng)
        paged, rows = (moved(x, where.device) for x in drawn(case, block_size, shared=rng.random() < 0.5))
        for a, b in zip(in_place(*paged), beside(*rows), strict=True):
            assert torch.equal(a, b) and not a.isnan().any(), (case, block_size)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_may_have_any_strides_and_begin_anywhere(dtype: torch.dtype, where: Backend) -> None:
    """Beside each other, with heads before slots; and where no load of 16 bytes may begin, which takes a copy."""
    in_place, beside = ops(where)
    given, rows = drawn(Case(64, keys=(300, 40, 90), dtype=dtype), 16)
    (q, k, v, table, *rest), expected = moved(given, where.device), beside(*moved(rows, where.device))
    both, heads_first = torch.stack([k, v], 1), [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    odd = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in (k, v)]
    wide = torch.full((3, 2 * table.shape[1]), 9**9, dtype=torch.int32, device=where.device)
    wide[:, : table.shape[1]] = table
    for keys, values in (both.unbind(1), heads_first, (k, heads_first[1]), odd, (odd[0], v)):
        found = in_place(q, keys, values, wide[:, : table.shape[1]], *rest)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_every_device
def test_opcheck_accepts_the_op(where: Backend) -> None:
    arguments = moved(drawn(Case(40, rows=(3, 0, 2), keys=(40, 1, 130), sinks=True), 7)[0], where.device)
    torch.library.opcheck(ops(where)[0].default, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_library
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(64, 2, 32)}, r"q, k: expected \(rows, heads, dim\) tensors, k in pages beside block_table"),
        ({"v": torch.zeros(5, 16, 2, 32)}, r"v: expected the \d+ pages of k"),
        ({"k": torch.zeros(5, 16, 2, 32), "v": torch.zeros(5, 8, 2, 32)}, "v: expected pages of 16 slots"),
        ({"table": torch.zeros(3, 5, dtype=torch.int64)}, r"block_table: expected int32 \(3, max_blocks\)"),
        ({"table": torch.zeros(2, 5, dtype=torch.int32)}, r"block_table: expected int32 \(3, max_blocks\)"),
        ({"table": torch.zeros(5, 3, dtype=torch.int32).t()}, "block_table: .* whose last dimension is contiguous"),
        ({"k": torch.zeros(15, 0, 2, 32), "v": torch.zeros(15, 0, 2, 32)}, "k_cache: expected pages of 1 to "),
    ],
)
def test_wrong_pages_are_refused(changes: dict[str, Tensor], message: str) -> None:
    *tensors, sinks, problem = drawn(Case(32, keys=(40, 9, 70)), 16)[0]
    given = dict(zip(("q", "k", "v", "table"), tensors, strict=True)) | changes
    with pytest.raises(RuntimeError, match=message):
        torch.ops.grit_kernels.attention_decode_paged_cuda(*given.values(), sinks, *problem.flat())


@needs_library
def test_a_call_in_pages_takes_the_kernel_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where GRIT_KERNELS_CUDA_CPP=1 chooses it, but on the CPU."""
    compiled, calls = torch.ops.grit_kernels.attention_decode_paged_cuda, []

    def served(*arguments: Any) -> Any:
        calls.append(arguments)
        return compiled(*arguments)

    q, pages = torch.randn(2, 1, 4, 32), [torch.randn(4, 16, 2, 32) for _ in "kv"]
    used, table = torch.tensor([30, 7]), torch.tensor([[2, 0], [3, -1]], dtype=torch.int32)
    with gk.backend("reference"):
        expected = gk.switch_attention_with_kvcache(q, *pages, used, block_table=table)
    choices = importlib.import_module("grit_kernels.backend")._choices
    monkeypatch.setitem(choices["attention_decode_paged"], "cpu", "cuda (C++)")
    monkeypatch.setattr(torch.ops.grit_kernels, "attention_decode_paged", served)
    found = gk.switch_attention_with_kvcache(q, *pages, used, block_table=table)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected)
