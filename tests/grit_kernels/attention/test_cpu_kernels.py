"""The C++ attention kernels under every instruction set of this CPU, called as ops, against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import grit_kernels as gk
from grit_kernels import _library
from grit_kernels.attention import reference
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.visibility import dense_mask
from tests.conftest import assert_within_rule

pytestmark = pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
ISAS = _library.cpu_isas() if _library.status().loaded else ["none"]
FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
NONE = 2**20  # a window distance that no pair of positions reaches


@dataclass(frozen=True)
class Call:
    """One call of the ops: tensors and tables. ``hi`` per row of q."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts_q: list[int]
    lens_q: list[int]
    starts_k: list[int]
    lens_k: list[int]
    left: list[int]
    right: list[int]
    hi: Tensor | None = None
    softmax_scale: float = 0.2
    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def problem(self) -> AttentionProblem:
        tables = (self.starts_q, self.lens_q, self.starts_k, self.lens_k, self.left, self.right)
        int32 = [torch.tensor(x, dtype=torch.int32) for x in tables]
        longest = (max(self.lens_q), max(self.lens_k))
        return AttentionProblem(*int32, self.hi, 0, 0, *longest, self.softmax_scale, self.softcap)

    def forward(self) -> tuple[Tensor, Tensor]:
        return torch.ops.grit_kernels.attention_forward(
            self.q, self.k, self.v, *self.problem.flat(), self.sinks, None, True
        )

    def backward(self, grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        ops = torch.ops.grit_kernels
        given = (grad, grad_lse, self.q, self.k, self.v, out, lse, *self.problem.flat(), self.sinks, None, True)
        return ops.attention_backward(*given)

    def exact(self, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, ...]:
        """out, lse, dq, dk, dv, dsinks of the reference in float64."""
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        sinks, grad_lse = (None if x is None else x.double() for x in (self.sinks, grad_lse))
        out, lse = reference.attention_forward(q, k, v, self.problem, sinks)
        return out, lse, *reference.attention_backward(grad.double(), grad_lse, q, k, v, out, lse, self.problem, sinks)

    def eager(self, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, ...]:
        """The same, computed eagerly and differentiated by autograd in the inputs' dtype."""
        q, k, v = (x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v))
        sinks = torch.zeros(0) if self.sinks is None else self.sinks
        sinks = sinks.detach().to(q.dtype).requires_grad_()
        outs, lses = torch.zeros_like(self.q), torch.full(self.q.shape[:2], float("-inf"), dtype=self.q.dtype)
        group = q.shape[1] // k.shape[1]
        for b, (first_q, len_q) in enumerate(zip(self.starts_q, self.lens_q, strict=True)):
            rows, keys = slice(first_q, first_q + len_q), slice(self.starts_k[b], self.starts_k[b] + self.lens_k[b])
            hi = None if self.hi is None else self.hi[rows]
            mask = dense_mask(len_q, self.lens_k[b], self.left[b], self.right[b], hi)
            alive = mask.any(-1)
            if not bool(alive.any()):
                continue
            k_b, v_b = (x[keys].repeat_interleave(group, 1) for x in (k, v))
            score = torch.einsum("qhd,khd->hqk", q[rows], k_b) * self.softmax_scale
            if self.softcap:
                score = self.softcap * torch.tanh(score / self.softcap)
            score = score.masked_fill(~mask & alive[:, None], float("-inf"))
            if self.sinks is not None:
                score = torch.cat([score, sinks[:, None, None].expand(-1, len_q, 1)], -1)
            p = score.softmax(-1)[..., : self.lens_k[b]] * alive[:, None]
            outs[rows] = torch.einsum("hqk,khd->qhd", p, v_b)
            lses[rows] = score.logsumexp(-1).T.masked_fill(~alive[:, None], float("-inf"))
        total = (outs * grad).sum()
        if grad_lse is not None:
            total = total + torch.where(lses.isfinite(), lses * grad_lse.to(lses.dtype), 0.0).sum()
        leaves = (q, k, v, sinks)
        found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None,) * 4
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
        return outs.detach(), lses.detach(), *grads


