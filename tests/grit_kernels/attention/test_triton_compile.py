"""The attention kernels compiled for GPUs that this machine need not have: matrix instructions, spills, shared memory."""

from __future__ import annotations

import re

import pytest

from grit_kernels.backend import interpreting

if interpreting():
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the package triton is not installed")

from grit_kernels.attention import triton_backward, triton_configs, triton_decode, triton_plan  # noqa: E402
from grit_kernels.attention.triton_configs import KERNELS, table_config  # noqa: E402
from tests.grit_kernels.ahead_of_time import compile_ahead_of_time  # noqa: E402
from tests.grit_kernels.attention.compiled import CAPABILITY, HOPPER, compile_kernel, hopper_config  # noqa: E402
from tools import compiled_kernels  # noqa: E402

# bytes a program may have; 8.6 and 8.9 have 99 KiB where 8.0 has 163
SHARED_LIMIT = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx9": 64 << 10}
MATRIX_INSTRUCTION = {
    "sm80": r"\bmma\.sync",
    "sm90": r"\bwgmma\.mma_async",
    "sm100": r"\btcgen05\.mma",
    "gfx9": r"\bv_mfma_",
}
SMALL_TILE_INSTRUCTION = r"\bmma\.sync|\bv_mfma_"  # fewer than 64 rows are too few for a warpgroup's instruction
# Bytes per thread that may be spilled in bfloat16 and float16, where it is more than SMALL_BUDGET: the larger of Triton 3.6 and
# 3.9, rounded up. The gradient of the keys holds two FP32 tiles; what it spills are mostly addresses, which the counts bound.
SPILL_BUDGET: dict[tuple[str, str, int], int] = {
    ("forward", "sm90", 256): 112,
    ("forward", "sm90", 512): 96,
    ("forward", "sm100", 256): 160,
    ("backward_keys", "sm90", 128): 48,
    ("backward_keys", "sm90", 256): 80,
}
SMALL_BUDGET = 24  # a few scalars, outside of the loops
FLAGS_BUDGET = 400  # more, with upper bounds per token or a softcap


