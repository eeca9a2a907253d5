"""gk.pool against its formulas, spelled out per sample in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from grit_kernels.pooling import METHODS, reference
from grit_kernels.pooling.problem import PoolingProblem
from tests.conftest import Backend


def oracle(
    samples: list[Tensor],
    skips: list[int],
    method: str,
    *,
    normalize: bool = False,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """One row per sample of real tokens (length, hidden), in ``dtype``."""
    rows = []
    for sample, skip in zip(samples, skips, strict=True):
        x = sample.to(dtype)
        if norm_weight is not None:
            x = x / (x.pow(2).mean(1, keepdim=True) + norm_eps).sqrt() * norm_weight.to(dtype)
        rest = x[skip:]
        if method == "cls":
            row = x[0] if len(x) else torch.zeros(x.shape[1], dtype=dtype)
        elif not len(rest):
            row = torch.zeros(x.shape[1], dtype=dtype)
        elif method == "lasttoken":
            row = rest[-1]
        elif method == "mean":
            row = rest.sum(0) / len(rest)
        else:
            r = torch.arange(1, len(rest) + 1, dtype=dtype)
            row = (r[:, None] * rest).sum(0) / r.sum()
        rows.append(row)
    out = torch.stack(rows)
    return out / out.norm(dim=1, keepdim=True).clamp(min=1e-12) if normalize else out


def place(samples: list[Tensor], keep: list[list[bool]], poison: float) -> tuple[Tensor, Tensor]:
    """Samples in a padded batch at the places ``keep`` marks; padding holds ``poison``."""
    mask = torch.tensor(keep)
    hidden = torch.full((*mask.shape, samples[0].shape[1]), poison, dtype=samples[0].dtype)
    for b, sample in enumerate(samples):
        hidden[b, mask[b]] = sample
    return hidden, mask.to(torch.int64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused_norm", [False, True])
def test_gradients_equal_those_of_the_formula_and_padding_has_none(
    backend: Backend, method: str, fused_norm: bool
) -> None:
    keep = [[True, True, True, False], [False, True, True, True], [True, False, True, True]]
    samples = [torch.randn(3, 16, requires_grad=True) for _ in keep]
    weight = torch.randn(16, requires_grad=True) if fused_norm else None
    grad = torch.randn(3, 16)
    truth = oracle(samples, [1, 0, 2], method, norm_weight=weight, normalize=True)
    leaves = samples + ([weight] if weight is not None else [])
    expected = torch.autograd.grad((truth * grad).sum(), leaves, allow_unused=True)
    with torch.no_grad():
        hidden, mask = place(samples, keep, float("nan"))
    hidden = hidden.to(backend.device).requires_grad_()
    moved = None if weight is None else weight.detach().to(backend.device).requires_grad_()
    with backend():
        out = gk.pool(
            hidden,
            attention_mask=mask.to(backend.device),
            instruction_lens=torch.tensor([1, 0, 2], device=backend.device),
            method=method,  # type: ignore[arg-type]
            norm_weight=moved,
            normalize=True,
        )
        found = torch.autograd.grad((out * grad.to(backend.device)).sum(), [hidden] + ([moved] if fused_norm else []))
    real = mask.bool()
    for b in range(3):
        torch.testing.assert_close(found[0].cpu()[b, real[b]], expected[b], rtol=1e-4, atol=1e-5)
    assert bool((found[0].cpu()[~real] == 0).all())
    if fused_norm:
        torch.testing.assert_close(found[1].cpu(), expected[3], rtol=1e-4, atol=1e-5)


def test_fusing_the_norm_equals_norming_first(backend: Backend) -> None:
    hidden, weight = torch.randn(2, 5, 32, device=backend.device), torch.randn(32, device=backend.device)
    normed = torch.nn.functional.rms_norm(hidden, (32,), weight, 1e-5)
    with backend():
        torch.testing.assert_close(gk.pool(hidden, norm_weight=weight, norm_eps=1e-5), gk.pool(normed))


def test_a_norm_weight_and_hidden_states_of_any_stride_are_accepted(backend: Backend) -> None:
    wide = torch.randn(7, 48, device=backend.device)
    hidden, weight = wide[:, 8:24], torch.randn(16, 2, device=backend.device)[:, 0]
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=backend.device)
    with backend():
        expected = gk.pool(hidden.contiguous(), cu_seqlens=cu, norm_weight=weight.contiguous())
        assert torch.equal(gk.pool(hidden, cu_seqlens=cu, norm_weight=weight), expected)
        columns = hidden.T.contiguous().T
        assert torch.equal(gk.pool(columns, cu_seqlens=cu, norm_weight=weight), expected)
        assert torch.equal(
            gk.pool(columns[None], norm_weight=weight), gk.pool(hidden[None].contiguous(), norm_weight=weight)
        )


def test_permuting_samples_permutes_vectors_and_normalised_ones_have_length_one(backend: Backend) -> None:
    hidden = torch.randn(4, 6, 32, device=backend.device)
    mask = (torch.arange(6)[None] < torch.tensor([[6], [1], [3], [5]])).to(backend.device)
    order = torch.tensor([2, 0, 3, 1], device=backend.device)
    with backend():
        out = gk.pool(hidden, attention_mask=mask, normalize=True)
        assert torch.equal(gk.pool(hidden[order], attention_mask=mask[order], normalize=True), out[order])
    torch.testing.assert_close(out.norm(dim=1).cpu(), torch.ones(4))


def test_float64_runs_on_the_reference_and_passes_gradcheck_in_closed_form() -> None:
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0, 1, 2, 0, 1, 1, 3], dtype=torch.float64)
    bounds = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 4], [3, 3, 7])]
    denominators = torch.tensor([3.0, 0.0, 5.0])
    for norm in (None, weight):
        arguments = (hidden, weights, *bounds, denominators, norm, 1e-6)
        leaves = [hidden] if norm is None else [hidden, weight]

        def run(*leaf: Tensor) -> Tensor:
            given = PoolingProblem(leaf[0], weights, *bounds, denominators, *(leaf[1:] or (None,)), 1e-6)
            return reference.pool_forward(given)

        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)
        out = reference.pool_forward(PoolingProblem(*arguments))
        grad = torch.randn_like(out)
        expected = torch.autograd.grad(out, leaves, grad)
        found = reference.pool_backward(grad, PoolingProblem(*arguments))
        for a, b in zip(found, expected, strict=False):
            torch.testing.assert_close(a.detach(), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_of_the_documentation(dtype: torch.dtype) -> None:
    bounds = [torch.tensor([x], dtype=torch.int32) for x in (0, 3)]
    problem = PoolingProblem(torch.randn(3, 4).to(dtype), torch.ones(3), *bounds, torch.ones(1), torch.ones(4), 1e-6)
    grad_hidden, grad_norm_weight = reference.pool_backward(torch.randn(1, 4), problem)
    assert grad_hidden.dtype == dtype and grad_norm_weight.dtype == torch.float32


def test_opcheck_accepts_both_ops_and_a_second_derivative_is_refused(backend: Backend) -> None:
    if not backend.is_op:
        return
    hidden = torch.randn(6, 16, device=backend.device, requires_grad=True)
    weights = torch.tensor([1.0, 1, 0, 1, 1, 1], device=backend.device)
    bounds = [torch.tensor(x, dtype=torch.int32, device=backend.device) for x in ([0, 3], [3, 6])]
    denominators = torch.tensor([2.0, 3.0], device=backend.device)
    norm = torch.randn(16, device=backend.device, requires_grad=True)
    ops = torch.ops.grit_kernels
    for norm_weight in (None, norm):
        arguments = (weights, *bounds, denominators, norm_weight, 1e-6)
        torch.library.opcheck(ops.pool_forward.default, (hidden, *arguments))
        detached = (weights, *bounds, denominators, None if norm_weight is None else norm.detach(), 1e-6)
        grad = torch.randn(2, 16, device=backend.device)
        torch.library.opcheck(ops.pool_backward.default, (grad, hidden.detach(), *detached))
    with backend():
        out = gk.pool(hidden.view(2, 3, 16)).square().sum()
        (first,) = torch.autograd.grad(out, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative.*reference"):
            first.sum().backward()


def test_compile_captures_pooling_whole(backend: Backend) -> None:
    if not backend.is_op:
        return
    cu = torch.tensor([0, 2, 6], dtype=torch.int32, device=backend.device)
    hidden = torch.randn(6, 16, device=backend.device, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return gk.pool(x, cu_seqlens=cu, method="weightedmean", normalize=True).square().sum()

    with backend():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(hidden), hidden)[0], torch.autograd.grad(run(hidden), hidden)[0]
        )


def test_a_sample_with_nothing_to_pool_is_an_error_unless_zeros_are_asked_for() -> None:
    hidden, mask = torch.randn(3, 2, 8), torch.tensor([[1, 1], [0, 0], [1, 0]])
    with gk.backend("reference"):
        with pytest.raises(ValueError, match=r"instruction_lens: samples \[1\] have no token left"):
            gk.pool(hidden, attention_mask=mask)
        with pytest.raises(ValueError, match=r"instruction_lens: samples \[2\] have no token left"):
            gk.pool(
                hidden, attention_mask=mask.index_fill(0, torch.tensor(1), 1), instruction_lens=torch.tensor([1, 0, 1])
            )
        out = gk.pool(hidden, attention_mask=mask, empty="zeros")
    assert bool((out[1] == 0).all()) and bool((out[0] != 0).any())


H = torch.zeros(2, 3, 8)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "integer hidden": (TypeError, "hidden_states: expected .*got torch.int64", lambda: gk.pool(H.long())),
    "hidden no tensor": (TypeError, "hidden_states: expected .*got list", lambda: gk.pool([1.0])),  # type: ignore[arg-type]
    "pack without table": (ValueError, "hidden_states: expected .*got shape", lambda: gk.pool(H[0])),
    "empty batch": (ValueError, "hidden_states: expected .*got shape", lambda: gk.pool(H[:0])),
    "table with padded": (ValueError, "hidden_states: expected .*got shape", lambda: gk.pool(H, cu_seqlens=CU)),
    "mask with pack": (ValueError, "attention_mask: ", lambda: gk.pool(H.view(6, 8), cu_seqlens=CU, attention_mask=CU)),
    "table too short": (ValueError, "cu_seqlens: expected", lambda: gk.pool(H.view(6, 8)[:5], cu_seqlens=CU)),
    "float table": (ValueError, "cu_seqlens: .*got torch.float", lambda: gk.pool(H.view(6, 8), cu_seqlens=CU.float())),
    "mask of numbers": (
        ValueError,
        r"attention_mask: expected 0 at padding and 1 at real tokens, got torch.int64 \(2, 3\) with other values",
        lambda: gk.pool(H, attention_mask=torch.tensor([[1, 1, 2], [1, 1, 0]])),
    ),
    "mask to be added": (
        ValueError,
        "attention_mask: expected 0 at padding",
        lambda: gk.pool(H, attention_mask=torch.tensor([[0.0, -1e9, -1e9], [0.0, 0.0, -1e9]])),
    ),
    "mask shape": (ValueError, "attention_mask: expected", lambda: gk.pool(H, attention_mask=torch.ones(2, 4))),
    "unknown method": (ValueError, "method: .*'mean'.*'max'", lambda: gk.pool(H, method="max")),  # type: ignore[arg-type]
    "unknown empty": (ValueError, "empty: expected .*got 'skip'", lambda: gk.pool(H, empty="skip")),  # type: ignore[arg-type]
    "instruction shape": (ValueError, "instruction_lens: expected", lambda: gk.pool(H, instruction_lens=torch.tensor([1]))),
    "negative instruction": (ValueError, "instruction_lens: exp", lambda: gk.pool(H, instruction_lens=torch.tensor([1, -1]))),
    "float instruction": (ValueError, "instruction_lens: .*got torch.float", lambda: gk.pool(H, instruction_lens=torch.ones(2))),
    "norm weight shape": (ValueError, "norm_weight: expected", lambda: gk.pool(H, norm_weight=torch.ones(7))),
    "NaN epsilon": (ValueError, "norm_eps: expected .*got nan", lambda: gk.pool(H, norm_eps=float("nan"))),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_by_name(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()
