"""Contrastive loss: time and memory of gk.contrastive_loss against eager PyTorch, torch.compile and, where installed, inf-cl.

"eager" multiplies in the inputs' dtype, "eager, FP32 scores" as precisely as gk.contrastive_loss does. Memory is the growth of
the peak in a process of its own: resident set on the CPU, allocated bytes on a GPU.

    python -m bench.contrastive [--device cuda] [--repeats 7] [--threads 1] [--record contrastive_cpu.json] [--large]
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from bench.common import gemm_ceiling, interleave, medians, ratios, synchronizer, table, write_records

COLUMNS = [
    "variant", "dtype", "queries", "passages", "width", "forward_ms", "backward_ms", "forward_tflops", "backward_tflops",
    "forward_speedup", "backward_speedup", "total_speedup", "memory_mb",
]  # fmt: skip
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


def inputs(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    count, candidates, width = shape
    q, p = (
        F.normalize(torch.randn(n, width, device=device), dim=-1).to(dtype).requires_grad_()
        for n in (count, candidates)
    )
    return q, p, torch.arange(count, device=device) * (candidates // count)


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(name: str, device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Growth of the peak and seconds of one forward and backward, run in a fresh process; empty when it failed."""
    code = f"from bench.contrastive import once; once({name!r}, {device!r}, {shape!r}, {str(dtype)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if run.returncode:
        return {}
    megabytes, forward, backward = map(float, run.stdout.split()[-3:])
    return {"memory_mb": megabytes, "once_forward_ms": forward * 1e3, "once_backward_ms": backward * 1e3}


def once(name: str, device: str, shape: tuple[int, int, int], dtype: str) -> None:
    kind = getattr(torch, dtype.removeprefix("torch."))
    run = variants(device)[name]
    small = inputs(device, (64, 64, shape[2]), kind)
    torch.autograd.grad(run(*small), small[:2])  # loads libraries and compiles before the first reading
    given = inputs(device, shape, kind)
    before, wait = peak(device), synchronizer(device)
    start = time.perf_counter()
    loss = run(*given)
    wait()
    middle = time.perf_counter()
    torch.autograd.grad(loss, given[:2])
    wait()
    print((peak(device) - before) / 2**20, middle - start, time.perf_counter() - middle)


def measure(device: str, shape: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    given = inputs(device, shape, dtype)
    gemm, flops = gemm_ceiling(device, dtype)
    calls: dict[str, Callable[[], Any]] = {"gemm": gemm}
    names = list(variants(device))
    for name, run in variants(device).items():
        loss = run(*given)
        calls[f"{name} forward"] = lambda run=run: run(*given)
        calls[f"{name} backward"] = lambda loss=loss: torch.autograd.grad(loss, given[:2], retain_graph=True)
    seconds = interleave(calls, repeats, synchronizer(device), warmup=1)
    middle = medians(seconds)
    totals = {n: [a + b for a, b in zip(seconds[f"{n} forward"], seconds[f"{n} backward"], strict=True)] for n in names}
    work = 2.0 * shape[0] * shape[1] * shape[2]
    rows: list[dict[str, Any]] = [
        {"variant": "gemm", "dtype": str(dtype).removeprefix("torch."), "forward_ms": middle["gemm"] * 1e3,
         "forward_tflops": flops / middle["gemm"] / 1e12, "seconds": seconds["gemm"]}
    ]  # fmt: skip
    forward, backward = (
        ratios({n: seconds[f"{n} {part}"] for n in names}, "grit_kernels") for part in ("forward", "backward")
    )
    total = ratios(totals, "grit_kernels")
    for name in names:
        # the backward's rate counts its two products, not a recomputed score
        rows.append(
            {
                "variant": name, "dtype": str(dtype).removeprefix("torch."), "queries": shape[0], "passages": shape[1],
                "width": shape[2], "forward_ms": middle[f"{name} forward"] * 1e3,
                "backward_ms": middle[f"{name} backward"] * 1e3,
                "forward_tflops": work / middle[f"{name} forward"] / 1e12,
                "backward_tflops": 2 * work / middle[f"{name} backward"] / 1e12,
                "forward_speedup": forward[name], "backward_speedup": backward[name], "total_speedup": total[name],
                "seconds": {part: seconds[f"{name} {part}"] for part in ("forward", "backward")},
                **memory(name, device, shape, dtype),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", help="file below bench/results")
    parser.add_argument("--large", action="store_true", help="one pass at sizes whose scores do not fit")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    shapes = [(4096, 4096, 1024)] if options.device == "cpu" else [(2048, 4096, 4096), (32768, 65536, 4096)]
    if options.large:
        large = (65536, 131072, 64)
        found = memory("grit_kernels", options.device, large, torch.bfloat16)
        found |= {"forward_ms": found.get("once_forward_ms", 0.0), "backward_ms": found.get("once_backward_ms", 0.0)}
        names = dict(zip(("queries", "passages", "width"), large, strict=True))
        rows.append({"variant": "grit_kernels", "dtype": "bfloat16", **names, **found})
        shapes = []
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            rows += measure(options.device, shape, dtype, options.repeats)
    print(table(rows, COLUMNS))
    if options.record:
        write_records(options.record, rows)


if __name__ == "__main__":
    main()
