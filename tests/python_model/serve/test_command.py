"""What ``grit serve`` sets up in its process."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

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
