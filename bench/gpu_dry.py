"""Commands of `python -m bench.gpu --dry-run`: tiny benchmarks on the CPU, with the failures that a GPU run must survive.

    python -m bench.gpu_dry attention --device cpu --record FILE ..       # any module of bench with its arguments

Injected, and expected at the end: a peer that computes something else, one that raises, a regime in which this package raises,
one that hangs, an installation that fails, failing tests, a benchmark that crashes, one that is stopped at its limit.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench import attention, attention_peers, common, gpu_verdict
from bench.attention import Regime

HANGS, RAISES = "dense causal N4096 D128", "window 1024 bidirectional"
"""Regimes of the dry run that hang and in which this package raises; the names are those of step 1."""
RED = "tests/test_x.py::test_a_kernel[0]"
"""The test that fails."""


FAILED, HUNG = "failed with status 1", "hung"
OUTCOMES = {
    **dict.fromkeys(("install", "build_cuda", "cuda_twin_cuda", "tests", "generative_loss_cuda"), FAILED),
    **dict.fromkeys(("hopper_tests", "attention_hopper_cuda"), FAILED),
    **dict.fromkeys(("compile_first", "compile_tests", "compile_rest", "compile_tuning"), FAILED),
    **dict.fromkeys(("attention_tune_cuda", "attention_tune_all_cuda"), HUNG),
}
"""Of the tasks that are not "ok"."""


def surprises(tasks: Mapping[str, Mapping[str, Any]], records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is not as injected: outcomes of tasks that began, records without rows, rows without what was injected."""
    found = []
    begun = {name: task for name, task in tasks.items() if task["tries"]}
    for name, task in begun.items():
        expected = OUTCOMES.get(name, "ok")
        if task["outcome"] != expected:
            found.append(f"{name}: expected {expected!r}, got {task['outcome']!r}")
        if expected != FAILED and not records.get(name, {}).get("rows"):
            found.append(f"{name}: expected rows, got none")
    if not found and "attention_cuda" in begun and "tests" in begun:
        against = gpu_verdict.wrong(tasks, records)
        for text in (f"{HANGS}, grit: {attention.BEGAN_TWICE}", f"{RAISES}, grit: RuntimeError", f"{RED} failed"):
            if not any(line.startswith(text) for line in against):
                found.append(f"verdict: expected {text!r}, got {against}")
    return found


def regimes() -> list[Regime]:
    shape = (2, 1, 32)
    found = [attention.mixed(name, 96, 0.5, shape, 0.02) for name in ("mixed 50% causal", HANGS, RAISES)]
    found.append(attention.mixed("dense bidirectional N4096 D128", 96, 0.0, shape, 0.02))
    return [*found, attention.decode("decode B2", 2, 40, shape)]


def broken(regime: str, what: Callable[[], None]) -> Callable[[Any], Any]:
    """This package, except in one regime."""

    def build(problem: attention_peers.Problem) -> attention_peers.Run:
        if problem.regime.name == regime:
            what()
        return attention_peers.grit(problem)

    return build


def inject() -> None:
    """Make everything tiny, and make peers and regimes fail."""

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def ours(problem: attention_peers.Problem) -> attention_peers.Run:
        broken(HANGS, lambda: time.sleep(3600))(problem)
        return broken(RAISES, fail)(problem)

    def differing(problem: attention_peers.Problem) -> attention_peers.Run:
        return lambda: 1.5 * attention_peers.grit(problem)()

    def raising(problem: attention_peers.Problem) -> attention_peers.Run:
        raise ValueError("injected: a peer without a kernel for this shape")

    attention.cpu_regimes = regimes
    attention_peers.PEERS |= {"grit": ours, "torch varlen": differing, "flex": raising}
    common.GEMM_SIZE["cpu"] = 64
    copy, read, fresh = common.copy_ceiling, common.read_ceiling, common.fresh_read_ceiling
    common.copy_ceiling = lambda device, megabytes=None: copy(device, 1)
    common.read_ceiling = lambda device, megabytes=None: read(device, 1)
    common.fresh_read_ceiling = lambda size: fresh(size, pool_megabytes=1)
    torch.compile = lambda function: function


def shrink(name: str, module: Any) -> None:
    """Fewer and smaller problems, and no separate process to measure memory."""
    if name in ("pooling", "contrastive"):
        module.shapes = lambda device: [(64, 64, 4)]
    if name == "contrastive":
        module.once = lambda *_: {}
    if name == "correctness":
        everything = module.problems
        module.problems = lambda scale=1.0: everything(0.02)[:2]
    if name == "launches":
        group = functools.partial(module.record_pooling, [(64, 64, 4)])
        module.GROUPS = dict.fromkeys(module.GROUPS, group)
        module.compile_all = lambda found, jobs: ["pool_fwd_kernel: PTXASError: injected"]
    if name == "generative_loss":
        raise RuntimeError("injected: a benchmark that crashes")


def red_tests() -> None:
    """What pytest prints when a test fails."""
    print(f"FAILED {RED} - AssertionError: out: error 0.3, allowed 0.01\n1 failed, 2 passed in 3s")
    raise SystemExit(1)


def broken_install() -> None:
    raise SystemExit("nvcc fatal: injected")


def slow_rows() -> None:
    """One row, then nothing until the limit."""
    row = {"kernel": "forward", "dim": 64, "mode": "causal", "config": "1x1x1x1", "ms": 1.0, "of_gemm": 0.5}
    common.write_records(sys.argv[sys.argv.index("--record") + 1], [row])
    time.sleep(3600)


def main() -> None:
    name, *rest = sys.argv[1:]
    injected = {"red_tests": red_tests, "broken_install": broken_install, "slow_rows": slow_rows}
    if name in injected:
        return injected[name]()
    inject()
    if name == "correctness":
        rest += ["--repeats", "2"]
    module = importlib.import_module(f"bench.{name}")
    shrink(name, module)
    sys.argv = [f"bench.{name}", *rest]
    module.main()


if __name__ == "__main__":
    main()
