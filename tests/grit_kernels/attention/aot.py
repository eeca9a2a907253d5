"""Compile the attention kernels for a GPU that is not there, and read what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from grit_kernels.attention import triton_backward, triton_decode, triton_forward
from grit_kernels.attention.triton_common import split_head_dim
from grit_kernels.attention.triton_configs import Config, table_config

# bytes of shared memory of one program; 8.6 and 8.9 have 99 KiB where 8.0 has 163
SHARED_LIMIT = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx9": 64 << 10}
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx9": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "forward": triton_forward.attention_forward_kernel,
    "decode": triton_decode.attention_decode_kernel,
    "backward_keys": triton_backward.backward_keys_kernel,
    "backward_rows": triton_backward.backward_rows_kernel,
}
_MATRIX_INSTRUCTION = {
    "sm80": r"\bmma\.sync",
    "sm90": r"\bwgmma\.mma_async|\bmma\.sync",
    "sm100": r"\btcgen05\.mma|\bmma\.sync",
    "gfx9": r"\bv_mfma_",
}
_FP32 = {"p_lse", "p_stat"}
_INT32 = {"p_table", "p_q_start", "p_q_len", "p_k_start", "p_k_len", "p_left", "p_right", "p_hi", "p_first_row"}
_FLOATS = {"scale", "cap", "softmax_scale"}


@dataclass(frozen=True)
class Compiled:
    matrix_instructions: int
    hopper_matrix_instructions: int
    shared: int
    registers: int
    spill_bytes: int  # per thread


def compile_kernel(
    kernel: str, arch: str, dtype: str, dim: int, *, config: Config | None = None, hi: bool = False, cap: bool = False
) -> Compiled:
    """Compile one kernel as a launcher would, with 16-byte aligned pointers and strides. ``dtype``: bf16, fp16 or fp32."""
    config = config or table_config(kernel, dim, 4 if dtype == "fp32" else 2, arch)
    function = KERNELS[kernel]
    d1, d2 = split_head_dim(dim)
    constants = {
        **{"HEADS": 32, "GROUP": 4, "D": dim, "D1": d1, "D2": d2, "BM": config.rows, "BN": config.keys},
        **{"HAS_HI": hi, "HAS_CAP": cap, "UPCAST": False, "SPLIT": True},
    }
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in _FLOATS:
            signature[name] = "fp32"
        elif name.startswith("p_"):
            fp32 = name in _FP32 or (kernel == "decode" and name == "p_out")
            signature[name] = "*fp32" if fp32 else "*i32" if name in _INT32 else f"*{dtype}"
        else:
            signature[name] = "i32"
        if name.startswith(("p_", "stride_")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    used = {(function.arg_names.index(name),): value for name, value in constants.items() if name in signature}
    source = triton.compiler.ASTSource(function, signature, constexprs=used, attrs=attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=TARGETS[arch], options=options)
    text = binary.asm["amdgcn" if arch == "gfx9" else "ptx"]
    if arch == "gfx9":
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spills = 4 * int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0])
    else:
        registers, spills = _resources(binary.asm["cubin"])
    return Compiled(
        matrix_instructions=len(re.findall(_MATRIX_INSTRUCTION[arch], text)),
        hopper_matrix_instructions=len(re.findall(r"\bwgmma\.mma_async", text)),
        shared=binary.metadata.shared,
        registers=registers,
        spill_bytes=spills,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which holds the spilled registers, of a cubin with one kernel."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.findall(r"REG:(\d+)", report.stdout)[0]), int(re.findall(r"STACK:(\d+)", report.stdout)[0])
