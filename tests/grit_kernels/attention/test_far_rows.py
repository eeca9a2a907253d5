"""Offsets beyond 2^31 elements, in Triton's interpreter: rows that lie far apart in memory of which only their pages exist."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton is not installed")

from grit_kernels.attention import triton_backward, triton_decode, triton_forward  # noqa: E402
from grit_kernels.attention.problem import AttentionProblem  # noqa: E402
from grit_kernels.attention.triton_common import LARGEST_TILE, addressable  # noqa: E402
from tests.grit_kernels.attention.samples import draw_call, results  # noqa: E402

pytestmark = pytest.mark.interpret

STEP = 2**31 // LARGEST_TILE - 8
"""Elements from row to row: the most that kernels take without a copy."""


def far_apart(x: Tensor) -> Tensor:
    """The same (rows, H, D), whose heads are far apart as well."""
    rows, heads, dim = x.shape
    memory = torch.empty((rows + 1) * STEP, dtype=x.dtype)
    assert rows * STEP > 2**31
    view = memory.as_strided(x.shape, (STEP, STEP // heads // 8 * 8, 1))
    view.copy_(x)
    assert addressable(view) is view
    return view


@pytest.mark.parametrize(("seed", "deterministic"), [(20, False), pytest.param(31, True, marks=pytest.mark.slow)])
def test_rows_far_apart_give_the_bits_of_rows_side_by_side(seed: int, deterministic: bool) -> None:
    call = draw_call(random.Random(seed).choice, lengths=(150,), dims=(32,), dtype=torch.float16)
    backward = functools.partial(triton_backward.attention_backward, deterministic=deterministic)
    near = [x.contiguous() for x in call.clean(torch.float16)]
    expected, found = (
        results(call, triton_forward.attention_forward, backward, inputs)
        for inputs in (near, [far_apart(x) for x in near])
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("splits", [1, 3])
def test_keys_far_apart_are_decoded_like_keys_side_by_side(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "choose_splits", lambda *_: splits)
    q, k, v = (torch.randn(rows, heads, 32, dtype=torch.float16) for rows, heads in ((2, 4), (300, 2), (300, 2)))
    index, ones = torch.arange(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    problem = AttentionProblem(
        index, ones, index * 150, ones * 150, ones * 149, ones * 0, None, 1, 150, 1, 150, 0.2, 0.0
    )
    expected, found = (
        triton_decode.attention_decode(q, *keys, None, None, problem) for keys in ((k, v), (far_apart(k), far_apart(v)))
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
