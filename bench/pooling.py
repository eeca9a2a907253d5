"""Pooling: gk.pool against a mean per slice, a masked FP32 mean and torch.compile; rates next to the machine's read rate.

Every variant runs with the same threads on inputs that are not in the cache. The read rate is that of a sum over 256 MB (on a
GPU: of a copy). Memory is the growth of the peak during a call: its intermediate values and its result.

    python -m bench.pooling [--device cuda] [--repeats 11] [--threads 1] [--record pooling_cpu.json] [--plot pooling_cpu.png]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import grit_kernels as gk
from bench.common import (
    copy_ceiling,
    interleave,
    kernel_parser,
    measure_shapes,
    medians,
    ratios,
    read_ceiling,
    synchronizer,
    table,
)
from bench.memory import growth

COLUMNS = [
    "variant",
    "dtype",
    "tokens",
    "hidden",
    "samples",
    "milliseconds",
    "gigabytes_per_second",
    "of_ceiling",
    "speedup",
    "memory_mb",
]

NAMES = (
    *("grit_kernels", "grit_kernels, fused norm", "slice mean", "masked mean"),
    *("masked mean, torch.compile", "grit_kernels, fused norm, backward"),
)
"""The variants, this package first."""


def slice_mean(hidden: Tensor, starts: list[int], skips: list[int]) -> Tensor:
    """The obvious version: a mean per sample in a Python loop, in FP32."""
    rows = [hidden[a + s : b].float().mean(0) for a, b, s in zip(starts, starts[1:], skips, strict=False)]
    return torch.stack(rows)


def masked_mean(padded: Tensor, mask: Tensor) -> Tensor:
    """The public implementation's formula on a padded batch: an FP32 product of the size of the input."""
    weights = mask.unsqueeze(-1).float()
    return (padded * weights).sum(1) / weights.sum(1)


def shapes(device: str) -> list[tuple[int, int, int]]:
    """Tokens, hidden size, samples."""
    found = [(8192, 4096, 32), (8192, 4096, 4), (16384, 576, 64)]
    return [*found, (131072, 4096, 64)] if device == "cuda" else found


def pooled_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Bytes that :func:`variants` read at least."""
    tokens, hidden, samples = shape
    length = tokens // samples
    return (length - length // 8) * samples * hidden * dtype.itemsize


def variants(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Variants that pool ``shape`` = tokens, hidden, samples; an eighth of each sample is left out as its instruction."""
    tokens, hidden, samples = shape
    length = tokens // samples
    starts = [i * length for i in range(samples + 1)]
    skips = [length // 8] * samples
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    cu = torch.tensor(starts, dtype=torch.int32, device=device)
    skip = torch.tensor(skips, device=device)
    mask = torch.arange(length, device=device)[None].expand(samples, -1) >= skip[:, None]
    weight = torch.rand(hidden, device=device)
    leaf = x.clone().requires_grad_()
    loss = gk.pool(leaf, cu_seqlens=cu, instruction_lens=skip, norm_weight=weight).sum()
    compiled = torch.compile(masked_mean)
    return {
        "grit_kernels": lambda: gk.pool(x, cu_seqlens=cu, instruction_lens=skip),
        "grit_kernels, fused norm": lambda: gk.pool(x, cu_seqlens=cu, instruction_lens=skip, norm_weight=weight),
        "slice mean": lambda: slice_mean(x, starts, skips),
        "masked mean": lambda: masked_mean(x.view(samples, length, hidden), mask),
        "masked mean, torch.compile": lambda: compiled(x.view(samples, length, hidden), mask),
        "grit_kernels, fused norm, backward": lambda: torch.autograd.grad(loss, leaf, retain_graph=True),
    }


def measure(device: str, shape: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    tokens, hidden, samples = shape
    ceiling, moved = (copy_ceiling if device == "cuda" else read_ceiling)(device)
    runs = {"ceiling": ceiling, **variants(device, shape, dtype)}
    # the input may fit into the cache: without this, only the variant after the ceiling would read from memory
    evict, _ = read_ceiling(device, 256)
    seconds = interleave(runs, repeats, synchronizer(device), before=evict)
    middle, relative = medians(seconds), ratios(seconds, "grit_kernels")
    memory = {}
    for name, run in runs.items():
        peak = growth(device)
        run()
        memory[name] = peak()
    pooled = pooled_bytes(shape, dtype)
    rows = []
    for name, time in middle.items():
        bytes_moved = moved if name == "ceiling" else pooled * (2 if name.endswith("backward") else 1)
        rows.append(
            {
                "variant": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "hidden": hidden,
                "samples": samples, "milliseconds": time * 1e3, "gigabytes_per_second": bytes_moved / time / 1e9,
                "of_ceiling": bytes_moved / time / (moved / middle["ceiling"]), "speedup": relative[name],
                "memory_mb": memory[name], "seconds": seconds[name],
            }
        )  # fmt: skip
    return rows


def main() -> None:
    options = kernel_parser(__doc__, repeats=11).parse_args()
    rows = measure_shapes(options, shapes(options.device), measure)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