def check(kernel: str, arch: str, dtype: str, dim: int, hi: bool = False, cap: bool = False) -> None:
    compiled = compile_kernel(kernel, arch, dtype, dim, hi=hi, cap=cap)
    if dtype != "fp32":
        small = kernel == "decode" or (kernel, dim) == ("backward", 256)
        small |= dim > 256 and (kernel, arch) != ("forward", "sm90")
        wanted = SMALL_TILE_INSTRUCTION if small else MATRIX_INSTRUCTION[arch]
        assert re.search(wanted, compiled.ptx), "no matrix instruction"
    else:
        assert "tf32" not in compiled.ptx, "float32 must be multiplied in full precision"
    assert compiled.shared <= SHARED_LIMIT[arch]
    budget = SMALL_BUDGET
    if dtype != "fp32":
        budget = 0 if kernel == "forward" and dim in (64, 128) else SPILL_BUDGET.get((kernel, arch, dim), SMALL_BUDGET)
    assert compiled.spilled <= budget + (FLAGS_BUDGET if hi or cap else 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_head_size_and_dtype_has_tiles_that_triton_takes(kernel: str) -> None:
    for element_bytes in (2, 4):
        for dim in (128, 256, 512) if kernel == "decode" else (64, 128, 256, 512):
            entry = triton_configs._TABLE[kernel, element_bytes, dim]
            assert "" in entry and set(entry) <= {"", *CAPABILITY}
            for config in entry.values():
                assert all(size >= 16 and size & (size - 1) == 0 for size in (config.rows, config.keys))
                assert config.warps in (1, 2, 4, 8) and 1 <= config.stages <= 4
                assert not (config.persistent and kernel != "forward") and not config.ahead


@pytest.mark.parametrize(("dim", "arch"), [(64, "sm90"), (128, "sm90")])
def test_bf16_forward_uses_hopper_matrix_instructions_and_spills_nothing(dim: int, arch: str) -> None:
    check("forward", arch, "bf16", dim)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kernel", "arch", "dtype", "dim", "hi", "cap"),
    [
        ("forward", "sm80", "bf16", 64, False, False),
        ("forward", "sm80", "bf16", 128, False, False),
        ("forward", "sm100", "bf16", 64, False, False),
        ("forward", "sm100", "bf16", 128, False, False),
        ("forward", "gfx9", "bf16", 128, False, False),
        ("forward", "sm90", "fp16", 96, False, False),
        ("forward", "sm90", "bf16", 128, True, True),
        ("forward", "sm90", "fp32", 64, False, False),
        ("decode", "sm90", "bf16", 128, False, False),
        ("backward_keys", "sm90", "bf16", 128, False, False),
        ("backward_rows", "sm90", "bf16", 128, False, False),
        ("backward", "sm90", "bf16", 128, False, False),
        ("backward_keys", "sm80", "bf16", 64, False, False),
        ("backward_keys", "gfx9", "bf16", 64, False, False),
    ],
)
def test_representative_kernels_compile_within_their_budget(
    kernel: str, arch: str, dtype: str, dim: int, hi: bool, cap: bool
) -> None:
    check(kernel, arch, dtype, dim, hi, cap)


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("dim", [128, 256, 512])
def test_decoding_of_many_rows_fits_the_shared_memory(arch: str, dim: int) -> None:
    config = table_config("decode", dim, 2, arch)._replace(rows=triton_decode.largest_tile(dim, 2))
    compiled = compile_kernel("decode", arch, "bf16", dim, config=config)
    assert compiled.shared <= SHARED_LIMIT[arch]
    assert compiled.spilled == 0


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_decoding_computes_each_score_once_at_head_size_80(arch: str) -> None:
    """No warp repeats another's work: as many products and exponentials as at head size 96."""
    loops = [compiled_kernels.loops_of_products(compile_kernel("decode", arch, "bf16", dim))[0] for dim in (80, 96)]
    work = [[sum(x in code for code in loop) for x in ("MMA", "MUFU.EX2")] for loop in loops]
    assert work[0] == work[1]


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_decoding_through_holes_keeps_its_loads_asynchronous_and_spills_nothing(arch: str) -> None:
    compiled = compile_kernel("decode", arch, "bf16", 128, used=True)
    assert compiled.shared <= SHARED_LIMIT[arch] and compiled.spilled == 0
    (loop,) = compiled_kernels.loops_of_products(compiled)
    assert sum("LDGSTS" in code for code in loop) >= 16, "keys and values are copied ahead, as without holes"


