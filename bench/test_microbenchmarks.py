"""The microbenchmarks for pytest-benchmark: one test per problem and peer, grouped by op and shape.

    python -m pytest bench --benchmark-only -k "decode and grit"
    python -m pytest bench --benchmark-only --benchmark-save mine      # later: --benchmark-compare

Meant for a close look at one kernel and for comparing two commits. Each peer runs to its end before the next begins, so on a
machine that drifts, the ratios drift as well: committed ratios come from ``python -m bench``, where variants take turns. A CUDA
device is used if there is one. No time is asserted; a peer's result is compared with this package's before it is timed, and
what a peer does not support or this machine does not have is skipped with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grit_kernels as gk
from bench import attention, contrastive, generative_loss, pooling
from bench.attention_peers import DIFFERS, NOT_ATTENTION, PACKAGES, PEERS, Problem, Regime
from bench.common import synchronizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REGIMES = attention.gpu_regimes() if DEVICE == "cuda" else attention.cpu_regimes()
CONTRASTIVE = (2048, 4096, 4096) if DEVICE == "cuda" else (1024, 2048, 1024)
GENERATIVE = (8192, 4096, 32000) if DEVICE == "cuda" else (512, 576, 49152)
FUSED = (16384, 4096) if DEVICE == "cuda" else (2048, 1024)
DTYPE = torch.bfloat16


def timed(benchmark: Any, op: str, shape: str, peer: str, run: Callable[[], Any], **facts: Any) -> None:
    """Time ``run`` until the device is done; all peers of an op and shape form one group of the table."""
    wait = synchronizer(DEVICE)

    def whole() -> None:
        run()
        wait()

    benchmark.group = f"{op}: {shape}"
    benchmark.extra_info.update({"device": DEVICE, "op": op, "shape": shape, "peer": peer, **facts})
    whole()
    benchmark(whole)
    if benchmark.stats is not None and "flops" in facts:
        benchmark.extra_info["tflops"] = facts["flops"] / benchmark.stats.stats.median / 1e12


def compiled_or_skipped(name: str, run: Callable[[], Any]) -> Any:
    """What ``run`` returns; a peer that torch cannot compile here is skipped: its CPU backend needs a C++ compiler."""
    if "compile" not in name:
        return run()
    try:
        return run()
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"{name} does not compile here: {attention.reason(error)}")


def attention_shape(regime: Regime) -> str:
    heads = f"{regime.heads}/{regime.heads_kv} heads of {regime.dim}"
    dtype = str(regime.dtype).removeprefix("torch.")
    return f"{regime.name}, {len(regime.q_lens)} samples, {sum(regime.k_lens)} tokens, {heads}, {dtype}"


def time_attention(benchmark: Any, regime: Regime, name: str) -> None:
    """One regime by one peer."""
    torch.manual_seed(0)
    problem = Problem(regime, DEVICE)
    ours = next(iter(PEERS))
    with torch.set_grad_enabled(regime.backward):
        runs = attention.variants(problem, list(dict.fromkeys([ours, name])))
        if name not in runs:
            why = problem.failures.get(name, "")
            if why.startswith(DIFFERS):
                pytest.fail(f"{name} {why}", pytrace=False)
            if importlib.util.find_spec(PACKAGES.get(name, "torch")) is None:
                why = f"({PACKAGES[name]} is not installed)"
            pytest.skip(f"{name} does not support this problem here {why}".rstrip())
        facts = {"flops": regime.flops(), "pairs": regime.pairs(), "tokens": sum(regime.k_lens)}
        op = "attention backward" if regime.backward else "attention"
        shape = attention_shape(regime)
        timed(benchmark, op, shape, name, runs[name], **({} if name in NOT_ATTENTION else facts))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_attention(benchmark: Any, regime: Regime, name: str) -> None:
    time_attention(benchmark, regime, name)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", contrastive.variants(DEVICE))
def test_contrastive(benchmark: Any, name: str, backward: bool) -> None:
    torch.manual_seed(0)
    given = contrastive.inputs(DEVICE, CONTRASTIVE, DTYPE)
    run = contrastive.variants(DEVICE)[name]
    loss = compiled_or_skipped(name, lambda: run(*given))
    torch.testing.assert_close(loss.float(), contrastive.ours(*given), rtol=0.05, atol=0.05)
    flops = 2.0 * CONTRASTIVE[0] * CONTRASTIVE[1] * CONTRASTIVE[2] * (2 if backward else 1)

    def call() -> Any:
        return torch.autograd.grad(loss, given[:2], retain_graph=True) if backward else run(*given)

    shape = "{} queries x {} passages of {}, bfloat16".format(*CONTRASTIVE)
    timed(benchmark, f"contrastive {'backward' if backward else 'forward'}", shape, name, call, flops=flops)


@pytest.mark.parametrize("name", generative_loss.variants(DEVICE))
def test_generative_loss(benchmark: Any, name: str) -> None:
    torch.manual_seed(0)
    given = generative_loss.inputs(DEVICE, GENERATIVE, DTYPE)
    run = generative_loss.variants(DEVICE)[name]
    losses = compiled_or_skipped(name, lambda: generative_loss.step(run, given))
    torch.testing.assert_close(losses.float(), gk.linear_cross_entropy(*given).detach(), rtol=0.05, atol=0.05)
    flops = 6.0 * GENERATIVE[0] * GENERATIVE[1] * GENERATIVE[2]
    shape = "{} tokens of {}, {} words, bfloat16".format(*GENERATIVE)
    op = "next-token loss, forward and backward"
    timed(benchmark, op, shape, name, lambda: generative_loss.step(run, given), flops=flops, tokens=GENERATIVE[0])


@pytest.mark.parametrize("name", pooling.NAMES)
@pytest.mark.parametrize("samples", [4, 64])
def test_pooling(benchmark: Any, samples: int, name: str) -> None:
    torch.manual_seed(0)
    shape = (8192, 4096, samples)
    runs = pooling.variants(DEVICE, shape, DTYPE)
    result = compiled_or_skipped(name, runs[name])
    if "norm" not in name:
        torch.testing.assert_close(result.float(), runs[pooling.NAMES[0]]().float(), rtol=0.05, atol=0.01)
    elif not name.endswith("backward"):
        with gk.backend("reference"):
            torch.testing.assert_close(result, runs[name](), rtol=0.05, atol=0.01)
    op = "pooling with RMSNorm" + ", backward" * name.endswith("backward") if "norm" in name else "pooling"
    text = "{} tokens of {}, {} samples, bfloat16".format(*shape)
    timed(benchmark, op, text, name, runs[name], bytes=pooling.pooled_bytes(shape, DTYPE))


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x + residual, weight.shape, weight, 1e-6)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def fused_peers() -> dict[str, dict[str, Callable[..., torch.Tensor]]]:
    """Per op: who computes it, this package first. Liger's kernels are Triton's, so they need a GPU."""
    found: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
        "residual and RMSNorm": {
            "grit_kernels": lambda x, y, weight: gk.rms_norm(x, weight, residual=y)[0],
            "eager": add_rms_norm,
            "torch.compile": torch.compile(add_rms_norm),
        },
        "SiLU gate": {
            "grit_kernels": lambda x, y, weight: gk.silu_mul(x, y),
            "eager": lambda x, y, weight: silu_mul(x, y),
            "torch.compile": (lambda run: lambda x, y, weight: run(x, y))(torch.compile(silu_mul)),
        },
    }
    if DEVICE == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        found["residual and RMSNorm"]["liger"] = lambda x, y, weight: LigerRMSNormFunction.apply(x + y, weight, 1e-6)
        found["SiLU gate"]["liger"] = lambda x, y, weight: LigerSiLUMulFunction.apply(x, y)
    return found


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, peers in fused_peers().items() for name in peers])
def test_fused(benchmark: Any, op: str, name: str) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(FUSED, device=DEVICE, dtype=DTYPE) for _ in range(2))
    weight = torch.rand(FUSED[1], device=DEVICE, dtype=DTYPE)
    peers = fused_peers()[op]
    result = compiled_or_skipped(name, lambda: peers[name](x, y, weight))
    torch.testing.assert_close(result, peers["grit_kernels"](x, y, weight), rtol=0.05, atol=0.05)
    shape = "{} tokens of {}, bfloat16".format(*FUSED)
    timed(benchmark, op, shape, name, lambda: peers[name](x, y, weight), tokens=FUSED[0])
