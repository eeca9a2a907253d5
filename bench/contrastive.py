"""Contrastive loss: time and memory of gk.contrastive_loss against eager PyTorch, torch.compile and, where installed, inf-cl.

"eager" multiplies in the inputs' dtype, "eager, FP32 scores" as precisely as gk.contrastive_loss does. `forward` runs without
gradients, `step` is forward and backward, `backward` the difference; rates count one product for the forward and three for the
step. Loss and memory come from a step in a process of its own: the loss beside that of a chunked float64 oracle of the same
inputs, and the growth of the peak, resident set on the CPU and allocated bytes on a GPU.

    python -m bench.contrastive [--device cuda] [--repeats 7] [--threads 1] [--record contrastive_cpu.json]
                                [--plot contrastive_cpu.png] [--large]
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from bench.common import (
    gemm_ceiling,
    interleave,
    kernel_parser,
    measure_shapes,
    medians,
    ratios,
    synchronizer,
    table,
    write_records,
)
from bench.memory import growth

COLUMNS = [
    "variant", "dtype", "queries", "passages", "width", "forward_ms", "backward_ms", "step_ms", "forward_tflops",
    "step_tflops", "forward_speedup", "backward_speedup", "step_speedup", "memory_mb", "mean_loss", "relative_difference",
]  # fmt: skip
LARGE = (65536, 131072, 64)
TEMPERATURE = 0.02


def eager(q: Tensor, p: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((q @ p.T).float() / TEMPERATURE, targets)


def eager_fp32(q: Tensor, p: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(q.float() @ p.float().T / TEMPERATURE, targets)


def ours(q: Tensor, p: Tensor, targets: Tensor) -> Tensor:
    return gk.contrastive_loss(q, p, temperature=TEMPERATURE, targets=targets)


def variants(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    found = {
        "grit_kernels": ours,
        "eager": eager,
        "eager, FP32 scores": eager_fp32,
        "torch.compile": torch.compile(eager),
    }
    if device == "cuda" and importlib.util.find_spec("inf_cl") is not None:
        from inf_cl import cal_flash_loss

        found["inf-cl"] = lambda q, p, targets: cal_flash_loss(
            q, p, targets, torch.tensor(1 / TEMPERATURE, device=device)
        )
    return found


def shapes(device: str) -> list[tuple[int, int, int]]:
    """Queries, passages, width."""
    return [(4096, 4096, 1024)] if device == "cpu" else [(2048, 4096, 4096), (32768, 65536, 4096)]


def inputs(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    count, candidates, width = shape
    q, p = (
        F.normalize(torch.randn(n, width, device=device), dim=-1).to(dtype).requires_grad_()
        for n in (count, candidates)
    )
    return q, p, torch.arange(count, device=device) * (candidates // count)


def oracle(q: Tensor, p: Tensor, targets: Tensor) -> float:
    """The loss in float64 from the same inputs, some queries at a time."""
    wide, total = p.detach().double(), 0.0
    for rows, wanted in zip(q.detach().split(512), targets.split(512), strict=True):
        scores = rows.double() @ wide.T / TEMPERATURE
        total += F.cross_entropy(scores, wanted, reduction="sum").item()
    return total / q.shape[0]


def once(name: str, device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """A step in a fresh process: its loss and the oracle's, growth of the peak, milliseconds; empty if it failed."""
    code = f"from bench.contrastive import _once; _once({name!r}, {device!r}, {shape!r}, {str(dtype)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {}


