"""Random calls of the low-level op: padded or packed, windows, upper bounds, strided views; NaN wherever no sample owns a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import reference
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.visibility import window_bounds

Choose = Callable[[Sequence[Any]], Any]
"""Picks one element: ``random.Random(seed).choice``, or a draw of hypothesis."""


SINKS = [0.5, -2.0, 40.0, float("-inf"), 3.0, -300.0]
"""Of up to six heads."""


@dataclass
class Call:
    """``q, k, v, grad_out`` (NaN outside the samples), ``grad_lse`` or None, and the problem."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    problem: AttentionProblem
    rows_used: Tensor
    keys_used: Tensor
    sinks: Tensor | None = None

    def clean(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v, grad_out in ``dtype`` with 0 in place of NaN."""
        masks = (self.rows_used, self.keys_used, self.keys_used, self.rows_used)
        inputs = (self.q, self.k, self.v, self.grad_out)
        return [torch.where(m[:, None, None], x, 0.0).to(dtype) for x, m in zip(inputs, masks, strict=True)]

    def to(self, device: str) -> Call:
        move = (x.to(device) if isinstance(x, Tensor) else x for x in self.problem.flat())
        grad_lse, sinks = (None if x is None else x.to(device) for x in (self.grad_lse, self.sinks))
        tensors = [x.to(device) for x in (self.q, self.k, self.v, self.grad_out)]
        used = self.rows_used.to(device), self.keys_used.to(device)
        return Call(*tensors, grad_lse, AttentionProblem(*move), *used, sinks)


def draw_call(
    choose: Choose,
    *,
    lengths: Sequence[int],
    dims: Sequence[int],
    dtype: torch.dtype = torch.float32,
    windows: Sequence[int] = (-1, -1, 0, 3, 20),
) -> Call:
    torch.manual_seed(choose(range(1000)))
    batch, heads_kv, group, dim = choose((1, 2, 3)), choose((1, 2)), choose((1, 2, 3)), choose(dims)
    q_len = [choose(lengths) for _ in range(batch)]
    k_len = q_len if choose((True, False)) else [choose(lengths) for _ in range(batch)]
    max_q, max_k, q_rows, k_rows = max(*q_len, 1), max(*k_len, 1), 0, 0
    first = [0] * batch
    if choose((True, False)):
        max_q = q_rows = max_q + choose((0, 3))
        max_k = k_rows = max_k + choose((0, 7))
        if choose((True, False)):
            first = [choose(range(k_rows - n + 1)) for n in k_len]
        q_start = [b * q_rows for b in range(batch)]
        k_start = [b * k_rows + first[b] for b in range(batch)]
        total_q, total_k = batch * q_rows, batch * k_rows
    else:
        q_start = [sum(q_len[:b]) for b in range(batch)]
        k_start = [sum(k_len[:b]) for b in range(batch)]
        total_q, total_k = sum(q_len), sum(k_len)
    causal = torch.tensor([choose((True, False)) for _ in range(batch)])
    window = torch.tensor([[choose(windows), choose(windows)] for _ in range(batch)])
    rows_used, keys_used = torch.zeros(total_q, dtype=torch.bool), torch.zeros(total_k, dtype=torch.bool)
    hi = torch.zeros(total_q, dtype=torch.int32) if choose((True, False, False)) else None
    for b in range(batch):
        rows = slice(q_start[b], q_start[b] + q_len[b])
        rows_used[rows] = True
        keys_used[k_start[b] : k_start[b] + k_len[b]] = True
        if hi is not None:
            hi[rows] = torch.randint(-2, k_len[b] + 3, (q_len[b],), dtype=torch.int32).sort().values

    def data(used: Tensor, heads: int) -> Tensor:
        spare = choose((0, 1))  # a view into a wider tensor, whose rows are not contiguous
        x = torch.randn(used.shape[0], heads + spare, dim + 8 * spare).to(dtype)
        x[~used] = float("nan")
        return x[:, spare:, :dim]

    grad_lse = torch.where(rows_used[:, None], torch.randn(total_q, heads_kv * group), 0.0)
    lengths_and_bounds = [torch.tensor(x, dtype=torch.int32) for x in (q_start, q_len, k_start, k_len)]
    return Call(
        data(rows_used, heads_kv * group),
        data(keys_used, heads_kv),
        data(keys_used, heads_kv),
        data(rows_used, heads_kv * group),
        grad_lse if choose((True, False)) else None,
        AttentionProblem(
            *lengths_and_bounds,
            *window_bounds(causal, window, max_q, max_k),
            hi,
            *(q_rows, k_rows, max_q, max_k),
            softmax_scale=choose((dim**-0.5, dim**-0.5, -0.1, 0.0)),
            softcap=choose((0.0, 0.0, 5.0)),
        ),
        rows_used,
        keys_used,
        choose((None, torch.tensor(SINKS, dtype=choose((torch.float32, dtype)))[: heads_kv * group])),
    )


def results(
    call: Call, forward: Callable[..., Any], backward: Callable[..., Any], inputs: list[Tensor]
) -> list[Tensor]:
    """out, lse, dq, dk, dv, dsinks of one implementation on ``inputs`` (q, k, v, grad_out)."""
    q, k, v, grad_out = inputs
    grad_lse = None if call.grad_lse is None else call.grad_lse.to(torch.promote_types(q.dtype, torch.float32))
    out, lse = forward(q, k, v, call.problem, call.sinks)
    return [out, lse, *backward(grad_out, grad_lse, q, k, v, out, lse, call.problem, call.sinks)]


def assert_call_equals_the_reference(call: Call, found: list[Tensor], tolerance: float) -> None:
    """Finite, 0, or -inf exactly where the float64 reference is; else within ``tolerance`` of the largest value (at least 1)."""
    expected = results(call, reference.attention_forward, reference.attention_backward, call.clean(torch.float64))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), found, expected, strict=True):
        a = a.to(b)
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), f"{name}: not finite in other places than the reference"
        scale = max(1.0, b[finite].abs().max().item()) if finite.any() else 1.0
        torch.testing.assert_close(
            a[finite], b[finite], rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def one_sample(rows: int, keys: int, left: int = -1, right: int = -1) -> AttentionProblem:
    """One sample; -1: no bound."""
    numbers = (0, rows, 0, keys, left if left >= 0 else keys + rows, right if right >= 0 else keys + rows)
    tables = [torch.tensor([x], dtype=torch.int32) for x in numbers]
    return AttentionProblem(*tables, None, 0, 0, rows, keys, 0.125, 0.0)