def check_paged(arch: str, dtype: str, dim: int, page: int, most: bool) -> None:
    """Decoding through a table, in tiles of few rows or of as many as a tile has: copies stay asynchronous, and as early."""
    size = 4 if dtype == "fp32" else 2
    config = table_config("decode", dim, size, arch)
    config = config._replace(rows=triton_decode.largest_tile(dim, size) if most else config.rows)
    config = config._replace(warps=triton_decode.paged_config(config).warps)
    plain, paged = (compile_kernel("decode", arch, dtype, dim, config=config, page=x) for x in (0, page))
    assert paged.spilled <= (0 if dim in (64, 128, 256, 512) else SMALL_BUDGET)
    assert plain.shared <= paged.shared <= min(plain.shared + (4 << 10), SHARED_LIMIT[arch])
    copies = [
        [sum("LDGSTS" in code for code in loop) for loop in compiled_kernels.loops_of_products(x)]
        for x in (plain, paged)
    ]
    assert len(copies[0]) == len(copies[1]) and all(a <= b for a, b in zip(*copies, strict=True)), copies


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_decoding_in_pages_keeps_its_loads_asynchronous_and_spills_nothing(arch: str) -> None:
    check_paged(arch, "bf16", 128, 16, most=False)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("most", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dim", "page"),
    [
        *(("bf16", 128, page) for page in (1, 48, 256)),
        *(("bf16", dim, 16) for dim in (64, 80, 96, 256, 512)),
        *(("fp16", 128, 16), ("fp32", 128, 16), ("fp32", 256, 256)),
    ],
)
def test_pages_of_any_size_are_read_with_loads_as_early(arch: str, most: bool, dtype: str, dim: int, page: int) -> None:
    check_paged(arch, dtype, dim, page, most)


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm90", "gfx9"])
def test_the_kernels_around_the_matrix_products_compile(arch: str) -> None:
    numbers = ["p_q_start", "p_q_len", "p_k_start", "p_k_len", "p_left", "p_right", "p_hi"]
    for over_keys in (True, False):
        for rectangular in (True, False):
            compile_ahead_of_time(
                triton_plan.list_tiles_kernel,
                {x: "*i32" for x in ["p_table", "p_work", "p_counter", *numbers]}
                | {x: "i32" for x in ("batch", "tiles", "rows", "search_steps", "split_rows", "split_keys")},
                {
                    "OVER_KEYS": over_keys,
                    "RECTANGULAR": rectangular,
                    "BM": 128,
                    "BN": 64,
                    "HAS_HI": over_keys,
                    "SLOTS": 128,
                },
                CAPABILITY[arch],
            )
    compile_ahead_of_time(
        triton_plan.transpose_hi_kernel,
        {x: "*i32" for x in ["p_first_row", *numbers[:4], "p_hi"]}
        | {x: "i32" for x in ("batch", "keys", "search_steps", "row_steps")},
        {"SLOTS": 128},
        CAPABILITY[arch],
    )
    pointers = {x: "*i32" for x in ("p_table", "p_work", "p_sorted")}
    constants = {"SLOTS": 32, "CHUNK": 128}
    compile_ahead_of_time(triton_plan.sort_tiles_kernel, pointers | {"tiles": "i32"}, constants, CAPABILITY[arch])
    merged = compile_ahead_of_time(
        triton_decode.merge_splits_kernel,
        {
            "p_part": "*fp32",
            "p_part_lse": "*fp32",
            "p_out": "*bf16",
            "p_lse": "*fp32",
            "p_sinks": "*bf16",
            "p_q_start": "*i32",
            "p_q_len": "*i32",
            "p_k_len": "*i32",
        }
        | {x: "i32" for x in ("q_rows", "splits", "most_rows", "least_keys")},
        {"HEADS": 32, "D": 128, "DP": 128, "BM": 16, "HAS_SINKS": True},
        CAPABILITY[arch],
    )
    assert merged.spilled == 0
    for sinks in (False, True):
        statistics = compile_ahead_of_time(
            triton_backward.row_statistics_kernel,
            {"p_do": "*bf16", "p_out": "*bf16", "p_sinks": "*bf16"}
            | {x: "*fp32" for x in ("p_lse", "p_dlse", "p_stat", "p_dq", "p_dsinks")}
            | {x: "i32" for x in ("stride_dot", "stride_doh", "rows")},
            {"HEADS": 32, "D": 128, "DP": 128, "BM": 32, "HAS_DLSE": True, "CLEAR_DQ": True, "HAS_SINKS": sinks},
            CAPABILITY[arch],
        )
        assert statistics.spilled == 0
        if arch == "sm90":
            assert "ld.global.v4" in statistics.ptx, "rows are read 16 bytes at a time"


