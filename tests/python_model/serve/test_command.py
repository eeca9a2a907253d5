"""What ``grit serve`` sets up in its process."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from python_model.commands import serve

FREED = """
import ctypes
from pathlib import Path
from python_model.commands.serve import share_arena, trim_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4

share_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = resident()
blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(100_000))) for _ in range(400)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[::2]:
    libc.free(block)
held = resident()
trim_memory()
print(before, held, resident())
"""
SCRIPT = """
import ctypes, sys, threading
from python_model.commands.serve import share_arena

if sys.argv[1] == "shared":
    share_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
running = threading.Barrier(5)

def allocate():
    libc.malloc(ctypes.c_size_t(50_000))
    running.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
running.wait()
for thread in threads:
    thread.join()
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than GNU's")
def test_threads_of_the_server_allocate_from_one_arena(tmp_path: Path) -> None:
    counts = {}
    for name in ("own", "shared"):
        found = tmp_path / name
        subprocess.run([sys.executable, "-c", SCRIPT, name, str(found)], check=True, timeout=300)
        counts[name] = found.read_text().count("<heap nr=")
    assert counts["shared"] == 1 < counts["own"]


SERVER = """
import sys
import uvicorn
from python_model.cli import main
from python_model.commands import serve

trimmed = []

def run(server):
    print(sys.modules["triton"], "libtriton" in open("/proc/self/maps").read(), len(server.config.app.routes) > 10, *trimmed)

serve.trim_memory = lambda: trimmed.append("trimmed")

uvicorn.Server.run = run
main(["serve", *sys.argv[1:]])
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_server_on_a_cpu_does_not_load_triton_and_trims_its_memory_once(checkpoint: Path) -> None:
    for package in ("fastapi", "prometheus_client", "uvicorn", "triton"):
        pytest.importorskip(package)
    command = [sys.executable, "-c", SERVER, "--model", str(checkpoint), "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout.split() == ["None", "False", "True", "trimmed"], run.stderr


@pytest.mark.parametrize(
    ("device", "interprets", "left_out"), [("cpu", "0", True), ("cpu", "1", False), ("cuda:0", "0", False)]
)
def test_triton_is_left_out_where_no_kernel_needs_it(
    monkeypatch: pytest.MonkeyPatch, device: str, interprets: str, left_out: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interprets)
    modules: dict[str, object] = {}
    monkeypatch.setattr(serve, "sys", SimpleNamespace(modules=modules))
    serve.leave_out_triton(serve.COMMAND.arguments(["--device", device]))
    assert modules == ({"triton": None} if left_out else {})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than GNU's")
def test_what_loading_has_freed_is_returned_to_the_system() -> None:
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=300, check=True)
    before, held, trimmed = map(int, run.stdout.split())
    assert held - before > 36 << 10 and trimmed - before < 24 << 10, "in KiB"
