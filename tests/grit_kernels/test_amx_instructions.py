"""The AMX kernels, instruction by instruction: as they are on a CPU with AMX, and elsewhere by a trap that computes each one."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from grit_kernels import _library
from tests.conftest import ROOT, needs_source_tree
from tests.grit_kernels import amx_trap
from tests.grit_kernels.contrastive.test_cpu_contrastive import by_ops, problem

ISAS = _library.cpu_isas() if _library.status().loaded else []
TRAPPED = "amx_trap" in os.environ.get("LD_PRELOAD", "")
needs_amx = pytest.mark.skipif(
    "amx" not in ISAS, reason="the CPU has no AMX; the tests below run this one under a trap"
)
needs_trap = pytest.mark.skipif(
    TRAPPED or "amx" in ISAS or "amx_emulated" not in ISAS,
    reason="needs a CPU with AVX512 and without AMX, and a library with AMX kernels",
)


def assert_as_emulated(results: dict[str, tuple[Tensor, ...]]) -> None:
    """The same bits, which says that the emulation tests what runs."""
    for found, emulated in zip(results["amx"], results["amx_emulated"], strict=True):
        assert torch.equal(found, emulated) and bool(found.isfinite().any())


@needs_amx
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"softmax_scale": 30.0}], ids=["plain", "softcap", "sharp"])
def test_attention_gives_the_bits_of_the_emulation(dim: int, options: dict[str, Any]) -> None:
    starts = torch.tensor([0, 1, 1, 38, 108, 238], dtype=torch.int32)
    causal = torch.tensor([True, True, False, False, True])
    windows = torch.tensor([[-1, -1], [9, 0], [9, 9], [-1, -1], [50, 0]])
    q, k, v = (torch.randn(238, heads, dim).bfloat16().requires_grad_() for heads in (4, 2, 2))
    grads = (torch.randn(238, 4, dim).bfloat16(), torch.randn(238, 4))
    results = {}
    for isa in ("amx", "amx_emulated"):
        with _library.cpu_isa(isa):
            out, lse = gk.switch_attention_varlen(
                q, k, v, causal, starts, starts, 130, 130, window_size=windows, return_lse=True, **options
            )
            results[isa] = (out, lse, *torch.autograd.grad((out, lse), (q, k, v), grads))
    assert_as_emulated(results)


@needs_amx
@pytest.mark.parametrize(("count", "group", "width"), [(1, 1, 7), (49, 3, 20), (130, 5, 130), (30, 9, 2050)])
def test_the_contrastive_loss_gives_the_bits_of_the_emulation(count: int, group: int, width: int) -> None:
    arguments = (*problem(count, group, width, torch.bfloat16, ids=group == 3), True, False)
    grad, results = torch.randn(count), {}
    for isa in ("amx", "amx_emulated"):
        with _library.cpu_isa(isa):
            results[isa] = by_ops(arguments, grad)
    assert_as_emulated(results)


def run_trapped(*arguments: str) -> dict[str, int]:
    """Run tests in a process with the trap; returns how many instructions of each kind it computed."""
    command = [sys.executable, "-m", "tests.grit_kernels.amx_trap", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode and (
        reason := re.search(r"RuntimeError: (CPUID cannot .*|a trap for AMX needs .*)", run.stdout + run.stderr)
    ):
        pytest.skip(reason[1])
    assert run.returncode == 0, run.stdout + run.stderr
    counts = re.search(r"amx_trap: {(.*)}", run.stdout)
    assert counts is not None and "skipped" not in run.stdout, run.stdout
    return {kind: int(count) for kind, count in re.findall(r"'(\w+)': (\d+)", counts[1])}


@needs_source_tree
@needs_trap
def test_the_compiled_instructions_give_the_bits_of_the_emulation() -> None:
    counts = run_trapped(__file__, "-k", "emulation and not compiled")
    assert counts["configure"] == counts["release"] > 0  # no thread keeps tiles, nor its next context switch their 8 KB
    assert min(counts[kind] for kind in ("zero", "load", "store", "product")) > 1000


@needs_source_tree
@needs_trap
@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "no room for its tiles"), (errno.EINVAL, "Linux 5.16")])
def test_a_kernel_that_refuses_tiles_leaves_the_next_set(tmp_path: Path, number: int, words: str) -> None:
    script = """if True:
        import ctypes, torch
        if ctypes.CDLL(None).grit_trap_show_amx(1):
            raise SystemExit(77)
        from grit_kernels import _library
        print(_library.cpu_isas()[0], _library.cpu_choice().amx_reason)
    """
    environment = {**amx_trap.environment(amx_trap.build(tmp_path)), "GRIT_TRAP_REFUSAL": str(number)}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip("CPUID cannot be made to fault on this machine")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{ISAS[0]} the CPU has AMX, but ") and words in run.stdout


@needs_source_tree
@needs_trap
@pytest.mark.slow
def test_every_test_of_the_cpu_kernels_passes_with_the_compiled_instructions() -> None:
    folder = "tests/grit_kernels"
    files = [
        f"{folder}/attention/test_{name}.py"
        for name in ("cpu_kernels", "cpu_pages", "decode", "far_rows", "key_ranges", "sinks")
    ]
    others = ("contrastive", "linear_cross_entropy", "test_fuzz.py", "test_gradient_rounding.py", "test_library.py")
    counts = run_trapped(*files, *(f"{folder}/{name}" for name in others))
    assert counts["configure"] == counts["release"] > 1000 and counts["product"] > 1e6
