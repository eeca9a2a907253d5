"""The Triton attention kernels on a CUDA device: many random calls in every dtype, long samples, large offsets."""

from __future__ import annotations

import functools
import random

import pytest
import torch

import grit_kernels as gk

pytest.importorskip("triton", reason="the package triton is not installed")
from grit_kernels.attention import triton_backward, triton_forward, triton_plan  # noqa: E402
from tests.grit_kernels.attention.samples import assert_call_equals_the_reference, draw_call, results  # noqa: E402

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("seed", range(12))
def test_any_call_equals_the_reference_forward_and_backward(seed: int) -> None:
    dtype = list(TOLERANCE)[
        seed % len(TOLERANCE)
    ]  # every seed compiles kernels of its own, so no seed takes all dtypes
    call = draw_call(
        random.Random(seed).choice,
        lengths=(0, 1, 5, 64, 129, 300, 700),
        dims=(32, 64, 72, 80, 96, 128, 192, 256, 512),
        dtype=dtype,
        windows=(-1, -1, 0, 20, 200),
    )
    on_gpu = call.to("cuda")
    inputs = [on_gpu.q, on_gpu.k, on_gpu.v, on_gpu.grad_out]
    found = results(on_gpu, triton_forward.attention_forward, triton_backward.attention_backward, inputs)
    assert_call_equals_the_reference(call, [x.cpu() for x in found], TOLERANCE[dtype])
    again = results(on_gpu, triton_forward.attention_forward, triton_backward.attention_backward, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "results repeat bit by bit"
    atomic = functools.partial(triton_backward.attention_backward, deterministic=False)
    found = results(on_gpu, triton_forward.attention_forward, atomic, inputs)
    assert_call_equals_the_reference(call, [x.cpu() for x in found], TOLERANCE[dtype])


@pytest.mark.parametrize("window", [(-1, -1), (1023, 1023)])
def test_a_mixed_pack_of_real_lengths_equals_a_launch_per_sample(
    window: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # alone, a sample of few rows would have its keys split, which rounds differently
    monkeypatch.setattr(triton_plan, "SHORTEST_SPLIT", 1 << 30)
    lens, causal = [256, 2048, 2048, 37, 1500], [False, False, True, True, False]
    cu = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(sum(lens), h, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    flags = torch.tensor(causal, device="cuda")
    packed = gk.switch_attention_varlen(q, k, v, flags, cu, cu, max(lens), max(lens), window_size=window)
    for b, flag in enumerate(causal):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        alone = gk.switch_attention(q[None, rows], k[None, rows], v[None, rows], flag, window_size=window)
        torch.testing.assert_close(packed[rows], alone[0], rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_few_rows_over_a_long_cache_equal_the_reference(rows: int) -> None:
    q = torch.randn(3, rows, 16, 128, device="cuda", dtype=torch.bfloat16)
    cache_k, cache_v = (torch.randn(3, 9000, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    used = torch.tensor([9000, 300, 4111], device="cuda", dtype=torch.int32)
    found = gk.switch_attention_with_kvcache(q, cache_k, cache_v, used)
    with gk.backend("reference"):
        expected = gk.switch_attention_with_kvcache(q.float(), cache_k.float(), cache_v.float(), used)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-2)


def test_offsets_beyond_two_to_the_31_elements_are_addressed() -> None:
    heads, dim, rows = 256, 128, 70_000
    assert rows * heads * dim > 2**31
    k = torch.randn(rows, 1, dim, device="cuda", dtype=torch.bfloat16)
    q = torch.empty(rows, heads, dim, device="cuda", dtype=torch.bfloat16).normal_()
    cu = torch.tensor([0, rows - 100, rows], device="cuda", dtype=torch.int32)
    out = gk.switch_attention_varlen(q, k, k, True, cu, cu, rows - 100, rows - 100, window_size=(15, 0))
    tail = slice(rows - 100, rows)
    alone = gk.switch_attention(q[None, tail], k[None, tail], k[None, tail], True, window_size=(15, 0))[0]
    torch.testing.assert_close(out[tail], alone, rtol=0, atol=0)


def test_more_samples_than_a_grid_axis_holds_are_served() -> None:
    batch = 65_600
    q, k, v = (torch.randn(batch + 299, 1, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cu = torch.cat([torch.zeros(1), torch.arange(300, batch + 300)]).to("cuda", torch.int32)
    rows = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    out = gk.switch_attention_varlen(q[:batch], k, v, True, rows, cu, 1, 300)
    torch.testing.assert_close(out[1:], v[300:], rtol=0, atol=0)
