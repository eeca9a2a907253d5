"""The pytest-benchmark file collects, and times a tiny problem."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from bench import test_microbenchmarks as micro
from bench.attention import decode, mixed
from bench.common import ROOT


def test_every_problem_and_variant_is_collected() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "--benchmark-only"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("test_attention[dense causal N1024 D64-grit]", "test_contrastive[eager-backward]", "slice mean"):
        assert name in run.stdout


@pytest.mark.parametrize("name", ["grit", "sdpa loop", "flash-attn"])
def test_a_problem_is_checked_and_timed(benchmark: Any, name: str) -> None:
    regime = mixed("tiny", 64, 0.5, (2, 1, 32), scale=0.02)
    if name == "flash-attn":
        with pytest.raises(pytest.skip.Exception, match="flash-attn does not support"):
            micro.time_attention(benchmark, regime, name)
        benchmark.disabled = True
        benchmark(lambda: None)
        return
    benchmark._max_time, benchmark._min_rounds = 0.01, 1
    micro.time_attention(benchmark, regime, name)
    assert benchmark.group == "tiny" and benchmark.extra_info["pairs"] == regime.pairs()
    assert benchmark.disabled or benchmark.extra_info["tflops"] > 0  # disabled where tests run side by side


def test_a_wrong_variant_is_not_timed(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = micro.PEERS["sdpa loop"]

    def wrong(problem: Any) -> Any:
        run = right(problem)
        return lambda: 2 * run()

    monkeypatch.setitem(micro.PEERS, "sdpa loop", wrong)
    with pytest.raises(RuntimeError, match="sdpa loop on tiny: relative error"):
        micro.time_attention(benchmark, decode("tiny", 2, 40, (2, 1, 32)), "sdpa loop")
    benchmark.disabled = True
    benchmark(lambda: None)
