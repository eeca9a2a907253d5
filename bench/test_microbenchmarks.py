"""The microbenchmarks for pytest-benchmark: one test per problem and variant, grouped by problem.

    python -m pytest bench --benchmark-only -k "decode and grit"
    python -m pytest bench --benchmark-only --benchmark-save mine      # later: --benchmark-compare

For looking closely at one kernel and comparing two commits. It runs a variant to its end before the next begins, so on a machine
that drifts its ratios drift, too: the committed ratios come from ``python -m bench``, which takes turns. A CUDA device is used
where there is one. No time is asserted; a variant's result is compared with this package's before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grit_kernels as gk
from bench import attention, contrastive, generative_loss, pooling
from bench.attention_peers import NOT_ATTENTION, PEERS, Problem, Regime
from bench.common import synchronizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REGIMES = attention.gpu_regimes() if DEVICE == "cuda" else attention.cpu_regimes()
CONTRASTIVE = (2048, 4096, 4096) if DEVICE == "cuda" else (1024, 2048, 1024)
GENERATIVE = (8192, 4096, 32000) if DEVICE == "cuda" else (512, 576, 49152)


def timed(benchmark: Any, group: str, run: Callable[[], Any], **facts: Any) -> None:
    """Time ``run`` until the device has done it."""
    wait = synchronizer(DEVICE)

    def whole() -> None:
        run()
        wait()

    benchmark.group = group
    benchmark.extra_info.update({"device": DEVICE, **facts})
    whole()
    benchmark(whole)
    if benchmark.stats is not None and "flops" in facts:
        benchmark.extra_info["tflops"] = facts["flops"] / benchmark.stats.stats.median / 1e12


def time_attention(benchmark: Any, regime: Regime, name: str) -> None:
    """One regime by one peer."""
    torch.manual_seed(0)
    problem = Problem(regime, DEVICE)
    ours = next(iter(PEERS))
    with torch.set_grad_enabled(regime.backward):
        runs = attention.variants(problem, list(dict.fromkeys([ours, name])))
        if name not in runs:
            pytest.skip(f"{name} does not support this problem here {problem.failures.get(name, '')}")
        facts = {"flops": regime.flops(), "pairs": regime.pairs(), "tokens": sum(regime.k_lens)}
        timed(benchmark, regime.name, runs[name], **({} if name in NOT_ATTENTION else facts))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_attention(benchmark: Any, regime: Regime, name: str) -> None:
    time_attention(benchmark, regime, name)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", contrastive.variants(DEVICE))
def test_contrastive(benchmark: Any, name: str, backward: bool) -> None:
    torch.manual_seed(0)
    given = contrastive.inputs(DEVICE, CONTRASTIVE, torch.bfloat16)
    run = contrastive.variants(DEVICE)[name]
    loss = run(*given)
    torch.testing.assert_close(loss.float(), contrastive.ours(*given), rtol=0.05, atol=0.05)
    flops = 2.0 * CONTRASTIVE[0] * CONTRASTIVE[1] * CONTRASTIVE[2] * (2 if backward else 1)
    if backward:
        timed(
            benchmark,
            "contrastive backward",
            lambda: torch.autograd.grad(loss, given[:2], retain_graph=True),
            flops=flops,
        )
    else:
        timed(benchmark, "contrastive forward", lambda: run(*given), flops=flops)


@pytest.mark.parametrize("name", generative_loss.variants(DEVICE))
def test_generative_loss(benchmark: Any, name: str) -> None:
    torch.manual_seed(0)
    given = generative_loss.inputs(DEVICE, GENERATIVE, torch.bfloat16)
    run = generative_loss.variants(DEVICE)[name]
    losses = generative_loss.step(run, given)
    torch.testing.assert_close(losses.float(), gk.linear_cross_entropy(*given).detach(), rtol=0.05, atol=0.05)
    flops = 6.0 * GENERATIVE[0] * GENERATIVE[1] * GENERATIVE[2]
    group = "next-token loss, forward and backward"
    timed(benchmark, group, lambda: generative_loss.step(run, given), flops=flops, tokens=GENERATIVE[0])


@pytest.mark.parametrize("name", ["grit_kernels", "grit_kernels, fused norm", "slice mean"])
@pytest.mark.parametrize("samples", [4, 64])
def test_pooling(benchmark: Any, samples: int, name: str) -> None:
    torch.manual_seed(0)
    rows, hidden = 8192, 4096
    length = rows // samples
    states = torch.randn(rows, hidden, device=DEVICE, dtype=torch.bfloat16)
    cu_seqlens = torch.arange(0, rows + 1, length, dtype=torch.int32, device=DEVICE)
    skips = torch.full((samples,), 8, dtype=torch.int32, device=DEVICE)
    norm = torch.ones(hidden, device=DEVICE, dtype=torch.bfloat16) if "norm" in name else None

    def ours() -> torch.Tensor:
        return gk.pool(states, cu_seqlens=cu_seqlens, instruction_lens=skips, norm_weight=norm)

    def slices() -> torch.Tensor:
        return pooling.slice_mean(states, cu_seqlens.tolist(), [8] * samples)

    run = slices if name == "slice mean" else ours
    if norm is not None:
        wanted = pooling.slice_mean(F.rms_norm(states.float(), (hidden,), eps=1e-6), cu_seqlens.tolist(), [8] * samples)
    else:
        wanted = slices() if run is ours else ours()
    torch.testing.assert_close(run().float(), wanted, rtol=0.05, atol=0.01)
    read = states.numel() * states.element_size() * (length - 8) // length
    timed(benchmark, f"pooling, {samples} samples", run, bytes=read)
