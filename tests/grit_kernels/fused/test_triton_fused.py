"""The Triton kernels of the fused ops: rows split among programs, and compilation for several GPUs."""

from __future__ import annotations

import pytest
import torch

from grit_kernels.fused import reference
from tests.conftest import assert_within_rule

triton_fused = pytest.importorskip("grit_kernels.fused.triton_fused", reason="the package triton is not installed")
from tests.grit_kernels.ahead_of_time import CAPABILITIES, compile_ahead_of_time  # noqa: E402


@pytest.mark.interpret
def test_a_weight_gradient_over_many_programs_keeps_the_rule_and_repeats_bit_by_bit() -> None:
    x, grad = torch.randn(2, 301, 24).bfloat16()
    weight = torch.randn(24).bfloat16()
    truth = reference.rms_norm_backward(grad.double(), None, x.double(), weight.double(), 1e-6, 0.0, True)
    first, again = (triton_fused.rms_norm_backward(grad, None, x, weight, 1e-6, 0.0, True) for _ in range(2))
    for name, a, b, t in zip(("x", "weight"), first, again, truth, strict=True):
        assert torch.equal(a, b)
        assert_within_rule(a, t, t.to(torch.bfloat16), name)


@pytest.mark.interpret
def test_an_epsilon_of_0_leaves_rows_beyond_the_end_alone() -> None:
    x = torch.randn(3, 8)
    grads = triton_fused.rms_norm_backward(x, x, x, torch.ones(8), 0.0, 0.0, True)
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_rows_that_no_program_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="x: expected at most 32768 columns on a GPU, got 40000"):
        triton_fused.norm_tile(40000, 8192)


def strides(*names: str) -> dict[str, str]:
    return {f"{name}_stride": "i32" for name in names}


@pytest.mark.aot
@pytest.mark.parametrize("capability", [*CAPABILITIES, "gfx942"])
@pytest.mark.parametrize("added", [False, True])
def test_norm_kernels_compile_without_spills(capability: int | str, added: bool) -> None:
    wide = "_load_dwordx4" if capability == "gfx942" else "ld.global.v4.b32"
    scalars = {"rows": "i32", "hidden_size": "i32", "eps": "fp32", "offset": "fp32"}
    pointers = dict.fromkeys(("p_x", "p_weight", "p_out", "p_total"), "*bf16") | strides("x", "residual")
    if added:
        pointers["p_residual"] = "*bf16"
    rows, block, warps = triton_fused.norm_tile(4096, triton_fused.FORWARD_VALUES)
    constants = {"ROWS": rows, "BLOCK_C": block, "HAS_RESIDUAL": added} | ({} if added else {"p_residual": None})
    compiled = compile_ahead_of_time(
        triton_fused.norm_fwd_kernel, pointers | scalars, constants, capability, warps=warps
    )
    assert compiled.spilled == 0 and wide in compiled.ptx
    pointers = dict.fromkeys(("p_grad_out", "p_total", "p_weight", "p_grad_x"), "*bf16") | {"p_partial": "*fp32"}
    pointers |= strides("grad_out", "grad_total", "total") | {"rows_per_program": "i32"}
    if added:
        pointers["p_grad_total"] = "*bf16"
    rows, block, warps = triton_fused.norm_tile(4096, triton_fused.BACKWARD_VALUES)
    constants = {"ROWS": rows, "BLOCK_C": block, "HAS_TOTAL": added, "NEED_WEIGHT": True}
    constants |= {} if added else {"p_grad_total": None}
    compiled = compile_ahead_of_time(
        triton_fused.norm_bwd_kernel, pointers | scalars, constants, capability, warps=warps
    )
    assert compiled.spilled == 0 and wide in compiled.ptx


@pytest.mark.aot
@pytest.mark.parametrize("capability", [*CAPABILITIES, "gfx942"])
@pytest.mark.parametrize(("dim", "rotated"), [(128, 128), (96, 24)])
def test_the_rotary_kernel_compiles_without_spills(capability: int | str, dim: int, rotated: int) -> None:
    pointers = dict.fromkeys(("p_q", "p_k", "p_q_out", "p_k_out", "p_cos", "p_sin"), "*bf16")
    pointers |= strides("q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "table_batch", "table_row")
    pointers |= dict.fromkeys(("length", "heads_q", "heads_k", "dim"), "i32")
    heads, width, rest = triton_fused.rotary_tile(32, 8, dim, rotated)
    constants = {"HALF": rotated // 2, "HEADS": heads, "BLOCK_HALF": width, "BLOCK_REST": rest, "TRANSPOSED": False}
    assert compile_ahead_of_time(triton_fused.rotary_kernel, pointers, constants, capability).spilled == 0


@pytest.mark.aot
@pytest.mark.parametrize("capability", [*CAPABILITIES, "gfx942"])
@pytest.mark.parametrize("kind", [0, 1])
def test_gated_kernels_compile_without_spills(capability: int | str, kind: int) -> None:
    wide = "_load_dwordx4" if capability == "gfx942" else "ld.global.v4.b32"
    rows, block = triton_fused.gated_tile(14336)
    constants = {"ROWS": rows, "BLOCK_C": block, "KIND": kind, "SLOPE": triton_fused.SLOPE, "CUBE": triton_fused.CUBE}
    scalars = {"rows": "i32", "hidden_size": "i32"}
    forward = dict.fromkeys(("p_gate", "p_up", "p_out"), "*bf16") | strides("gate", "up") | scalars
    backward = dict.fromkeys(("p_grad", "p_gate", "p_up", "p_grad_gate", "p_grad_up"), "*bf16") | scalars
    backward |= strides("grad", "gate", "up")
    for kernel, types in ((triton_fused.gated_fwd_kernel, forward), (triton_fused.gated_bwd_kernel, backward)):
        compiled = compile_ahead_of_time(kernel, types, constants, capability)
        assert compiled.spilled == 0 and wide in compiled.ptx, kernel.__name__