def make_call(
    lens_q: list[int],
    lens_k: list[int],
    *,
    left: list[int] | None = None,
    right: list[int] | None = None,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Call:
    def starts(lens: list[int]) -> list[int]:
        return [sum(lens[:b]) for b in range(len(lens))]

    q, k, v = (torch.randn(sum(n), h, dim).to(dtype) for n, h in ((lens_q, heads[0]), *[(lens_k, heads[1])] * 2))
    batch = len(lens_q)
    return Call(
        q,
        k,
        v,
        starts(lens_q),
        lens_q,
        starts(lens_k),
        lens_k,
        left or [NONE] * batch,
        right or [NONE] * batch,
        **options,
    )


def check(call: Call, with_lse: bool = True) -> None:
    grad = torch.randn(call.q.shape).to(call.q.dtype)
    grad_lse = torch.randn(call.q.shape[:2]) if with_lse else None
    out, lse = call.forward()
    found = (out, lse, *call.backward(grad, grad_lse, out, lse))
    exact, eager = call.exact(grad, grad_lse), call.eager(grad, grad_lse)
    live = exact[1].isfinite()
    assert torch.equal(lse.isfinite(), live) and bool((lse[~live] == float("-inf")).all())
    assert bool((out[~live] == 0).all()) and bool((found[2][~live] == 0).all())
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), found, exact, eager, strict=True):
        if name == "lse":
            a, b, c = a[live], b[live], c[live]
        assert_within_rule(a, b, c, name)


def some_sinks(heads: int) -> Tensor:
    """Of many sizes; -inf is none."""
    return torch.tensor([0.5, -3.0, 6.0, -float("inf"), 40.0, 2.0, -300.0, 0.0])[:heads]


def upper_bounds(lens_q: list[int], lens_k: list[int]) -> Tensor:
    steps = [torch.randint(0, n + 2, (m,)).sort().values for m, n in zip(lens_q, lens_k, strict=True)]
    return torch.cat(steps).int()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_packs_keep_the_accuracy_rule_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    lens_q, lens_k = [70, 0, 17, 33, 5], [70, 9, 40, 33, 0]
    with _library.cpu_isa(isa):
        for sinks in (None, some_sinks(6), some_sinks(6).to(dtype)):
            check(make_call(lens_q, lens_k, right=[0, 0, NONE, NONE, 0], dtype=dtype, heads=(6, 2), sinks=sinks))
        check(
            make_call(lens_q, lens_k, left=[9, 3, 0, 70, 1], right=[0, 3, 4, 7, 1], dtype=dtype, heads=(2, 2), dim=80)
        )
        check(make_call([40, 3], [40, 5], dtype=dtype, softcap=2.0, hi=upper_bounds([40, 3], [40, 5]), dim=40), False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [32, 96, 128, 256, 320, 512])
def test_head_dims_and_groups_of_every_instruction_set(isa: str, dim: int) -> None:
    with _library.cpu_isa(isa):
        check(make_call([21, 150], [21, 150], right=[NONE, 0], heads=(5, 1), dim=dim, dtype=torch.bfloat16))
        check(make_call([19], [19], heads=(2, 2), dim=dim))


