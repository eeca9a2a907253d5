"""The Hopper kernels in Gluon on a Hopper GPU: many random calls against the reference, again and again bit by bit."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
from grit_kernels import triton_launch  # noqa: E402
from grit_kernels.attention import hopper, reference, triton_backward, triton_forward, triton_plan  # noqa: E402
from tests.grit_kernels.attention.samples import Call, assert_call_equals_the_reference, draw_call  # noqa: E402

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}


def use_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called within a test, as bench/gpu_tests.py knows another GPU there only."""
    if (found := triton_launch.architecture(torch.device("cuda"))) != "sm90":
        pytest.skip(f"expected a Hopper GPU (sm90), got {found}")
    monkeypatch.setenv(hopper.VARIABLE, "1")
    # few rows over many keys would go to the kernel that splits them
    monkeypatch.setattr(triton_plan, "SHORTEST_SPLIT", 1 << 30)


def drawn(seed: int) -> Call:
    call = draw_call(
        random.Random(seed).choice,
        lengths=(1, 5, 64, 129, 300, 700, 1500),
        dims=(64, 128)[seed // 2 % 2 :][:1],
        dtype=list(TOLERANCE)[seed % 2],
        windows=(-1, -1, 0, 20, 200),
    )
    return replace(call, problem=replace(call.problem, softcap=0.0))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_any_call_equals_the_reference_and_repeats(seed: int, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hopper(monkeypatch)
    call = drawn(seed)
    dtype = call.q.dtype
    scores = torch.randn(call.q.shape[1]).to(dtype) if sinks else None
    truth = reference.attention_forward(*call.clean(torch.float64)[:3], call.problem, sinks=scores)
    on_gpu = call.to("cuda")
    given = (on_gpu.q, on_gpu.k, on_gpu.v, on_gpu.problem)
    scores = None if scores is None else scores.to("cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=hopper.VARIABLE)
        runs = [triton_forward.attention_forward(*given, sinks=scores) for _ in range(10)]
    for ours, expected in zip(runs[0], truth, strict=True):
        finite = expected.isfinite()
        assert torch.equal(ours.isfinite().cpu(), finite)
        error = (ours.cpu().double() - expected)[finite].abs()
        assert bool((error <= TOLERANCE[dtype] * expected[finite].abs().clamp(min=1.0)).all())
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True)), "results repeat bit by bit"


@pytest.mark.parametrize("seed", range(16))
def test_gradients_of_any_call_equal_the_reference_and_repeat(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hopper(monkeypatch)
    call = drawn(seed)
    on_gpu = call.to("cuda")
    given = (on_gpu.q, on_gpu.k, on_gpu.v)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=hopper.VARIABLE)
        out, lse = triton_forward.attention_forward(*given, on_gpu.problem, sinks=on_gpu.sinks)
        runs = [
            triton_backward.attention_backward(
                on_gpu.grad_out, on_gpu.grad_lse, *given, out, lse, on_gpu.problem, on_gpu.sinks
            )
            for _ in range(50)
        ]
    found = [x.cpu() for x in (out, lse, *runs[0])]
    assert_call_equals_the_reference(call, found, TOLERANCE[call.q.dtype])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True)), "results repeat bit by bit"
