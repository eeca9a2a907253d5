"""The three public attention functions on every backend, against a float64 oracle and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from tests.conftest import Backend, assert_within_rule
from tests.grit_kernels.attention.oracle import Case, attention, gradients, make_case, padded


def window_tensor(case: Case, device: str) -> Tensor:
    return torch.tensor(case.window, dtype=torch.int32, device=device)


def run_varlen(case: Case, backend: Backend, grads: list[Tensor] | None = None) -> tuple[Any, ...]:
    """The case as a pack -> out and lse per sample, and gradients per tensor and sample."""
    q, k, v = (torch.cat(x).to(backend.device).requires_grad_() for x in (case.q, case.k, case.v))
    lens_q, lens_k = [x.shape[0] for x in case.q], [x.shape[0] for x in case.k]
    tables = [torch.tensor([0, *lens]).cumsum(0).int().to(backend.device) for lens in (lens_q, lens_k)]
    hi = None if case.hi is None else torch.tensor(sum(case.hi, []), dtype=torch.int32, device=backend.device)
    causal = torch.tensor(case.causal, device=backend.device)
    sinks = None if case.sinks is None else case.sinks.to(backend.device).requires_grad_()
    with backend():
        out, lse = gk.switch_attention_varlen(
            q,
            k,
            v,
            causal,
            *tables,
            max(lens_q),
            max(lens_k),
            window_size=window_tensor(case, backend.device),
            hi=hi,
            softmax_scale=case.softmax_scale,
            softcap=case.softcap,
            sinks=sinks,
            return_lse=True,
        )
        if grads is None:
            return out.detach().cpu().split(lens_q), lse.detach().cpu().split(lens_q)
        (out.float() * torch.cat(grads).to(backend.device)).sum().backward()
    split = [x.grad.cpu().split(lens) for x, lens in ((q, lens_q), (k, lens_k), (v, lens_k)) if x.grad is not None]
    if sinks is not None and sinks.grad is not None:
        split.append(sinks.grad.cpu())
    return out.detach().cpu().split(lens_q), lse.detach().cpu().split(lens_q), split


def run_padded(case: Case, backend: Backend, extra: int = 0, poison: float = float("nan")) -> tuple[Any, ...]:
    """The case as a right-padded batch whose padding holds ``poison``; gradients of a sum over everything."""
    lens_q, lens_k = [x.shape[0] for x in case.q], [x.shape[0] for x in case.k]
    q = padded(case.q, max(lens_q) + extra, poison).to(backend.device).requires_grad_()
    k, v = (padded(x, max(lens_k) + extra, poison).to(backend.device).requires_grad_() for x in (case.k, case.v))
    sinks = None if case.sinks is None else case.sinks.to(backend.device).requires_grad_()
    with backend():
        out, lse = gk.switch_attention(
            q,
            k,
            v,
            torch.tensor(case.causal, device=backend.device),
            window_size=window_tensor(case, backend.device),
            seqlens_q=torch.tensor(lens_q, dtype=torch.int32, device=backend.device),
            seqlens_k=torch.tensor(lens_k, dtype=torch.int32, device=backend.device),
            softmax_scale=case.softmax_scale,
            softcap=case.softcap,
            sinks=sinks,
            return_lse=True,
        )
        out.float().sum().backward()
    leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
    return out.detach().cpu(), lse.detach().cpu(), [x.grad.cpu() for x in leaves if x.grad is not None]


def check_against_oracle(case: Case, backend: Backend, dtype: torch.dtype) -> None:
    grads = [torch.randn(q.shape) for q in case.q]
    outs, lses, by_tensor = run_varlen(case, backend, grads)
    truth, truth_lse = attention(case)
    eager, eager_lse = attention(case, dtype)
    assert_within_rule(torch.cat(outs), torch.cat(truth), torch.cat(eager), "out")
    live = torch.cat(truth_lse).isfinite()
    assert torch.equal(torch.cat(lses).isfinite(), live)
    assert bool((torch.cat(outs)[~live] == 0).all())
    assert_within_rule(torch.cat(lses)[live], torch.cat(truth_lse)[live], torch.cat(eager_lse)[live], "lse")
    expected, dsinks = gradients(case, grads)
    rough, rough_dsinks = gradients(case, grads, dtype)
    parts = zip(*expected, strict=True), zip(*rough, strict=True)
    for name, found, a, b in zip("qkv", by_tensor[:3], *parts, strict=True):
        assert_within_rule(torch.cat(found), torch.cat(a), torch.cat(b), f"d{name}")
    if dsinks is not None:
        assert rough_dsinks is not None
        assert_within_rule(by_tensor[3], dsinks, rough_dsinks, "dsinks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 80, 256, 512])
def test_head_dims_and_dtypes_keep_the_accuracy_rule(backend: Backend, dtype: torch.dtype, dim: int) -> None:
    case = make_case([19, 7], [19, 9], [True, False], dim=dim, dtype=dtype)
    check_against_oracle(case, backend, dtype)


def test_upper_bounds_replace_the_right_bound_only(backend: Backend) -> None:
    hi = [[3, 3, 3, 4, 9, 9, 9, 9, 9], [0, 0, 2, 4, 4]]
    check_against_oracle(make_case([9, 5], [9, 5], [True, False], hi=hi), backend, torch.float32)
    windowed = make_case([9, 5], [9, 5], [False, False], hi=hi, window=[(2, 0), (1, -1)])
    check_against_oracle(windowed, backend, torch.float32)


def test_prefix_lm_built_from_hi_sees_the_prefix_from_both_sides(backend: Backend) -> None:
    case = make_case([6, 4], [6, 4], [True, True])
    cu = torch.tensor([0, 6, 10], dtype=torch.int32)
    hi = gk.prefix_lm_hi(cu, torch.tensor([4, 2]), 10)
    case.hi = [part.tolist() for part in hi.split([6, 4])]
    assert case.hi[0] == [4, 4, 4, 4, 5, 6]
    check_against_oracle(case, backend, torch.float32)


def test_all_true_flags_equal_causal_true_bitwise(backend: Backend) -> None:
    q, k, v = (torch.randn(2, 9, 2, 32, device=backend.device) for _ in range(3))
    for flag in (True, False):
        with backend():
            a = gk.switch_attention(q, k, v, torch.full((2,), flag, device=backend.device))
            b = gk.switch_attention(q, k, v, flag)
        assert torch.equal(a, b)


def test_two_launches_on_a_split_batch_equal_one_launch(backend: Backend) -> None:
    case = make_case([9, 17, 5], [9, 17, 5], [True, False, True])
    whole, _ = run_varlen(case, backend)
    for b in range(3):
        alone = Case(case.q[b : b + 1], case.k[b : b + 1], case.v[b : b + 1], case.causal[b : b + 1], [(-1, -1)])
        assert torch.equal(run_varlen(alone, backend)[0][0], whole[b])


def test_permuting_samples_permutes_outputs(backend: Backend) -> None:
    case = make_case([9, 17, 5], [9, 17, 5], [True, False, True])
    whole, _ = run_varlen(case, backend)
    order = [2, 0, 1]
    shuffled = Case(
        [case.q[b] for b in order],
        [case.k[b] for b in order],
        [case.v[b] for b in order],
        [case.causal[b] for b in order],
        case.window,
    )
    for out, b in zip(run_varlen(shuffled, backend)[0], order, strict=True):
        assert torch.equal(out, whole[b])


@pytest.mark.parametrize("window", [(17, 17), (2**31 - 1, 2**31 - 1), (-1, -1)])
def test_a_window_of_the_sample_length_equals_no_window(backend: Backend, window: tuple[int, int]) -> None:
    q, k, v = (torch.randn(2, 17, 2, 32, device=backend.device) for _ in range(3))
    causal = torch.tensor([True, False], device=backend.device)
    with backend():
        assert torch.equal(
            gk.switch_attention(q, k, v, causal, window_size=window), gk.switch_attention(q, k, v, causal)
        )


def test_flags_of_one_sample_do_not_touch_the_others(backend: Backend) -> None:
    case = make_case([9, 6], [9, 6], [True, False])
    before, _ = run_varlen(case, backend)
    case.causal[0] = False
    after, _ = run_varlen(case, backend)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])


def test_an_upper_bound_of_the_lengths_changes_nothing(backend: Backend) -> None:
    q, k, v = (torch.randn(12, 2, 32, device=backend.device) for _ in range(3))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32, device=backend.device)
    with backend():
        a = gk.switch_attention_varlen(q, k, v, False, cu, cu, 7, 7)
        b = gk.switch_attention_varlen(q, k, v, False, cu, cu, 40, 33)
    torch.testing.assert_close(a, b)


def test_lengths_of_any_stride_are_accepted(backend: Backend) -> None:
    q, k, v = (torch.randn(2, 9, 2, 32, device=backend.device) for _ in range(3))
    lengths = torch.tensor([[9, 4], [5, 7]], dtype=torch.int32, device=backend.device)
    plain = {"seqlens_q": lengths[:, 0].contiguous(), "seqlens_k": lengths[:, 1].contiguous()}
    with backend():
        found = gk.switch_attention(q, k, v, False, seqlens_q=lengths[:, 0], seqlens_k=lengths[:, 1])
        assert torch.equal(found, gk.switch_attention(q, k, v, False, **plain))


def test_strided_views_of_a_fused_projection_equal_contiguous_tensors(backend: Backend) -> None:
    fused = torch.randn(2, 9, 6, 32, device=backend.device)
    q, k, v = fused[:, :, :2], fused[:, :, 2:4], fused[:, :, 4:]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    with backend():
        plain = gk.switch_attention(*(x.contiguous() for x in (q, k, v)), True)
        assert torch.equal(gk.switch_attention(q, k, v, True), plain)
        assert torch.equal(gk.switch_attention(*heads_first, True), plain)


def test_lse_is_differentiable(backend: Backend) -> None:
    case = make_case([5, 4], [5, 6], [True, False])
    q, k, v = (torch.cat(x).to(backend.device).requires_grad_() for x in (case.q, case.k, case.v))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=backend.device) for x in ([0, 5, 9], [0, 5, 11]))
    causal = torch.tensor(case.causal, device=backend.device)
    with backend():
        _, lse = gk.switch_attention_varlen(q, k, v, causal, cu_q, cu_k, 5, 6, return_lse=True)
        found = torch.autograd.grad(lse.sum(), (q, k), allow_unused=True)
    leaves = [[x.double().requires_grad_() for x in group] for group in (case.q, case.k, case.v)]
    total = sum(x.sum() for x in attention(Case(*leaves, case.causal, case.window))[1])
    assert isinstance(total, Tensor)
    for x, group in zip(found, leaves[:2], strict=True):
        expected = torch.cat(torch.autograd.grad(total, group, retain_graph=True)).float()
        torch.testing.assert_close(x.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [0.0, float("nan")])
def test_no_gradient_comes_from_the_lse_of_rows_without_keys(backend: Backend, loss: float) -> None:
    """Rows that stand before the first key, and rows of padding."""
    q = torch.randn(2, 6, 4, 32, device=backend.device, requires_grad=True)
    k, v = (torch.randn(2, 4, 2, 32, device=backend.device, requires_grad=True) for _ in range(2))
    seqlens = torch.tensor([6, 3], dtype=torch.int32, device=backend.device)
    with backend():
        _, lse = gk.switch_attention(q, k, v, True, seqlens_q=seqlens, return_lse=True)
        dead = lse == float("-inf")
        grads = torch.autograd.grad(lse, (q, k), torch.where(dead, loss, 1.0))
    assert dead[0].any(dim=-1).tolist() == [True] * 2 + [False] * 4
    assert dead[1].any(dim=-1).tolist() == [False] * 3 + [True] * 3
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[0][dead].any() and bool(grads[0][~dead].any()) and bool(grads[1].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_rows_without_keys_and_their_gradients_may_hold_anything(
    backend: Backend, dtype: torch.dtype, softcap: float
) -> None:
    """Rows before the first key, below upper bounds of 0, and behind a window whose upper bound stays."""
    causal = torch.tensor([True, True, False], device=backend.device)
    hi = [*[0, 0, 1, 2, 3, 4], *[0, 0, 0, 4, 4, 4], *[2] * 20]
    lens_q, lens_k = torch.tensor([0, 6, 6, 20]), torch.tensor([0, 4, 6, 20])
    tables = [lens.cumsum(0).int().to(backend.device) for lens in (lens_q, lens_k)]
    windows = torch.tensor([[-1, 0], [-1, 0], [3, -1]], dtype=torch.int32, device=backend.device)
    bounds = torch.tensor(hi, dtype=torch.int32, device=backend.device)
    q, grad = (torch.randn(32, 4, 32, device=backend.device).to(dtype) for _ in range(2))
    k, v = (torch.randn(30, 2, 32, device=backend.device).to(dtype).requires_grad_() for _ in range(2))
    dead = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, *[0] * 5, *[1] * 15], device=backend.device).bool()
    found = []
    for poison in (0.0, float("nan")):
        rows, grad_out = (x.masked_fill(dead[:, None, None], poison) for x in (q, grad))
        rows.requires_grad_()
        grad_lse = torch.ones(32, 4, device=backend.device).masked_fill(dead[:, None], poison)
        with backend():
            out, lse = gk.switch_attention_varlen(
                *(rows, k, v, causal, *tables, 20, 20),
                window_size=windows,
                hi=bounds,
                softcap=softcap,
                return_lse=True,
            )
            found.append([out, *torch.autograd.grad((out, lse), (rows, k, v), (grad_out, grad_lse))])
        assert torch.equal((lse == float("-inf")).all(dim=1), dead)
    for clean, poisoned in zip(*found, strict=True):
        assert bool(clean.isfinite().all()) and bool(clean.any()) and torch.equal(clean, poisoned)
    assert not found[0][0][dead].any() and not found[0][1][dead].any()


def test_a_second_derivative_is_refused_or_right(backend: Backend) -> None:
    q, k, v = (torch.randn(1, 4, 1, 32, device=backend.device, requires_grad=True) for _ in range(3))
    with backend():
        out = gk.switch_attention(q, k, v, True)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        if backend.is_op:
            with pytest.raises(RuntimeError, match="no second derivative.*reference"):
                torch.autograd.grad(dq.sum(), q)
        else:
            assert bool(torch.autograd.grad(dq.sum(), q)[0].isfinite().all())


def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients(backend: Backend) -> None:
    q = torch.randn(1, 9, 2, 32, device=backend.device, requires_grad=True)
    with torch.autocast(backend.device, dtype=torch.bfloat16), backend():
        out = gk.switch_attention(q, q, q, False)
        mixed = gk.switch_attention(q, q.bfloat16(), q, False)
    assert out.dtype == mixed.dtype == torch.bfloat16
    with backend():
        expected = gk.switch_attention(q.bfloat16(), q.bfloat16(), q.bfloat16(), False)
    assert torch.equal(out, expected) and torch.equal(mixed, expected)
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_opcheck_accepts_both_ops(backend: Backend) -> None:
    if not backend.is_op:
        return
    q, k, v = (torch.randn(6, 2, 32, device=backend.device, requires_grad=True) for _ in range(3))
    numbers = [[0, 4], [4, 2], [0, 4], [4, 2], [9, 1], [0, 1]]
    bounds = [torch.tensor(x, dtype=torch.int32, device=backend.device) for x in numbers]
    hi = torch.tensor([1, 4, 4, 4, 1, 2], dtype=torch.int32, device=backend.device)
    ops = torch.ops.grit_kernels
    sinks = torch.randn(2, device=backend.device)
    for upper_bounds, of_heads in ((None, None), (hi, sinks), (hi, sinks.bfloat16())):
        arguments = (*bounds, upper_bounds, 0, 0, 4, 4, 0.2, 0.0)
        trained = None if of_heads is None else of_heads.clone().requires_grad_()
        torch.library.opcheck(ops.attention_forward.default, (q, k, v, *arguments, trained, None, True))
        out, lse = (x.detach() for x in ops.attention_forward(q, k, v, *arguments, of_heads, None, True))
        plain = [x.detach() for x in (q, k, v)]
        given = (torch.randn_like(out), None, *plain, out, lse, *arguments, of_heads, None, True)
        torch.library.opcheck(ops.attention_backward.default, given)


def test_compile_captures_the_whole_call_and_its_gradients(backend: Backend) -> None:
    cu = torch.tensor([0, 4, 6], dtype=torch.int32, device=backend.device)
    causal = torch.tensor([True, False], device=backend.device)

    def step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        options = {"window_size": (2, 2), "sinks": sinks}
        return gk.switch_attention_varlen(q, k, v, causal, cu, cu, 4, 4, **options).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    shapes = [(6, 2, 32)] * 3 + [(2,)]
    tensors = [torch.randn(shape, device=backend.device, requires_grad=True) for shape in shapes]
    with backend():
        if not backend.is_op:  # the reference reads lengths on the host by design: it is not traced
            return
        found = torch.autograd.grad(compiled(*tensors), tensors)
        expected = torch.autograd.grad(step(*tensors), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- with a cache


def cache_of(case: Case, slots: int, first: int = 0) -> tuple[Tensor, Tensor]:
    return padded(case.k, slots, first=first), padded(case.v, slots, first=first)


@pytest.mark.parametrize("first", [0, 2])
def test_queries_after_a_cache_equal_the_oracle_and_never_read_empty_slots(backend: Backend, first: int) -> None:
    case = make_case([3, 3, 3], [9, 3, 5], [True, False, True], window=[(-1, -1), (2, 2), (3, 0)])
    k_cache, v_cache = (x.to(backend.device) for x in cache_of(case, 12, first))
    used = torch.tensor([9, 3, 5], dtype=torch.int32, device=backend.device) + first
    with backend():
        out = gk.switch_attention_with_kvcache(
            torch.stack(case.q).to(backend.device),
            k_cache,
            v_cache,
            used,
            torch.tensor(case.causal, device=backend.device),
            cache_leftpad=torch.full_like(used, first),
            window_size=window_tensor(case, backend.device),
        )
    truth, eager = attention(case)[0], attention(case, torch.float32)[0]
    assert_within_rule(out.cpu(), torch.stack(truth), torch.stack(eager))


def test_decoding_token_by_token_equals_the_prefill_rows(backend: Backend) -> None:
    q, k, v = (torch.randn(2, 7, 2, 32, device=backend.device) for _ in range(3))
    caches = [torch.full((2, 8, 2, 32), float("nan"), device=backend.device) for _ in range(2)]
    with backend():
        whole = gk.switch_attention(q, k, v, True)
        for t in range(7):
            used = torch.full((2,), t, dtype=torch.int32, device=backend.device)
            row = slice(t, t + 1)
            out = gk.switch_attention_with_kvcache(q[:, row], *caches, used, k=k[:, row], v=v[:, row])
            torch.testing.assert_close(out, whole[:, row])
    assert torch.equal(caches[0][:, :7], k) and bool(caches[0][:, 7:].isnan().all())


def test_new_states_are_written_behind_each_samples_own_length(backend: Backend) -> None:
    new = torch.randn(2, 3, 1, 32, device=backend.device)
    k_cache, v_cache = (torch.full((2, 6, 1, 32), 7.0, device=backend.device) for _ in range(2))
    used = torch.tensor([1, 3], dtype=torch.int32, device=backend.device)
    rows = torch.tensor([2, 3], dtype=torch.int32, device=backend.device)
    with backend():
        out = gk.switch_attention_with_kvcache(new, k_cache, v_cache, used, k=new, v=-new, seqlens_q=rows)
    assert torch.equal(k_cache[0, 1:3], new[0, :2]) and torch.equal(k_cache[1, 3:], new[1])
    assert torch.equal(v_cache[1, 3:], -new[1])
    assert bool((k_cache[0, 3:] == 7).all()) and bool((k_cache[1, :3] == 7).all())
    assert bool((out[0, 2] == 0).all())


def test_a_full_cache_holds_the_new_states_whatever_rows_of_padding_come_with_them(backend: Backend) -> None:
    new = torch.randn(3, 4, 2, 32, device=backend.device, requires_grad=True)
    with torch.no_grad():
        new[0, 2:], new[1] = float("nan"), float("nan")
    k_cache, v_cache = (torch.full((3, 6, 2, 32), 7.0, device=backend.device) for _ in range(2))
    used, rows = (torch.tensor(x, dtype=torch.int32, device=backend.device) for x in ([4, 6, 1], [2, 0, 4]))
    with backend():
        gk.switch_attention_with_kvcache(new, k_cache, v_cache, used, k=new, v=-new, seqlens_q=rows)
    for b, (first, count) in enumerate(((4, 2), (6, 0), (1, 4))):
        kept = torch.ones(6, dtype=torch.bool, device=backend.device)
        kept[first : first + count] = False
        assert torch.equal(k_cache[b, ~kept], new[b, :count]) and torch.equal(v_cache[b, ~kept], -new[b, :count])
        assert bool((k_cache[b, kept] == 7).all()) and bool((v_cache[b, kept] == 7).all())
    assert not k_cache.requires_grad, "the cache keeps no graph of all steps"


def test_a_cache_stored_with_heads_first_is_read_in_place(backend: Backend) -> None:
    q = torch.randn(3, 2, 4, 32, device=backend.device)
    k_cache, v_cache = (torch.randn(3, 40, 2, 32, device=backend.device) for _ in range(2))
    used = torch.tensor([40, 2, 33], dtype=torch.int32, device=backend.device)
    leftpad = torch.tensor([3, 0, 0], dtype=torch.int32, device=backend.device)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache)]
    keys, values, _ = gk.attention.key_rows(q, *heads_first)
    assert keys.data_ptr() == heads_first[0].data_ptr() and values.data_ptr() == heads_first[1].data_ptr()
    with backend():
        plain = gk.switch_attention_with_kvcache(q, k_cache, v_cache, used, cache_leftpad=leftpad)
        assert torch.equal(gk.switch_attention_with_kvcache(q, *heads_first, used, cache_leftpad=leftpad), plain)


def strided(x: Tensor, every: int = 2) -> Tensor:
    """``x`` with that stride in its last dimension, NaN between the elements."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] * every), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., ::every] = x
    return wide[..., ::every]


