"""Run tests with the compiled AMX kernels on a CPU that has no AMX: each of their instructions traps and is computed.

    python -m tests.grit_kernels.amx_trap tests/grit_kernels/attention/test_cpu_kernels.py -k amx

The arguments are pytest's. What runs is the library as it is built, chosen through CPUID and the kernel's permission as on a CPU
with AMX; amx_trap.cpp says how. It needs Linux on x86-64 with AVX512, a CPU that can make CPUID fault, and a C++ compiler.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

KINDS = ("configure", "release", "zero", "load", "store", "product", "convert", "pairs")
SOURCE = Path(__file__).with_suffix(".cpp")


def build(folder: Path) -> Path:
    """Compile the library to preload."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if platform.machine() != "x86_64" or not compiler:
        raise RuntimeError("a trap for AMX needs x86-64 and a C++ compiler")
    out = folder / "amx_trap.so"
    flags = ["-std=c++20", "-O2", "-mavx2", "-mfma", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(out)], check=True)
    return out


def environment(library: Path) -> dict[str, str]:
    """Of a process in which this module is a plugin of pytest."""
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


class Trap:
    """What the preloaded library computed in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.grit_trap_count.restype = self._library.grit_trap_configured_threads.restype = ctypes.c_int64

    def counts(self) -> dict[str, int]:
        """The instructions so far, by kind."""
        return {kind: self._library.grit_trap_count(index) for index, kind in enumerate(KINDS)}

    def configured_threads(self) -> int:
        """Threads that hold tiles now."""
        return int(self._library.grit_trap_configured_threads())

    def load_kernels(self) -> list[str]:
        """Load grit_kernels' library where CPUID says that there is AMX; returns the usable instruction sets."""
        import torch  # noqa: F401  (looks at the real CPU)

        if self._library.grit_trap_show_amx(1):
            raise RuntimeError("CPUID cannot be made to fault on this machine")
        try:
            from grit_kernels import _library

            return _library.cpu_isas()
        finally:
            self._library.grit_trap_show_amx(0)


if "amx_trap" in os.environ.get("LD_PRELOAD", ""):
    trap = Trap()
    isas = trap.load_kernels()
    if isas[0] != "amx":
        raise RuntimeError(f"instruction sets: expected amx first, got {isas}")

    @pytest.fixture(autouse=True)
    def _tiles_are_returned() -> Iterator[None]:
        yield
        assert trap.configured_threads() == 0, "a kernel left tiles configured"

    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        """Say what ran."""
        terminalreporter.write_line(f"amx_trap: {trap.counts()}")

    def pytest_sessionfinish(session: pytest.Session) -> None:
        """A run that met no product of tiles tested nothing."""
        if not trap.counts()["product"] and not session.exitstatus:
            session.exitstatus = 1


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-p", "no:faulthandler", "-p", __spec__.name, *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env=environment(build(Path(folder)))).returncode)


if __name__ == "__main__":
    main()
