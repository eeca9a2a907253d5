"""Attention sinks: a score per head that takes part in every row's softmax and brings no value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from tests.conftest import Backend, assert_within_rule

LENGTHS, CAUSAL, WINDOW = [9, 1, 0, 23], [True, False, True, False], 6
SCALE = 0.2


def explicit(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, hi: Tensor) -> Tensor:
    """The sink as one more column of the scores, dropped after the softmax; a sample and a head at a time."""
    rows, start = [], 0
    for length, causal in zip(LENGTHS, CAUSAL, strict=True):
        part, index = slice(start, start + length), torch.arange(length)
        distance = index[:, None] - index[None, :]
        seen = (distance <= (WINDOW - 1 if causal else WINDOW)) & (index[None, :] < hi[part, None])
        heads = []
        for head in range(q.shape[1]):
            pair = head // (q.shape[1] // k.shape[1])
            scores = (q[part, head] @ k[part, pair].T * SCALE).masked_fill(~seen, float("-inf"))
            joined = torch.cat([scores, sinks[head].to(q.dtype).expand(length, 1)], dim=1).softmax(dim=1)
            heads.append(joined[:, :-1] @ v[part, pair])
        rows.append(torch.stack(heads, dim=1))
        start += length
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("of_sinks", ["float32", "dtype of q"])
def test_outputs_and_gradients_are_those_of_one_more_score_without_a_value(
    dtype: torch.dtype, of_sinks: str, backend: Backend
) -> None:
    tokens = sum(LENGTHS)
    # upper bounds in [0, length]: the first rows of a sample may see nothing
    hi = torch.cat([torch.randint(0, n + 1, (n,), dtype=torch.int32).sort().values for n in LENGTHS])
    hi[:2] = 0
    # a sink has one gradient: with few of them, the largest error of the eager computation would be luck
    drawn = [torch.randn(tokens, heads, 32).to(dtype) for heads in (16, 4, 4)]
    sinks, grad = torch.tensor([-3.0, 0.0, 2.0, 40.0]).repeat(4), torch.randn(tokens, 16, 32).to(dtype)
    if of_sinks != "float32":
        sinks = sinks.to(dtype)
    table = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(backend.device)
    windows = torch.tensor([(WINDOW - 1, 0) if causal else (WINDOW, WINDOW) for causal in CAUSAL])

    def with_gradients(inputs: list[Tensor], run: str) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        if run == "explicit":
            out = explicit(*leaves, hi)
        else:
            options: dict[str, Any] = {"window_size": windows.to(backend.device), "hi": hi.to(backend.device)}
            lengths = (table, table, max(LENGTHS), max(LENGTHS))
            flags = torch.tensor(CAUSAL, device=backend.device)
            with backend():
                out = gk.switch_attention_varlen(
                    *leaves[:3], flags, *lengths, softmax_scale=SCALE, sinks=leaves[3], **options
                )
        assert isinstance(out, Tensor) and out.dtype == leaves[0].dtype
        return [out, *torch.autograd.grad(out, leaves, grad.to(out))]

    found = with_gradients([x.to(backend.device) for x in (*drawn, sinks)], "package")
    truth = with_gradients([x.double() for x in (*drawn, sinks)], "explicit")
    eager = with_gradients([*drawn, sinks], "explicit")
    assert found[4].dtype == sinks.dtype
    for name, ours, oracle, theirs in zip(("out", "dq", "dk", "dv", "dsinks"), found, truth, eager, strict=True):
        assert_within_rule(ours.cpu(), oracle, theirs, name)
    assert not found[0][:2].any()


def call(backend: Backend, rows: int, sinks: Tensor | None, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """out and lse, and gradients, of two samples; few rows over many keys are decoded."""
    drawn = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(2, n, h, 64, generator=drawn).to(backend.device, dtype).requires_grad_()
        for n, h in ((rows, 4), (70, 2), (70, 2))
    )
    leaves = [q, k, v] if sinks is None else [q, k, v, sinks.to(backend.device).requires_grad_()]
    with backend():
        result = gk.switch_attention(q, k, v, True, sinks=leaves[3] if len(leaves) > 3 else None, return_lse=True)
        out, lse = result
        grads = torch.autograd.grad(out.float().square().sum() + lse.sin().sum(), leaves)
    return [x.detach() for x in (out, lse)], list(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [2, 70])
def test_sinks_of_minus_infinity_are_none(backend: Backend, rows: int, dtype: torch.dtype) -> None:
    plain, grads = call(backend, rows, None, dtype)
    found, (*others, dsinks) = call(backend, rows, torch.full((4,), float("-inf")), dtype)
    for a, b in zip([*plain, *grads], [*found, *others], strict=True):
        assert torch.equal(a, b)
    assert not dsinks.any()


@pytest.mark.parametrize("rows", [2, 70])
def test_sinks_far_above_every_score_take_all_and_are_the_log_sum_exp(backend: Backend, rows: int) -> None:
    sinks = torch.tensor([1e3, 1e5, 1e30, 300.0])
    (out, lse), grads = call(backend, rows, sinks, torch.float32)
    torch.testing.assert_close(lse.cpu(), sinks.expand(lse.shape), rtol=1e-6, atol=0)
    assert bool((out.abs() < 1e-30).all()) and all(bool(x.isfinite().all()) for x in grads)
    # what is left of the loss is sin(lse), and lse is the sink
    torch.testing.assert_close(grads[3][3].cpu(), 2 * rows * torch.tensor(300.0).cos(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("steps", [1, 3])
def test_decoding_after_a_cache_equals_rows_of_the_whole_call(backend: Backend, dtype: torch.dtype, steps: int) -> None:
    lens = [40, 300, steps]
    q, k, v = (torch.randn(3, n, h, 32).to(backend.device, dtype) for n, h in ((300, 4), (300, 2), (300, 2)))
    used = torch.tensor([n - steps for n in lens], dtype=torch.int32, device=backend.device)
    sinks = torch.tensor([0.5, -2.0, 4.0, float("-inf")], device=backend.device)
    lengths = torch.tensor(lens, dtype=torch.int32, device=backend.device)
    with gk.backend("reference"):
        whole, whole_lse = gk.switch_attention(
            q.double(), k.double(), v.double(), True, sinks=sinks, seqlens_q=lengths, seqlens_k=lengths, return_lse=True
        )
        eager = gk.switch_attention(q, k, v, True, sinks=sinks, seqlens_q=lengths, seqlens_k=lengths)
    last = [slice(n - steps, n) for n in lens]
    rows, new_k, new_v = (torch.stack([x[b, part] for b, part in enumerate(last)]) for x in (q, k, v))
    caches = k.clone(), v.clone()
    for b, n in enumerate(lens):
        for cache in caches:
            cache[b, n - steps :] = float("nan")
    with backend():
        out, lse = gk.switch_attention_with_kvcache(rows, *caches, used, k=new_k, v=new_v, sinks=sinks, return_lse=True)
    for b, part in enumerate(last):
        assert_within_rule(out[b].cpu(), whole[b, part].cpu(), eager[b, part].cpu(), "out")
        torch.testing.assert_close(lse[b].double(), whole_lse[b, part], rtol=1e-5, atol=1e-5)


def test_a_trained_sink_alone_gets_its_gradient_over_keys_stored_head_by_head(backend: Backend) -> None:
    """Keys of (B, H, S, D) are read in place where nothing is trained."""
    k, v = (torch.randn(2, 2, 9, 32, device=backend.device).transpose(1, 2) for _ in range(2))
    q, sinks = torch.randn(2, 9, 4, 32, device=backend.device), torch.zeros(4, device=backend.device)
    found = []
    for keys, values in ((k, v), (k.contiguous(), v.contiguous())):
        trained = sinks.clone().requires_grad_()
        with backend():
            out = gk.switch_attention(q, keys, values, True, sinks=trained)
            assert isinstance(out, Tensor)
            found += torch.autograd.grad(out.square().sum(), trained)
    torch.testing.assert_close(*found)
    assert bool(found[0].abs().min() > 0)


def test_autocast_leaves_the_sinks_dtype_to_their_gradient(backend: Backend) -> None:
    q, sinks = torch.randn(1, 5, 2, 32, device=backend.device), torch.ones(2, device=backend.device, requires_grad=True)
    with backend(), torch.autocast(backend.device, torch.bfloat16):
        out = gk.switch_attention(q, q, q, True, sinks=sinks)
    assert isinstance(out, Tensor) and out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert sinks.grad is not None and sinks.grad.dtype == torch.float32
