"""The Triton kernels of pooling: splitting, gaps between samples, fused norm, and compilation for several GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grit_kernels.pooling.problem import PoolingProblem

triton_pooling = pytest.importorskip(
    "grit_kernels.pooling.triton_pooling", reason="the package triton is not installed"
)
from tests.grit_kernels.ahead_of_time import CAPABILITIES, compile_ahead_of_time  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(lens: list[int], gaps: list[int], hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Samples with rows that belong to none before each of them; such rows and those of weight 0 hold NaN."""
    starts, ends, at = [], [], 0
    for length, gap in zip(lens, gaps, strict=True):
        starts.append(at + gap)
        at += gap + length
        ends.append(at)
    weights = torch.randint(0, 3, (at + 1,)).float()
    hidden = torch.randn(at + 1, hidden_size).to(dtype)
    used = torch.zeros(at + 1, dtype=torch.bool)
    for start, end in zip(starts, ends, strict=True):
        used[start:end] = weights[start:end] != 0
    hidden[~used] = float("nan")
    bounds = [torch.tensor(x, dtype=torch.int32) for x in (starts, ends)]
    denominators = torch.tensor([float(weights[s:e].sum()) for s, e in zip(starts, ends, strict=True)])
    return hidden, weights, *bounds, denominators


@pytest.mark.interpret
def test_a_split_sample_and_one_that_is_not_split_agree_and_repeat_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*problem([300, 4, 0, 211], [0, 3, 1, 0], 24, torch.float32), torch.randn(24), 1e-6)
    split = triton_pooling.pool_forward(PoolingProblem(*arguments))
    assert torch.equal(split, triton_pooling.pool_forward(PoolingProblem(*arguments)))
    monkeypatch.setattr(triton_pooling, "processor_count", lambda device: 0)
    torch.testing.assert_close(triton_pooling.pool_forward(PoolingProblem(*arguments)), split, rtol=1e-5, atol=1e-6)


@pytest.mark.interpret
def test_hidden_states_of_any_row_stride_are_read_in_place() -> None:
    hidden, *rest = problem([5, 9], [1, 0], 16, torch.float32)
    wide = torch.full((hidden.shape[0], 40), float("nan"))
    wide[:, 8:24] = hidden
    for norm in (None, torch.randn(16)):
        expected = triton_pooling.pool_forward(PoolingProblem(hidden, *rest, norm, 0.0))
        assert torch.equal(triton_pooling.pool_forward(PoolingProblem(wide[:, 8:24], *rest, norm, 0.0)), expected)
        grad = torch.randn(2, 16)
        for a, b in zip(
            triton_pooling.pool_backward(grad, PoolingProblem(wide[:, 8:24], *rest, norm, 0.0)),
            triton_pooling.pool_backward(grad, PoolingProblem(hidden, *rest, norm, 0.0)),
            strict=True,
        ):
            assert torch.equal(a, b) and bool(a.isfinite().all())


def test_the_fused_norm_refuses_rows_that_no_program_can_hold() -> None:
    with pytest.raises(ValueError, match="norm_weight: expected .*got 40000"):
        triton_pooling._tile(40000, True, 8192)


POINTERS = {"p_weights": "*fp32", "p_row_start": "*i32", "p_row_end": "*i32", "p_denominators": "*fp32"}


@pytest.mark.aot
@pytest.mark.parametrize("capability", [*CAPABILITIES, "gfx942"])
@pytest.mark.parametrize("hidden_size", [4096])
@pytest.mark.parametrize("has_norm", [False, True])
def test_kernels_compile_without_spills(capability: int | str, hidden_size: int, has_norm: bool) -> None:
    pointers = {**POINTERS, "p_hidden": "*bf16", "p_partial": "*fp32"}
    if has_norm:
        pointers["p_norm_weight"] = "*bf16"
    sizes = {"stride": "i32", "hidden_size": "i32", "norm_eps": "fp32"}
    forward = {**pointers, **sizes, "splits": "i32"}
    backward = {**pointers, **sizes, "p_grad_out": "*fp32", "p_grad_hidden": "*bf16"}
    backward |= dict.fromkeys(("rows", "samples", "bisections", "rows_per_program"), "i32")
    for kernel, types, values in (
        (triton_pooling.pool_fwd_kernel, forward, triton_pooling.FORWARD_VALUES),
        (triton_pooling.pool_bwd_kernel, backward, triton_pooling.BACKWARD_VALUES),
    ):
        rows, block, warps = triton_pooling._tile(hidden_size, has_norm, values)
        constants = {"ROWS": rows, "BLOCK_C": block, "HAS_NORM": has_norm} | (
            {} if has_norm else {"p_norm_weight": None}
        )
        compiled = compile_ahead_of_time(kernel, types, constants, capability, warps=warps)
        assert compiled.spilled == 0, (kernel.__name__, compiled.spilled)
        # 16-byte loads of hidden: the reason the kernel can reach the memory's rate
        if has_norm or kernel is triton_pooling.pool_fwd_kernel:
            wide = "global_load_dwordx4" if capability == "gfx942" else "ld.global.v4.b32"
            assert wide in compiled.ptx, kernel.__name__