@FEW
@given(data=st.data())
def test_any_call_keeps_the_accuracy_rule(data: st.DataObject) -> None:
    draw = data.draw
    batch = draw(st.integers(1, 3))
    lens_k = draw(st.lists(st.integers(0, 200), min_size=batch, max_size=batch))
    lens_q = [draw(st.sampled_from([n, n // 2, n + 3, 1, 4, 0])) for n in lens_k]
    edges = st.lists(st.sampled_from([NONE, NONE, 0, 1, 20, 100]), min_size=batch, max_size=batch)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    heads = draw(st.sampled_from([(1, 1), (3, 1), (4, 4), (8, 2), (7, 1)]))
    call = make_call(
        lens_q,
        lens_k,
        left=draw(edges),
        right=draw(edges),
        heads=heads,
        dim=draw(st.sampled_from([32, 40, 64, 72, 128])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        softmax_scale=draw(st.sampled_from([0.2, 0.0, -0.3])),
        softcap=draw(st.sampled_from([0.0, 1.5])),
        hi=draw(st.sampled_from([None, upper_bounds(lens_q, lens_k)])),
        sinks=draw(st.sampled_from([None, some_sinks(heads[0])])),
    )
    with _library.cpu_isa(draw(st.sampled_from(ISAS))):
        check(call)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
def test_few_queries_after_many_keys_join_their_parts(isa: str, rows: int, heads: tuple[int, int]) -> None:
    lens_k = [600, 300, 513, 64]
    for dtype, dim, softcap in ((torch.bfloat16, 128, 0.0), (torch.float32, 72, 1.0), (torch.bfloat16, 512, 0.0)):
        sinks = None if dim == 72 else some_sinks(heads[0])
        options = {"heads": heads, "dim": dim, "dtype": dtype, "softcap": softcap, "sinks": sinks}
        with _library.cpu_isa(isa):
            check(make_call([rows] * 4, lens_k, left=[NONE, 280, 30, NONE], right=[NONE, 0, 0, NONE], **options))


def poisoned(call: Call, extra: int) -> Call:
    """The samples apart from each other, with NaN in between."""

    def spread(x: Tensor, starts: list[int], lens: list[int]) -> tuple[Tensor, list[int]]:
        out = torch.full((x.shape[0] + extra * (len(lens) + 1), *x.shape[1:]), float("nan"), dtype=x.dtype)
        moved = [start + extra * (b + 1) for b, start in enumerate(starts)]
        for start, to, n in zip(starts, moved, lens, strict=True):
            out[to : to + n] = x[start : start + n]
        return out, moved

    q, starts_q = spread(call.q, call.starts_q, call.lens_q)
    k, starts_k = spread(call.k, call.starts_k, call.lens_k)
    v, _ = spread(call.v, call.starts_k, call.lens_k)
    return replace(call, q=q, k=k, v=v, starts_q=starts_q, starts_k=starts_k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize(("rows", "keys"), [(1, 40), (3, 600), (40, 40)], ids=["one part", "parts", "tiles"])
def test_nan_in_queries_or_keys_reaches_the_output(isa: str, softcap: float, rows: int, keys: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call([rows], [keys], dtype=dtype, softcap=softcap, sinks=some_sinks(4) if softcap else None)
        one_key = call.k.clone()
        one_key[3] = float("nan")
        broken = [{name: torch.full_like(getattr(call, name), float("nan"))} for name in ("q", "k")]
        for change in (*broken, {"k": one_key}, {"sinks": torch.full((4,), float("nan"))}):
            with _library.cpu_isa(isa):
                out, lse = replace(call, **change).forward()
            assert bool(out.isnan().all()) and bool(lse.isnan().all()), (dtype, list(change))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lens_q", [[37, 20], [2, 1]])
def test_rows_between_samples_are_neither_read_nor_left_unwritten(isa: str, lens_q: list[int]) -> None:
    call = make_call(lens_q, [37, 45], right=[0, NONE], dtype=torch.bfloat16, sinks=some_sinks(4))
    apart = poisoned(call, 5)
    with _library.cpu_isa(isa):
        out, lse = call.forward()
        grad = torch.randn_like(out)
        grads = call.backward(grad, None, out, lse)
        apart_out, apart_lse = apart.forward()
        spread_grad = torch.full_like(apart_out, float("nan"))
        for start, to, n in zip(call.starts_q, apart.starts_q, lens_q, strict=True):
            spread_grad[to : to + n] = grad[start : start + n]
        apart_grads = apart.backward(spread_grad, None, apart_out, apart_lse)
    assert torch.equal(grads[3], apart_grads[3])
    pairs = [(out, apart_out, "q"), (lse, apart_lse, "q"), *zip(grads[:3], apart_grads[:3], "qkk", strict=True)]
    for whole, found, of in pairs:
        starts, moved, lens = (
            (call.starts_q, apart.starts_q, lens_q) if of == "q" else (call.starts_k, apart.starts_k, call.lens_k)
        )
        unowned = torch.ones(found.shape[0], dtype=torch.bool)
        for start, to, n in zip(starts, moved, lens, strict=True):
            assert torch.equal(found[to : to + n], whole[start : start + n])
            unowned[to : to + n] = False
        assert bool((found[unowned] == (float("-inf") if found.ndim == 2 else 0)).all())


def everything(call: Call) -> list[Tensor]:
    out, lse = call.forward()
    grad = torch.arange(out.numel()).reshape(out.shape).sin().to(out.dtype)
    return [out, lse, *call.backward(grad, None, out, lse)]


def test_the_number_of_threads_changes_no_bit(restore_threads: None) -> None:
    options = {"heads": (3, 1), "dtype": torch.bfloat16, "sinks": some_sinks(3)}
    call = make_call([700, 90, 1], [700, 90, 600], right=[0, NONE, 0], **options)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(everything(call))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("lens_q", [[300, 700, 31], [2, 1, 4]])
def test_a_sample_alone_gets_the_bits_it_gets_in_a_batch(lens_q: list[int]) -> None:
    call = make_call(lens_q, [300, 700, 31], right=[0, NONE, 0], left=[NONE, 200, 5], sinks=some_sinks(4))
    out, lse = call.forward()
    for b in range(3):
        rows = slice(call.starts_q[b], call.starts_q[b] + lens_q[b])
        keys = slice(call.starts_k[b], call.starts_k[b] + call.lens_k[b])
        alone = replace(
            call,
            q=call.q[rows],
            k=call.k[keys],
            v=call.v[keys],
            starts_q=[0],
            starts_k=[0],
            lens_q=lens_q[b : b + 1],
            lens_k=call.lens_k[b : b + 1],
            left=call.left[b : b + 1],
            right=call.right[b : b + 1],
        )
        found = alone.forward()
        assert torch.equal(found[0], out[rows]) and torch.equal(found[1], lse[rows])


@pytest.mark.parametrize("isa", ISAS)
def test_a_window_as_long_as_the_sample_equals_none_in_every_bit(isa: str) -> None:
    call = make_call([150, 3], [150, 550], dtype=torch.bfloat16)
    with _library.cpu_isa(isa):
        windowed = everything(replace(call, left=[150, 550], right=[150, 550]))
        assert all(torch.equal(a, b) for a, b in zip(windowed, everything(call), strict=True))


@pytest.mark.parametrize("right", [0, 64])
def test_cost_of_a_window_grows_with_the_window_not_the_length(right: int) -> None:
    visited = {}
    for length in (1024, 2048):
        call = make_call([length], [length], heads=(1, 1), dim=32, left=[64], right=[right])
        _library.visited_key_blocks()
        out, lse = call.forward()
        forward = _library.visited_key_blocks()
        call.backward(torch.zeros_like(out), None, out, lse)
        visited[length] = forward, _library.visited_key_blocks()
    for short, long in zip(visited[1024], visited[2048], strict=True):
        assert short * 1.9 <= long <= short * 2.1, "a window costs O(length * window)"
    full = make_call([2048], [2048], heads=(1, 1), dim=32)
    full.forward()
    assert visited[2048][0] * 4 < _library.visited_key_blocks()


def test_upper_bounds_cost_what_they_show() -> None:
    rows, keys = 512, 2048
    low, high = (make_call([rows], [keys], heads=(1, 1), dim=32, hi=torch.full((rows,), n).int()) for n in (128, keys))
    counts = []
    for call in (low, high):
        _library.visited_key_blocks()
        call.forward()
        counts.append(_library.visited_key_blocks())
    assert counts[1] == 16 * counts[0]


def test_offsets_beyond_two_to_the_31_elements_are_reached() -> None:
    rows, step = 40, 2**26
    memory = torch.empty(rows * step, dtype=torch.bfloat16)  # only the touched pages exist
    assert memory.numel() > 2**31
    call = make_call([rows], [rows], right=[0], heads=(1, 1), dim=64, dtype=torch.bfloat16)
    k = memory.as_strided((rows, 1, 64), (step, 64, 1))
    v = memory[64:].as_strided((rows, 1, 64), (step, 64, 1))
    k.copy_(call.k)
    v.copy_(call.v)
    far = replace(call, k=k, v=v)
    assert all(torch.equal(a, b) for a, b in zip(everything(far), everything(call), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lens_q": [9, 9]}, "q_start, q_len: sample 1"),
        ({"starts_k": [0, -1]}, "k_start, k_len: sample 1"),
        ({"hi": torch.zeros(3, dtype=torch.int32)}, "hi: expected a contiguous int32 tensor of 12"),
        ({"k": torch.zeros(12, 2, 64, dtype=torch.bfloat16)}, "k: its dtype differs"),
        ({"v": torch.zeros(12, 1, 64)}, "v: expected"),
        ({"sinks": torch.zeros(3)}, "sinks: expected a contiguous tensor of 4 elements"),
    ],
)
def test_tables_and_tensors_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    call = replace(make_call([4, 8], [4, 8]), **change)
    with pytest.raises(RuntimeError, match=message):
        call.forward()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_kept_from_a_call_full_of_nan_changes_nothing(isa: str, dtype: torch.dtype) -> None:
    call = make_call(
        [21, 5, 3], [6001, 2999, 3001], left=[70, NONE, 3], right=[0, NONE, 0], heads=(3, 3), dim=72, dtype=dtype
    )
    poison = replace(call, **{name: torch.full_like(getattr(call, name), float("nan")) for name in "qkv"})
    grad = torch.randn_like(call.q)
    with _library.cpu_isa(isa):
        before = call.forward()
        before += call.backward(grad, None, *before)
        ruined = poison.forward()
        assert ruined[0].isnan().any() and poison.backward(grad, None, *ruined)[1].isnan().any()
        after = call.forward()
        after += call.backward(grad, None, *after)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("growth", [2.0, 6.0, 9.0, 40.0, 900.0])
def test_scores_that_rise_from_block_to_block_keep_the_accuracy_rule(isa: str, growth: float) -> None:
    """By powers of 2 per 128 keys: below those by which a set may let its probabilities exceed 1, and above; in every second row
    they fall."""
    for sinks in (None, torch.tensor([3.0, -9.0])):
        call = make_call([60, 33], [700, 520], right=[0, NONE], heads=(2, 2), dtype=torch.bfloat16, sinks=sinks)
        for start, count in zip(call.starts_k, call.lens_k, strict=True):
            call.k[start : start + count, :, 0] = (torch.arange(count) * (growth / 128))[:, None].bfloat16()
        sign = torch.tensor([1.0, -1.0])[torch.arange(len(call.q)) % 2]
        call.q[:, :, 0] = (sign * math.log(2) / call.softmax_scale)[:, None].bfloat16()
        with _library.cpu_isa(isa):
            check(call)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e5, 3e7])
@pytest.mark.parametrize("rows", [3, 70])
def test_scores_too_large_for_their_own_differences_stay_exact(
    isa: str, dtype: torch.dtype, magnitude: float, rows: int
) -> None:
    """Scores up to 1e15: each row sees its best key alone, forward and backward, also where two of them are the best."""
    keys = 90
    best = torch.randint(keys // 2, (rows,))
    q, k, v = (torch.randn(n, 1, 64).to(dtype) for n in (rows, keys, keys))
    k[: keys // 2, 0] = torch.eye(64)[: keys // 2]
    k[keys // 2 :] = k[: keys // 2]  # every key stands twice
    k = (k * magnitude).requires_grad_()
    q = (torch.eye(64)[best][:, None] * magnitude).to(dtype).requires_grad_()
    v.requires_grad_()
    tables = [torch.tensor([0, n], dtype=torch.int32) for n in (rows, keys)]
    grad = torch.randn(rows, 1, 64)
    with _library.cpu_isa(isa):
        out, lse = gk.switch_attention_varlen(q, k, v, False, *tables, rows, keys, return_lse=True)
        dq, dk, dv = torch.autograd.grad((out.float() * grad).sum(), [q, k, v])
    wanted = (v[best, 0].double() + v[best + keys // 2, 0].double()) / 2
    assert_within_rule(out[:, 0].detach(), wanted.detach(), wanted.detach().to(dtype))
    score = (q.detach()[0, 0].double() @ k.detach()[int(best[0]), 0].double()) / 8
    torch.testing.assert_close(lse[:, 0].double(), (score + math.log(2)).expand(rows), rtol=1e-6, atol=0)
    share = torch.zeros(keys, 64, dtype=torch.float64).index_add(0, best, grad[:, 0].to(dtype).double() / 2)
    share = share + share.roll(keys // 2, 0)
    assert_within_rule(dv[:, 0], share, share.to(dtype))
    # the two best keys share the weight; what moves it from one to the other is the difference of their values
    assert all(bool(x.isfinite().all()) for x in (dq, dk))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("rows", [3, 70])
def test_a_sink_as_large_as_the_largest_scores_takes_its_share(
    isa: str, dtype: torch.dtype, magnitude: float, rows: int
) -> None:
    """One key whose score is the sink's: half of every row's weight is the sink's."""
    q = torch.full((rows, 1, 64), magnitude, dtype=dtype)
    k, v = torch.zeros(90, 1, 64, dtype=dtype), torch.randn(90, 1, 64).to(dtype)
    k[7] = 0.125
    call = Call(q, k, v, [0], [rows], [0], [90], [NONE], [NONE], softmax_scale=0.25)
    call = replace(call, sinks=torch.tensor([64 * 0.125 * 0.25]) * q[0, 0, 0].float())
    grad = torch.randn(rows, 1, 64).to(dtype)
    with _library.cpu_isa(isa):
        out, lse = call.forward()
        _, _, dv, dsinks = call.backward(grad, None, out, lse)
    half, delta = v[7].double() / 2, (grad.double() * v[7].double() / 2).sum(-1)
    assert_within_rule(out, half.expand(rows, 1, 64), half.to(dtype).expand(rows, 1, 64))
    torch.testing.assert_close(lse.double(), (call.sinks + math.log(2)).double().expand(rows, 1), rtol=1e-6, atol=0)
    assert_within_rule(dv[7], grad.double().sum(0) / 2, (grad / 2).sum(0))
    assert_within_rule(dsinks, -delta.sum(0) / 2, -((grad * (v[7] / 2)).sum(-1) / 2).sum(0))
