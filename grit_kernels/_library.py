"""Find and load the compiled libraries (csrc/). A missing one is never an import error (see :func:`status`), a stale one is.

``_C.so`` holds the CPU kernels and is loaded whenever it is present; ``_C_cuda.so`` holds CUDA C++ kernels and is loaded where
torch sees a CUDA device. Both use torch's stable C ABI only, so neither depends on the versions of torch and Python.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
MINIMUM_TORCH = (2, 11)
_BUILD = "`pip install . --no-build-isolation` with a C++ compiler builds it"


@dataclass(frozen=True)
class LibraryStatus:
    """Whether a compiled library serves this process and, if not, why and how to fix it."""

    loaded: bool
    reason: str
    path: Path | None = None


_cpu: LibraryStatus | None = None
_cuda: LibraryStatus | None = None


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _load(path: Path, what: str) -> LibraryStatus:
    if not path.exists():
        return LibraryStatus(False, f"the {what} is missing; {_BUILD}")
    if _torch_version() < MINIMUM_TORCH:
        return LibraryStatus(
            False, f"the {what} needs torch >= 2.11, this is {torch.__version__}; `pip install 'torch>=2.11'`", path
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return LibraryStatus(
            False, f"{path} does not load ({error}); rebuild it here with torch {torch.__version__}: {_BUILD}", path
        )
    return LibraryStatus(True, "", path)


@functools.cache
def _signatures(path: Path) -> dict[str, str]:
    """What each op of a library takes and returns, as ``(Tensor, int) -> 2``; no ops in one from before it said so."""
    handle = ctypes.CDLL(str(path))
    if not hasattr(handle, "grit_kernels_signatures"):
        return {}
    handle.grit_kernels_signatures.restype = ctypes.c_char_p
    lines = handle.grit_kernels_signatures().decode().splitlines()
    return {line[: line.index("(")]: line[line.index("(") :] for line in lines}


def check_signature(schema: str) -> None:
    """Compare an op's schema with what the loaded libraries implement under its name; torch does not.

    Raises:
        ImportError: a library was built from sources with another schema. Its kernels are registered, so the reference cannot
            take their place.
    """
    parsed = torch._C.parse_schema(schema)
    expected = f"({', '.join(str(argument.type) for argument in parsed.arguments)}) -> {len(parsed.returns)}"
    for library, key in ((status(), "CPU"), (cuda_status(), "CUDA")):
        if library.path is None or not library.loaded:
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"grit_kernels::{parsed.name}", key):
            continue
        found = _signatures(library.path).get(parsed.name, "an unknown signature")
        if found != expected:
            raise ImportError(
                f"{library.path} was built from other sources: {parsed.name}: expected {expected}, got {found}. "
                "Build it again with a C++ compiler: `pip install . --no-build-isolation`"
            )


def interpreting() -> bool:
    """True in a process started with TRITON_INTERPRET=1, where the Triton kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def status() -> LibraryStatus:
    """Load the CPU library on the first call and report the outcome."""
    global _cpu
    # a plain global rather than functools.cache: torch.compile traces through this function
    if _cpu is None:
        if interpreting():
            _cpu = LibraryStatus(False, "TRITON_INTERPRET=1 replaces it with the Triton kernels")
        else:
            # GRIT_KERNELS_LIBRARY: another build of the CPU library, such as that of `make asan`
            _cpu = _load(Path(os.environ.get("GRIT_KERNELS_LIBRARY") or FOLDER / "_C.so"), "compiled library")
            cuda_status()
    return _cpu


def cuda_status() -> LibraryStatus:
    """Load the CUDA library on the first call, where torch sees a CUDA device."""
    global _cuda
    if _cuda is None:
        path = FOLDER / "_C_cuda.so"
        if interpreting():
            _cuda = LibraryStatus(False, "TRITON_INTERPRET=1 replaces it with the Triton kernels")
        elif not torch.cuda.is_available():
            _cuda = LibraryStatus(False, "torch sees no CUDA device")
        elif not path.exists():
            _cuda = LibraryStatus(
                False, "the CUDA library was not built: install with nvcc on PATH (GRIT_KERNELS_CUDA=1 requires it)"
            )
        else:
            _cuda = _load(path, "CUDA library")
    return _cuda


@functools.cache
def _handle() -> ctypes.CDLL:
    library = status()
    if not library.loaded:
        raise RuntimeError(library.reason)
    handle = ctypes.CDLL(str(library.path))
    handle.grit_kernels_cpu_isas.restype = ctypes.c_char_p
    handle.grit_kernels_set_cpu_isa.argtypes = [ctypes.c_char_p]
    handle.grit_kernels_cpu_isa_of.restype = ctypes.c_char_p
    handle.grit_kernels_amx_reason.restype = ctypes.c_char_p
    handle.grit_kernels_visited_key_blocks.restype = ctypes.c_int64
    return handle


def cpu_isas() -> list[str]:
    """Instruction sets of the library that this CPU can run, best first. GRIT_KERNELS_CPU_ISA=NAME selects one at start-up.

    The best is the fastest on this CPU: outside AMX, Intel's CPUs multiply FP32 twice as fast as pairs of bfloat16, so there
    ``avx512`` comes before ``avx512_bf16``. ``amx_emulated`` computes what ``amx`` does, slowly, on any CPU with avx512.
    """
    return _handle().grit_kernels_cpu_isas().decode().split(",")


@dataclass(frozen=True)
class CpuChoice:
    """The instruction sets in use now, by kind of work."""

    bfloat16_products: str  # attention and contrastive kernels, and with them the per-token loss
    others: str  # the same kernels in other dtypes, and every other kernel
    amx_reason: str  # why AMX is not used, empty where it is available


def cpu_choice() -> CpuChoice:
    """What runs on this CPU now."""
    handle = _handle()
    products, others = (handle.grit_kernels_cpu_isa_of(of_products).decode() for of_products in (1, 0))
    return CpuChoice(products, others, handle.grit_kernels_amx_reason().decode())


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of one instruction set inside the block (process-wide); for tests and benchmarks."""
    previous = cpu_choice().bfloat16_products or None  # the set whose name chooses both kinds of work
    if _handle().grit_kernels_set_cpu_isa(name.encode()):
        raise ValueError(f"instruction set: expected one of {', '.join(cpu_isas())} on this CPU, got {name!r}")
    try:
        yield
    finally:
        _handle().grit_kernels_set_cpu_isa(previous.encode() if previous else None)


def visited_key_blocks() -> int:
    """Pairs of a query tile and a key block that the CPU attention kernels visited since the last call of this function."""
    return _handle().grit_kernels_visited_key_blocks()
