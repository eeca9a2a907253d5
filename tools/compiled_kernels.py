"""docs/gpu.md: what Triton's compiler makes of the attention kernels, for GPUs that this machine need not have.

    python -m tools.compiled_kernels

compiles the table's entries and the variants beside them, and replaces the figures of the installed Triton; those of other
versions stay. tests/grit_kernels/attention/test_triton_compile.py compares entries with the page, so no figure can go stale.
"""

from __future__ import annotations

import re
from pathlib import Path

import triton

from grit_kernels.attention.triton_configs import Config, table_config
from tests.grit_kernels.ahead_of_time import Compiled
from tests.grit_kernels.attention.compiled import HOPPER, compile_hopper, compile_kernel, hopper_config

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
COLUMNS = (
    *("kernel", "GPU", "D", "tile", "registers", "stack", "shared", "instructions"),
    *("loop", "matrix", "cp.async", "exp2", "waits"),
)
Entry = tuple[str, str, int, Config]


def entries() -> list[Entry]:
    """Kernel, architecture, head size and tile in bfloat16: the table's, then variants that wait for a GPU."""
    kernels = ("forward", "decode", "backward_keys", "backward_rows", "backward")
    found = [
        (kernel, arch, dim, table_config(kernel, dim, 2, arch))
        for kernel in kernels
        for arch in ("sm90", "sm80")
        for dim in (64, 128)
    ]
    base = table_config("forward", 64, 2, "sm90")
    variants = [(64, base._replace(ahead=True)), (64, Config(64, 64, 4, 3)), (128, Config(128, 128, 8, 2))]
    hopper = [(kernel, "sm90", dim, hopper_config(kernel, dim)) for kernel in HOPPER for dim in (64, 128)]
    return [*found, *(("forward", "sm90", dim, config) for dim, config in variants), *hopper]


def figures(entry: Entry) -> list[str]:
    """A row of the table. The loop is the first: blocks that need no mask."""
    kernel, arch, dim, config = entry
    compiled = (
        compile_hopper(kernel, "bf16", dim)
        if kernel in HOPPER
        else compile_kernel(kernel, arch, "bf16", dim, config=config)
    )
    loop = loops_of_products(compiled)[0]

    def count(pattern: str) -> int:
        return sum(re.search(pattern, code) is not None for code in loop)

    counts = (count(r"\bH?G?MMA\b"), count(r"\bLDGSTS"), count(r"\bMUFU\.EX2"), count(r"\bWARPGROUP\.DEPBAR"))
    numbers = (compiled.registers, compiled.spilled, compiled.shared, len(compiled.instructions()), len(loop), *counts)
    return [kernel, arch, str(dim), str(config), *map(str, numbers)]


def loops_of_products(compiled: Compiled) -> list[list[str]]:
    """The innermost loops that multiply matrices."""
    return compiled.loops("MMA")


def marker(version: str) -> str:
    return f"<!-- Triton {version}: python -m tools.compiled_kernels -->"


def section(rows: list[list[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def committed(version: str) -> dict[tuple[str, ...], list[str]]:
    """Rows of the page for a version of Triton by kernel, GPU, D and tile; none if it has no section."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(marker(version))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in rest.partition("<!-- end -->")[0].split("\n")
    ]
    return {tuple(row[:4]): row for row in rows if len(row) == len(COLUMNS) and row[2].isdigit()}


def main() -> None:
    text, begin = PAGE.read_text(encoding="utf-8"), marker(triton.__version__)
    assert begin in text, f"{PAGE}: expected the line {begin!r}"
    before, _, rest = text.partition(begin)
    after = rest.partition("<!-- end -->")[2]
    table = section([figures(entry) for entry in entries()])
    PAGE.write_text(f"{before}{begin}\n\n{table}\n\n<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