def _once(name: str, device: str, shape: tuple[int, int, int], dtype: str) -> None:
    kind = getattr(torch, dtype.removeprefix("torch."))
    torch.manual_seed(0)
    run = variants(device)[name]
    small = inputs(device, (64, 64, shape[2]), kind)
    torch.autograd.grad(run(*small), small[:2])  # load libraries and compile before the first reading
    given, wait = inputs(device, shape, kind), synchronizer(device)
    peak = growth(device)
    start = time.perf_counter()
    with torch.no_grad():
        run(*given)
    wait()
    middle = time.perf_counter()
    loss = run(*given)
    torch.autograd.grad(loss, given[:2])
    wait()
    end = time.perf_counter()
    memory, truth = peak(), oracle(*given)
    found = {"memory_mb": memory, "mean_loss": loss.item(), "oracle_loss": truth}
    found["relative_difference"] = abs(loss.item() - truth) / truth
    print(json.dumps(found | {"once_forward_ms": (middle - start) * 1e3, "once_step_ms": (end - middle) * 1e3}))


def large(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One step at a size whose scores do not fit (34 GB in FP32)."""
    found: dict[str, Any] = once("grit_kernels", device, LARGE, dtype)
    row: dict[str, Any] = {"variant": "grit_kernels", "dtype": str(dtype).removeprefix("torch.")}
    row |= dict(zip(("queries", "passages", "width"), LARGE, strict=True))
    forward, step = found.pop("once_forward_ms"), found.pop("once_step_ms")
    work = 2.0 * LARGE[0] * LARGE[1] * LARGE[2]
    times = {"forward_ms": forward, "backward_ms": step - forward, "step_ms": step}
    rates = {"forward_tflops": work / forward / 1e9, "step_tflops": 3 * work / step / 1e9}
    return row | times | rates | found


def measure(device: str, shape: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    given = inputs(device, shape, dtype)
    gemm, flops = gemm_ceiling(device, dtype)
    calls: dict[str, Callable[[], Any]] = {"gemm": gemm}
    names = list(variants(device))
    for name, run in variants(device).items():
        calls[f"{name} forward"] = torch.no_grad()(lambda run=run: run(*given))
        calls[f"{name} step"] = lambda run=run: torch.autograd.grad(run(*given), given[:2])
    seconds = interleave(calls, repeats, synchronizer(device), warmup=1)
    for name in names:
        parts = zip(seconds[f"{name} step"], seconds[f"{name} forward"], strict=True)
        seconds[f"{name} backward"] = [step - forward for step, forward in parts]
    middle = medians(seconds)
    work = 2.0 * shape[0] * shape[1] * shape[2]
    rows: list[dict[str, Any]] = [
        {"variant": "gemm", "dtype": str(dtype).removeprefix("torch."), "forward_ms": middle["gemm"] * 1e3,
         "forward_tflops": flops / middle["gemm"] / 1e12, "seconds": seconds["gemm"]}
    ]  # fmt: skip
    speedups = {
        part: ratios({n: seconds[f"{n} {part}"] for n in names}, "grit_kernels")
        for part in ("forward", "backward", "step")
    }
    for name in names:
        row: dict[str, Any] = {"variant": name, "dtype": str(dtype).removeprefix("torch.")}
        row |= dict(zip(("queries", "passages", "width"), shape, strict=True))
        row |= {f"{part}_ms": middle[f"{name} {part}"] * 1e3 for part in speedups}
        row |= {
            "forward_tflops": work / middle[f"{name} forward"] / 1e12,
            "step_tflops": 3 * work / middle[f"{name} step"] / 1e12,
            **{f"{part}_speedup": speedup[name] for part, speedup in speedups.items()},
        }
        row |= {k: v for k, v in once(name, device, shape, dtype).items() if not k.startswith("once")}
        row["seconds"] = seconds[f"{name} step"]
        row["forward_seconds"] = seconds[f"{name} forward"]
        rows.append(row)
    return rows


def main() -> None:
    parser = kernel_parser(__doc__, repeats=7)
    parser.add_argument("--large", action="store_true", help="add a step at a size whose scores do not fit into memory")
    options = parser.parse_args()
    rows = measure_shapes(options, shapes(options.device), measure)
    if options.large:
        rows.append(large(options.device, torch.bfloat16))
        if options.record:
            write_records(options.record, rows)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
