"""Per-token generative loss: gk.linear_cross_entropy against eager, torch's own and, where installed, Liger and CCE.

Forward and backward of hidden and weight; memory is the growth of the peak in a process of its own.

    python -m bench.generative_loss [--device cuda] [--repeats 7] [--threads 1] [--record generative_loss_cpu.json]
                                    [--plot generative_loss_cpu.png]
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from bench.common import gemm_ceiling, interleave, kernel_parser, measure_shapes, medians, ratios, synchronizer, table
from bench.memory import growth

COLUMNS = ["variant", "dtype", "tokens", "hidden", "vocabulary", "milliseconds", "speedup", "error", "memory_mb"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


def variants(device: str) -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "grit_kernels": gk.linear_cross_entropy,
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="none")
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="none")
        found["liger"] = lambda h, w, t: liger(w, h, t)
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy as cut

        # its own kernels need Triton; on the CPU it has a compiled product with all logits
        impl = "cce" if device == "cuda" else "torch_compile"
        found["cut-cross-entropy"] = lambda h, w, t: cut(h, w, t, reduction="none", impl=impl)
    return found


def inputs(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width, vocabulary = shape
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), device=device)


def step(run: Loss, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    losses = run(*given)
    torch.autograd.grad(losses.float().sum(), given[:2])
    return losses.detach()


def memory(name: str, device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> float | None:
    code = f"from bench.generative_loss import once; once({name!r}, {device!r}, {shape!r}, {str(dtype)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return None if run.returncode else float(run.stdout.split()[-1])


def once(name: str, device: str, shape: tuple[int, int, int], dtype: str) -> None:
    kind = getattr(torch, dtype.removeprefix("torch."))
    step(variants(device)[name], inputs(device, (16, shape[1], 64), kind))
    given = inputs(device, shape, kind)
    peak = growth(device)
    step(variants(device)[name], given)
    print(peak())


def measure(device: str, shape: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    given = inputs(device, shape, dtype)
    few = given[0][:256].detach().double() @ given[1].detach().double().T
    truth = F.cross_entropy(few, given[2][:256], reduction="none")
    found = variants(device)
    calls: dict[str, Callable[[], Any]] = {n: (lambda run=run: step(run, given)) for n, run in found.items()}
    gemm, flops = gemm_ceiling(device, dtype)
    seconds = interleave({"gemm": gemm, **calls}, repeats, synchronizer(device), warmup=1)
    middle, relative = medians(seconds), ratios(seconds, "grit_kernels")
    names = dict(zip(("tokens", "hidden", "vocabulary"), shape, strict=True))
    rows: list[dict[str, Any]] = []
    for name, time in middle.items():
        row = {"variant": name, "dtype": str(dtype).removeprefix("torch."), "milliseconds": time * 1e3}
        row |= {"speedup": relative[name], "seconds": seconds[name], **names}
        if name == "gemm":
            row["tflops"] = flops / time / 1e12
        else:
            row["error"] = (found[name](*given)[:256].double() - truth).abs().max().item()
            row["memory_mb"] = memory(name, device, shape, dtype)
        rows.append(row)
    return rows


def main() -> None:
    options = kernel_parser(__doc__, repeats=7).parse_args()
    shapes = [(1024, 576, 49152)] if options.device == "cpu" else [(8192, 4096, 32000), (8192, 4096, 128256)]
    rows = measure_shapes(options, shapes, measure)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
