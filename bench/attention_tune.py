"""Measure tile sizes of the Triton attention kernels on this GPU, to fill the table in triton_configs.py.

    python -m bench.attention_tune [--kernels forward,backward_keys] [--dims 64,128] [--record NAME.json]

Each candidate is checked against the table's entry before it is timed; one that does not compile or launch is reported as such.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from triton.errors import TritonError

from bench import common
from bench.attention import decode, same
from bench.attention_peers import Problem, grit
from grit_kernels.attention.triton_configs import KERNELS, Config, choose_config, override_config

COLUMNS = ["kernel", "dim", "mode", "config", "ms", "tflops", "of_gemm", "note"]


def candidates(kernel: str, dim: int) -> Iterator[Config]:
    """Tiles whose operands fit Hopper's shared memory and whose FP32 sums have a chance to fit the registers."""
    sizes = (16, 32, 64, 128)
    for rows, keys, warps, stages in product((16,) if kernel == "decode" else sizes, sizes, (4, 8), (2, 3, 4)):
        fixed, moving = (keys, rows) if kernel == "backward_keys" else (rows, keys)
        sums = fixed * dim * (2 if kernel == "backward_keys" else 1) + 2 * rows * keys
        operands = 2 * dim * (fixed * (1 if kernel in ("forward", "decode") else 2) + 2 * moving * stages)
        if operands > 227 << 10 or sums > 200 * 32 * warps or (kernel != "decode" and fixed < 64):
            continue
        yield Config(rows, keys, warps, stages)
        if kernel == "forward":
            yield Config(rows, keys, warps, stages, persistent=True)


def problems(kernel: str, dim: int) -> Iterator[tuple[str, Problem]]:
    if kernel == "decode":
        yield "decode", Problem(decode("decode", 16, 16384, (32, 8, dim)), "cuda")
        return
    for causal in (True, False):
        regime = same("tune", 4096, 4, causal, (16, 4, dim), backward=kernel.startswith("backward"))
        yield "causal" if causal else "bidirectional", Problem(regime, "cuda")


def measure(kernel: str, dim: int) -> Iterator[dict[str, Any]]:
    gemm, gemm_flops = common.gemm_ceiling("cuda", torch.bfloat16)
    for mode, problem in problems(kernel, dim):
        forward = grit(problem)
        run: Callable[[], Any] = forward
        if problem.regime.backward:
            out, grad_out = forward(), torch.randn_like(problem.q)

            def run(out: torch.Tensor = out, grad_out: torch.Tensor = grad_out, p: Problem = problem) -> Any:
                return torch.autograd.grad(out, (p.q, p.k, p.v), grad_out, retain_graph=True)

        expected = run()
        table = choose_config(kernel, dim, torch.bfloat16, problem.q.device)
        for config in [table, *(c for c in candidates(kernel, dim) if c != table)]:
            name = "x".join(map(str, config[:4])) + "p" * config.persistent
            row: dict[str, Any] = {"kernel": kernel, "dim": dim, "mode": mode, "config": name}
            if config == table:
                row["note"] = "table"
            with override_config(kernel, config):
                try:
                    torch.testing.assert_close(run(), expected, rtol=0.02, atol=0.02)
                except (TritonError, RuntimeError, AssertionError) as error:  # what does not fit is a row of the result
                    row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                    yield row
                    continue
                seconds = common.medians(common.interleave_events({"run": run, "gemm": gemm}, 5))
            rate = problem.regime.flops() / seconds["run"]
            row |= {"ms": seconds["run"] * 1e3, "tflops": rate / 1e12, "of_gemm": rate * seconds["gemm"] / gemm_flops}
            yield row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.attention_tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--dims", default="64,128,256")
    parser.add_argument("--record", help="JSON file, a bare name lands in bench/results")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for kernel, dim in product(arguments.kernels.split(","), map(int, arguments.dims.split(","))):
        found = list(measure(kernel, dim))
        found.sort(key=lambda row: (row["mode"], row.get("ms", float("inf"))))
        print(common.table(found, COLUMNS), flush=True)
        rows += found
        if arguments.record:
            common.write_records(arguments.record, rows)


if __name__ == "__main__":
    main()
