"""The portable kernels on another family of CPUs: compiled for aarch64 and run by qemu, where both are installed."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, needs_source_tree

CROSS, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
SOURCES = ("attention_forward", "attention_decode", "attention_backward", "contrastive", "fused", "pooling", "table")


def build(compiler: str, program: Path, *options: str) -> None:
    command = [
        compiler,
        "-std=gnu++20",
        "-O2",
        "-fno-trapping-math",
        "-w",
        "-DGRIT_ISA=portable",
        f"-I{ROOT / 'csrc/cpu'}",
    ]
    files = [str(ROOT / "csrc/cpu" / f"{name}.cpp") for name in SOURCES]
    check = str(ROOT / "tests/grit_kernels/portable_check.cpp")
    subprocess.run([*command, *options, check, *files, "-o", str(program)], check=True)


@needs_source_tree
@pytest.mark.slow
@pytest.mark.skipif(CROSS is None or QEMU is None, reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
def test_the_portable_kernels_are_right_on_aarch64(tmp_path: Path) -> None:
    assert CROSS is not None and QEMU is not None
    build(CROSS, tmp_path / "check", "-static")
    run = subprocess.run([QEMU, str(tmp_path / "check")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "dv: error" in run.stdout and "pool: error" in run.stdout


@needs_source_tree
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_portable_kernels_are_right_here_and_stay_within_their_arrays(tmp_path: Path) -> None:
    build("g++", tmp_path / "check", "-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    run = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True)
    assert run.returncode == 0, f"{platform.machine()}: {run.stdout}{run.stderr}"
