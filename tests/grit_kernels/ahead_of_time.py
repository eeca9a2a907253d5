"""Compiles Triton kernels for GPUs that this machine need not have, and reads what the compiler says about them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Compiled:
    """Spilled bytes per thread, shared memory of a block in bytes, the assembly (PTX, or AMD's), registers per thread, and the
    binary of an NVIDIA GPU."""

    spilled: int
    shared: int
    ptx: str
    registers: int
    cubin: bytes = b""

    def instructions(self) -> list[tuple[int, str]]:
        """The machine's own instructions (SASS) with their addresses, without the idle ones at the end."""
        text = _cuobjdump("--dump-sass", self.cubin)
        found = [
            (int(place, 16), code.strip()) for place, code in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", text)
        ]
        while found and found[-1][1] == "NOP":
            found.pop()
        return found

    def loops(self, holding: str) -> list[list[str]]:
        """Instructions of the loops that hold such an instruction and no other such loop, in the order of the program."""
        code = self.instructions()
        spans = []
        for place, text in code:
            jump = re.search(r"\bBRA(?:\.\S+)?\s+(?:!?U?P\d+,\s+)?`?\(?(?:\.L_x_\d+|0x([0-9a-f]+))", text)
            if jump and jump[1] and int(jump[1], 16) < place:
                spans.append((int(jump[1], 16), place))
        spans = [(a, b) for a, b in spans if any(a <= place <= b and holding in text for place, text in code)]
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [[text for place, text in code if begin <= place <= end] for begin, end in sorted(inner)]


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def compile_ahead_of_time(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int | str,
    *,
    warps: int = 4,
    stages: int = 3,
    **options: Any,
) -> Compiled:
    """``capability``: of an NVIDIA GPU, or the name of an AMD one ("gfx942"); ``options``: further ones of the compiler.

    ``types``: Triton type of each run-time argument ("*bf16", "i32"); every other argument is in ``constants``.

    Pointers and strides are assumed divisible by 16, as they are in a launch with ordinary tensors.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    assert set(types) | set(constants) == set(names), set(names) ^ (set(types) | set(constants))
    # a pointer is always 16-byte aligned here; so are the sizes whose name says stride or hidden_size
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or "stride" in name or name == "hidden_size"
    }
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        Source = ASTSource
    source = Source(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    given = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}  # as every launch says
    target = GPUTarget("hip", capability, 64) if isinstance(capability, str) else GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=given | options)
    if isinstance(capability, str):
        text = compiled.asm["amdgcn"]
        used, spilled = (re.search(rf"\.vgpr_{what}:\s+(\d+)", text) for what in ("count", "spill_count"))
        assert used is not None and spilled is not None, text[-2000:]
        return Compiled(4 * int(spilled[1]), compiled.metadata.shared, text, int(used[1]))
    usage = _cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(int(found[2]), compiled.metadata.shared, compiled.asm["ptx"], int(found[1]), compiled.asm["cubin"])