@pytest.mark.aot
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_a_sink_costs_the_forward_kernel_nothing_in_its_loops(arch: str, dim: int) -> None:
    plain, with_sinks = (compile_kernel("forward", arch, "bf16", dim, sinks=sinks) for sinks in (False, True))
    assert with_sinks.spilled == plain.spilled == 0 and with_sinks.shared == plain.shared
    work = [
        [
            sum(re.search("MMA|MUFU|LDGSTS", code) is not None for code in loop)
            for loop in compiled_kernels.loops_of_products(x)
        ]
        for x in (plain, with_sinks)
    ]
    assert work[0] == work[1]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", CAPABILITY)
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [("bf16", d) for d in (32, 64, 80, 96, 128, 256, 320, 512)]
    + [("fp16", 128)]
    + [("fp32", d) for d in (64, 128, 256)],
)
def test_every_entry_of_the_table_compiles_within_its_budget(kernel: str, arch: str, dtype: str, dim: int) -> None:
    check(kernel, arch, dtype, dim)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_float32_heads_of_512_fit_the_shared_memory_of_8_0(kernel: str, arch: str) -> None:
    compiled = compile_kernel(kernel, arch, "fp32", 512)
    assert "tf32" not in compiled.ptx and compiled.shared <= 163 << 10


@pytest.mark.aot
def test_the_gradient_of_the_keys_loads_each_number_once_on_hopper() -> None:
    """D 128: a row's statistics are one copy of 16 bytes rather than one per thread that needs them."""
    compiled = compile_kernel("backward_keys", "sm90", "bf16", 128)
    loop, edges = compiled_kernels.loops_of_products(compiled)
    assert sum("LDGSTS" in code for code in loop) <= 12
    assert len(loop) <= 400
    assert not any(re.search(r"\b(STL|LDL)\b", code) for code in loop), "the loop without masks spills"
    assert not any("I2F" in code for code in [*loop, *edges]), "a loop divides integers"
    if triton.__version__.startswith("3.6."):
        assert compiled.spilled == 0


def test_products_ahead_of_the_softmax_run_beside_it() -> None:
    """D 64 on Hopper: exponentials stand between the first product and the wait for it, and products are not serialised."""
    config = table_config("forward", 64, 2, "sm90")
    shares = []
    for ahead in (False, True):
        compiled = compile_kernel("forward", "sm90", "bf16", 64, config=config._replace(ahead=ahead))
        assert compiled.spilled == 0
        loop = compiled_kernels.loops_of_products(compiled)[0]
        first = next(i for i, code in enumerate(loop) if "HGMMA" in code)
        wait = next(i for i, code in enumerate(loop) if i > first and "WARPGROUP.DEPBAR" in code)
        exponentials = [i for i, code in enumerate(loop) if "MUFU.EX2" in code]
        assert sum("WARPGROUP.DEPBAR" in code for code in loop) <= 2, "a product waits inside"
        shares.append(sum(first < i < wait for i in exponentials) / len(exponentials))
    assert shares[0] == 0 and shares[1] >= 0.5


@pytest.mark.aot
@pytest.mark.parametrize(
    "entry",
    [
        ("forward", "sm90", 128),
        ("decode", "sm90", 128),
        ("backward_keys", "sm90", 128),
        ("hopper", "sm90", 128),
        ("hopper_keys", "sm90", 128),
    ],
)
def test_the_page_shows_what_the_compiler_gives(entry: tuple[str, str, int]) -> None:
    page = compiled_kernels.committed(triton.__version__)
    if not page:
        pytest.skip(f"docs/gpu.md has no figures of Triton {triton.__version__}")
    kernel, arch, dim = entry
    config = hopper_config(kernel, dim) if kernel in HOPPER else table_config(kernel, dim, 2, arch)
    row = compiled_kernels.figures((kernel, arch, dim, config))
    assert row == page[tuple(row[:4])], "run `python -m tools.compiled_kernels` and commit docs/gpu.md"


def test_the_page_has_every_entry_of_the_table() -> None:
    wanted = {(kernel, arch, str(dim), str(config)) for kernel, arch, dim, config in compiled_kernels.entries()}
    for version in ("3.6.0", "3.9.0"):
        assert set(compiled_kernels.committed(version)) == wanted, f"run tools.compiled_kernels with Triton {version}"
