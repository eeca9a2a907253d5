"""Attention sinks: a score per head that takes part in every row's softmax and brings no value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from grit_kernels.attention import prepared_attention
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.hf.attention_pass import AttentionPass
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
def test_outputs_and_gradients_are_those_of_one_more_score_without_a_value(
    dtype: torch.dtype, backend: Backend
) -> None:
    tokens = sum(LENGTHS)
    # upper bounds in [0, length]: the first rows of a sample may see nothing
    hi = torch.cat([torch.randint(0, n + 1, (n,), dtype=torch.int32).sort().values for n in LENGTHS])
    hi[:2] = 0
    # a sink has one gradient: with few of them, the largest error of the eager computation would be luck
    drawn = [torch.randn(tokens, heads, 32).to(dtype) for heads in (16, 4, 4)]
    sinks, grad = torch.tensor([-3.0, 0.0, 2.0, 40.0]).repeat(4), torch.randn(tokens, 16, 32).to(dtype)

    def with_gradients(inputs: list[Tensor], run: str) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        if run == "explicit":
            out = explicit(*leaves, hi)
        else:
            pack = gk.SamplePack.from_lengths(LENGTHS, torch.tensor(CAUSAL), hi=hi, device=backend.device)
            bounds = AttentionPass(pack.causal, pack=pack).window_bounds(WINDOW, max(LENGTHS), max(LENGTHS))
            ranges = (pack.starts, pack.lengths, pack.starts, pack.lengths)
            longest = (max(LENGTHS), max(LENGTHS))
            problem = AttentionProblem(*ranges, *bounds, pack.hi, 0, 0, *longest, SCALE, 0.0)
            with backend():
                out = prepared_attention(*leaves[:3], problem, None, leaves[3])
        assert out.dtype == leaves[0].dtype
        return [out, *torch.autograd.grad(out, leaves, grad.to(out))]

    found = with_gradients([x.to(backend.device) for x in (*drawn, sinks)], "package")
    truth = with_gradients([x.double() for x in (*drawn, sinks)], "explicit")
    eager = with_gradients([*drawn, sinks], "explicit")
    for name, ours, oracle, theirs in zip(("out", "dq", "dk", "dv", "dsinks"), found, truth, eager, strict=True):
        assert_within_rule(ours.cpu(), oracle, theirs, name)
    assert not found[0][:2].any()
