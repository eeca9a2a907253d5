"""A machine's ceilings: a large matrix product in bfloat16 and FP32 (TFLOP/s), a copy and a read (GB/s).

python -m bench.ceilings [--device cuda] [--record ceilings_cuda.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from bench import common


def measure(device: str) -> dict[str, float]:
    """Rate by name."""
    runs: dict[str, Any] = {}
    work: dict[str, float] = {}
    for name, (run, amount) in (
        ("matmul bf16, TFLOP/s", common.gemm_ceiling(device, torch.bfloat16)),
        ("matmul fp32, TFLOP/s", common.gemm_ceiling(device, torch.float32)),
        ("copy, GB/s", common.copy_ceiling(device)),
        ("read, GB/s", common.read_ceiling(device)),
    ):
        runs[name], work[name] = run, amount / (1e12 if "TFLOP" in name else 1e9)
    middle = common.medians(common.interleave(runs, 7, common.synchronizer(device)))
    return {name: work[name] / seconds for name, seconds in middle.items()}


def rows(rates: dict[str, float]) -> list[dict[str, Any]]:
    """As a record keeps them."""
    return [{"ceiling": name, "rate": rate} for name, rate in rates.items()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", help="JSON file, a bare name goes into bench/results/KIND")
    arguments = parser.parse_args(argv)
    found = rows(measure(arguments.device))
    print(common.table(found, ["ceiling", "rate"]))
    if arguments.record:
        common.write_records(arguments.record, found)


if __name__ == "__main__":
    main()
