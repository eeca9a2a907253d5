"""The attention kernels compiled as their launchers would compile them, for GPUs that this machine need not have."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from grit_kernels.attention import triton_backward, triton_decode, triton_forward
from grit_kernels.attention.triton_common import split_head_dim
from grit_kernels.attention.triton_configs import Config, table_config
from tests.grit_kernels.ahead_of_time import Compiled, compile_ahead_of_time

FUNCTIONS = {
    "forward": triton_forward.attention_forward_kernel,
    "decode": triton_decode.attention_decode_kernel,
    "backward_keys": triton_backward.backward_keys_kernel,
    "backward_rows": triton_backward.backward_rows_kernel,
    "backward": triton_backward.backward_keys_kernel,
}
CAPABILITY: dict[str, int | str] = {"sm80": 80, "sm90": 90, "sm100": 100, "gfx9": "gfx942"}
FP32_POINTERS = {"p_lse", "p_stat"}
DATA_POINTERS = {"p_q", "p_k", "p_v", "p_do", "p_out", "p_dq", "p_dk", "p_dv"}


def compile_kernel(
    kernel: str,
    arch: str,
    dtype: str,
    dim: int,
    *,
    config: Config | None = None,
    hi: bool = False,
    cap: bool = False,
    used: bool = False,
    sinks: bool = False,
    page: int = 0,
) -> Compiled:
    """Compile ``kernel`` as its launcher would for 32 query heads over 8; ``used``: some slots of the cache hold no key;
    ``sinks``: of the forward kernel; ``page``: slots of a page, where decoding reads keys through a table.

    Decoding compiles as where keys are split, so the merge applies sinks.
    """
    config = config or table_config(kernel, dim, 4 if dtype == "fp32" else 2, arch)
    if page:
        config = triton_decode.paged_config(config)
    d1, d2 = split_head_dim(dim, triton_decode.LEAST_COLUMNS if kernel == "decode" else 16)
    function = FUNCTIONS[kernel]
    given = {
        **{"HEADS": 32, "GROUP": 4, "D": dim, "D1": d1, "D2": d2, "BM": config.rows, "BN": config.keys},
        **{"HAS_HI": hi, "HAS_CAP": cap, "UPCAST": False, "SPLIT": True, "PERSISTENT": config.persistent},
        **{"AHEAD": config.ahead, "HAS_USED": used, "HAS_SINKS": sinks, "PAGE": page},
        **{"ATOMIC": kernel == "backward", "STRIDE_QT": 32 * dim, "STRIDE_DOT": 32 * dim},
    }
    types = {}
    for name in function.arg_names:
        # partial results, sums by atomics
        if name in FP32_POINTERS or (kernel, name) in (("decode", "p_out"), ("backward", "p_dq")):
            types[name] = "*fp32"
        elif name in DATA_POINTERS:
            types[name] = f"*{dtype}"
        elif name in ("p_used", "p_sinks"):
            types[name] = "*u8" if name == "p_used" else "*bf16"
        elif name.startswith("p_"):
            types[name] = "*i32"
        elif name in ("scale", "cap", "softmax_scale"):
            types[name] = "fp32"
        elif name not in given:
            types[name] = "i32"
    return compile_ahead_of_time(
        function,
        types,
        {name: value for name, value in given.items() if name in function.arg_names},
        CAPABILITY[arch],
        warps=config.warps,
        stages=config.stages,
    )


HOPPER = {
    "hopper": ("hopper_forward", "attention_hopper_kernel"),
    "hopper_keys": ("hopper_backward_keys", "backward_keys_hopper_kernel"),
    "hopper_rows": ("hopper_backward_rows", "backward_rows_hopper_kernel"),
}
"""Module and kernel of what the table of docs/gpu.md names so."""


def _hopper_module(kernel: str) -> Any:
    return importlib.import_module(f"grit_kernels.attention.{HOPPER[kernel][0]}")


def hopper_config(kernel: str, dim: int) -> Config:
    """The tile of a Hopper kernel as others write theirs: of its warps four copy."""
    constants = _hopper_module(kernel).constants(dim)
    tile = constants["CONSUMERS"] * constants["ROWS_EACH"]
    rows, keys = (constants["BLOCK"], tile) if kernel == "hopper_keys" else (tile, constants["BLOCK"])
    return Config(rows, keys, 12, constants["STAGES"])


def compile_hopper(kernel: str, dtype: str, dim: int, *, hi: bool = False, sinks: bool = False) -> Compiled:
    """Compile a Hopper kernel as its launcher would for 32 query heads over 8."""
    from grit_kernels.attention.hopper_common import tile_layout

    module = _hopper_module(kernel)
    function = getattr(module, HOPPER[kernel][1])
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    given = {**module.constants(dim), "HEADS": 32, "GROUP": 4, "HAS_HI": hi, "HAS_SINKS": sinks}
    given = {name: value for name, value in given.items() if name in function.arg_names}
    moving = ("q_desc", "do_desc") if kernel == "hopper_keys" else ("k_desc", "v_desc")
    types = {}
    for name in function.arg_names:
        if name.endswith("_desc"):
            rows = given["BLOCK" if name in moving else "ROWS_EACH"]
            types[name] = f"tensordesc<{dtype}[{rows}, {dim}],{tile_layout(rows, dim, torch_dtype)!r}>"
        elif name in FP32_POINTERS:
            types[name] = "*fp32"
        elif name in DATA_POINTERS | {"p_sinks"}:
            types[name] = f"*{dtype}"
        elif name not in given:
            types[name] = "*i32" if name.startswith("p_") else "fp32" if name.endswith("scale") else "i32"
    return compile_ahead_of_time(function, types, given, 90, warps=4)
