"""The pytest-benchmark file collects, and times a tiny problem."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import test_microbenchmarks as micro
from bench.attention import decode, mixed
from bench.common import ROOT


def test_every_problem_and_variant_is_collected() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "--benchmark-only"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in (
        *("test_attention[dense causal N1024 D64-grit]", "test_attention[dense causal N1024 D64-flash-attn]"),
        *("test_contrastive[eager-backward]", "slice mean", "test_fused[SiLU gate-torch.compile]"),
    ):
        assert name in run.stdout


@pytest.mark.parametrize("name", ["grit", "sdpa loop", "flash-attn"])
def test_a_problem_is_checked_and_timed(benchmark: Any, name: str) -> None:
    regime = mixed("tiny", 64, 0.5, (2, 1, 32), scale=0.02)
    if name == "flash-attn":
        with pytest.raises(pytest.skip.Exception, match=r"flash-attn does not support .* \(.+\)"):
            micro.time_attention(benchmark, regime, name)
        benchmark.disabled = True
        benchmark(lambda: None)
        return
    benchmark._max_time, benchmark._min_rounds = 0.01, 1
    micro.time_attention(benchmark, regime, name)
    assert benchmark.group == "attention: tiny, 3 samples, 68 tokens, 2/1 heads of 32, bfloat16"
    assert benchmark.extra_info["peer"] == name and benchmark.extra_info["pairs"] == regime.pairs()
    assert benchmark.disabled or benchmark.extra_info["tflops"] > 0  # disabled where tests run side by side


def test_a_wrong_variant_is_not_timed(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = micro.PEERS["sdpa loop"]

    def wrong(problem: Any) -> Any:
        run = right(problem)
        return lambda: 2 * run()

    monkeypatch.setitem(micro.PEERS, "sdpa loop", wrong)
    with pytest.raises(pytest.fail.Exception, match="sdpa loop differs from grit: relative error 1"):
        micro.time_attention(benchmark, decode("tiny", 2, 40, (2, 1, 32)), "sdpa loop")
    benchmark.disabled = True
    benchmark(lambda: None)


def test_a_peer_that_torch_cannot_compile_here_is_skipped_and_other_errors_are_not() -> None:
    def broken() -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no C++ compiler"), None)

    with pytest.raises(pytest.skip.Exception, match="torch.compile does not compile here"):
        micro.compiled_or_skipped("torch.compile", broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        micro.compiled_or_skipped("eager", broken)


@pytest.mark.slow
def test_a_run_is_saved_and_the_next_is_compared_with_it(tmp_path: Path) -> None:
    """As docs/benchmarks.md says, on the smallest group."""
    base = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--benchmark-storage", str(tmp_path), "-q"]
    base += ["-p", "no:cacheprovider", "--benchmark-max-time", "0.01", "--benchmark-min-rounds", "1"]
    base += ["-k", "test_fused and eager and gate"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    for more in (["--benchmark-save", "mine"], ["--benchmark-compare", "0001_mine"]):
        run = subprocess.run([*base, *more], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    assert "SiLU gate: 2048 tokens of 1024, bfloat16" in run.stdout
    assert "0001_mine" in run.stdout and "NOW" in run.stdout