def test_new_states_reach_a_cache_whose_last_dimension_is_strided(backend: Backend) -> None:
    """The kernels read a copy of such a cache; what is written must be in the caller's own."""
    q, k, v = (torch.randn(2, 3, heads, 32, device=backend.device) for heads in (4, 2, 2))
    caches = [torch.randn(2, 9, 2, 32, device=backend.device) for _ in range(2)]
    used = torch.tensor([4, 6], device=backend.device)
    held = [strided(x) for x in caches]
    with backend():
        wanted = gk.switch_attention_with_kvcache(q, *caches, used, k=k, v=v)
        found = gk.switch_attention_with_kvcache(q, *held, used, k=k, v=v)
    assert torch.equal(found, wanted)
    for mine, plain in zip(held, caches, strict=True):
        assert torch.equal(mine, plain)
    assert torch.equal(held[0][1, 6:9], k[1])


def test_a_cache_whose_elements_share_memory_takes_no_new_states() -> None:
    q, k, v = (torch.randn(2, 1, 2, 32) for _ in range(3))
    whole, shared = torch.zeros(2, 4, 2, 32), torch.zeros(1, 4, 2, 32).expand(2, -1, -1, -1)
    used = torch.tensor([1, 2])
    for name, caches in (("k_cache", (shared, whole)), ("v_cache", (whole, shared)), ("v_cache", (whole, whole))):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, to write new states"):
            gk.switch_attention_with_kvcache(q, *caches, used, k=k, v=v)
        gk.switch_attention_with_kvcache(q, *caches, used)
    assert not whole.any() and not shared.any()


@pytest.mark.parametrize("grad", [False, True])
def test_a_batch_without_any_key_gives_zeros(backend: Backend, grad: bool) -> None:
    q = torch.randn(3, 2, 4, 32, device=backend.device, requires_grad=grad)
    k, v = (torch.randn(3, 0, 2, 32, device=backend.device, requires_grad=grad) for _ in range(2))
    with backend():
        out, lse = gk.switch_attention(q, k, v, False, return_lse=True)
    assert not out.any() and bool((lse == float("-inf")).all())
    if grad:
        out.sum().backward()
        assert q.grad is not None and not q.grad.any()
