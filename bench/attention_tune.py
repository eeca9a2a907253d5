"""Measure tile sizes of the Triton attention kernels on this GPU, to fill the table in triton_configs.py.

    python -m bench.attention_tune [--kernels forward,backward_keys] [--dims 64,128] [--few] [--limit 240]
                                   [--record NAME.json [--resume]]

Each candidate is checked against the table's entry before it is timed; one that does not compile or launch is reported.
``--kernels hopper,hopper_backward`` measures the Hopper kernels in Gluon beside the table's entries.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any
from unittest import mock

import torch
from triton.errors import TritonError

from bench import common, records
from bench.attention import decode, same
from bench.attention_peers import Problem, grit
from grit_kernels.attention import hopper
from grit_kernels.attention.triton_configs import KERNELS, Config, choose_config, override_config, table_config

HOPPER = "hopper"
"""In place of a configuration: the kernels in Gluon, which have only one."""
HOPPER_KERNELS = {"hopper": "forward", "hopper_backward": "backward_keys"}
"""In place of a kernel's name: the pass in Gluon, and the kernel whose entry of the table runs beside it."""
COLUMNS = ["kernel", "dim", "mode", "config", "ms", "tflops", "of_gemm", "note"]


def candidates(kernel: str, dim: int) -> Iterator[Config]:
    """Tiles whose operands fit into Hopper's shared memory and whose FP32 sums may fit into registers."""
    sizes = (16, 32, 64, 128)
    for rows, keys, warps, stages in product((16,) if kernel == "decode" else sizes, sizes, (4, 8), (2, 3, 4)):
        over_rows = kernel in ("backward_keys", "backward")
        fixed, moving = (keys, rows) if over_rows else (rows, keys)
        sums = fixed * dim * (2 if over_rows else 1) + 2 * rows * keys + moving * dim * (kernel == "backward")
        operands = 2 * dim * (fixed * (1 if kernel in ("forward", "decode") else 2) + 2 * moving * stages)
        if operands > 227 << 10 or sums > 200 * 32 * warps or (kernel != "decode" and fixed < 64):
            continue
        yield Config(rows, keys, warps, stages)
        if kernel == "forward":
            for persistent, ahead in ((True, False), (False, True), (True, True)):
                yield Config(rows, keys, warps, stages, persistent, ahead)


def problems(kernel: str, dim: int, device: str = "cuda") -> Iterator[tuple[str, Problem]]:
    if kernel == "decode":
        yield "decode", Problem(decode("decode", 16, 16384, (32, 8, dim)), device)
        return
    backward = HOPPER_KERNELS.get(kernel, kernel).startswith("backward")
    for causal in (True, False):
        regime = same("tune", 4096, 4, causal, (16, 4, dim), backward=backward)
        yield "causal" if causal else "bidirectional", Problem(regime, device)


def contenders(kernel: str, dim: int) -> list[Config]:
    """The few worth trying first, beginning with the table's entry for bfloat16 on Hopper; the others differ in one way."""
    base = table_config(kernel, dim, 2, "sm90")
    near = [
        base._replace(persistent=not base.persistent),
        base._replace(ahead=True),
        *(base._replace(stages=stages) for stages in (2, 3, 4)),
        *(base._replace(rows=rows) for rows in (64, 128)),
        *(base._replace(keys=keys) for keys in (32, 64, 128)),
        base._replace(rows=64, warps=4),
        base._replace(rows=128, keys=128, warps=8, stages=2),
    ]
    allowed = set(candidates(kernel, dim))
    return list(dict.fromkeys([base, *(config for config in near if config in allowed)]))


def tried(kernel: str, dim: int, few: bool, table: Config) -> list[Config | str]:
    """What :func:`measure` tries, the ``table``'s entry first; ``few``: only the contenders."""
    if kernel in HOPPER_KERNELS:
        return [table, HOPPER]
    return list(dict.fromkeys([table, *(contenders(kernel, dim) if few else candidates(kernel, dim))]))


def table_entry(kernel: str, dim: int, device: torch.device) -> Config:
    """The table's for bfloat16."""
    return choose_config(HOPPER_KERNELS.get(kernel, kernel), dim, torch.bfloat16, device)


@contextlib.contextmanager
def trying(kernel: str, config: Config | str) -> Iterator[None]:
    """Launch ``config`` within the block; an error where that is HOPPER and does not run."""
    with contextlib.ExitStack() as stack:
        if isinstance(config, Config):
            stack.enter_context(override_config(HOPPER_KERNELS.get(kernel, kernel), config))
        else:
            stack.enter_context(mock.patch.dict(os.environ, {hopper.VARIABLE: "1"}))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("error", message=hopper.VARIABLE)
        yield


def call(problem: Problem, kernel: str) -> Callable[[], Any]:
    """A pass that runs the kernel: forward, or backward where the problem is a backward pass."""
    forward = grit(problem, deterministic=kernel != "backward")
    if not problem.regime.backward:
        return forward
    out, grad_out = forward(), torch.randn_like(problem.q)
    return lambda: torch.autograd.grad(out, (problem.q, problem.k, problem.v), grad_out, retain_graph=True)


def measure(kernel: str, dim: int, few: bool, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """A row per mode and configuration not among ``done``, the table's entry first; ``few``: only the contenders."""
    gemm, gemm_flops = common.gemm_ceiling("cuda", torch.bfloat16)
    for mode, problem in problems(kernel, dim):
        run = call(problem, kernel)
        expected = run()
        table = table_entry(kernel, dim, problem.q.device)
        for config in tried(kernel, dim, few, table):
            row: dict[str, Any] = {"kernel": kernel, "dim": dim, "mode": mode, "config": str(config)}
            if identity(row) in done:
                continue
            if config == table:
                row["note"] = "table"
            with trying(kernel, config):
                try:
                    torch.testing.assert_close(run(), expected, rtol=0.02, atol=0.02)
                    seconds = common.medians(common.interleave_events({"run": run, "gemm": gemm}, 5))
                except (
                    TritonError,
                    RuntimeError,
                    AssertionError,
                    UserWarning,
                ) as error:  # what does not fit becomes a row of the result
                    row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                    yield row
                    continue
            rate = problem.regime.flops() / seconds["run"]
            row |= {"ms": seconds["run"] * 1e3, "tflops": rate / 1e12, "of_gemm": rate * seconds["gemm"] / gemm_flops}
            yield row


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kernel", "dim", "mode", "config"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.attention_tune", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--dims", default="64,128,256")
    parser.add_argument("--few", action="store_true", help="only the contenders and the table's entry")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which no further candidate begins")
    parser.add_argument(
        "--record", help="JSON file, a bare name goes into bench/results/KIND; written after each candidate"
    )
    parser.add_argument("--resume", action="store_true", help="skip candidates that the record has")
    arguments = parser.parse_args(argv)
    if arguments.resume and not arguments.record:
        parser.error("--resume: expected a --record to resume from")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    if arguments.resume and (path := common.result_path(arguments.record)).exists():
        rows = records.read(path)["rows"]
    done, end = {identity(row) for row in rows}, time.monotonic() + arguments.limit
    for kernel, dim in product(arguments.kernels.split(","), map(int, arguments.dims.split(","))):
        for row in measure(kernel, dim, arguments.few, done):
            rows.append(row)
            if arguments.record:
                common.write_records(arguments.record, rows)
            if time.monotonic() > end:
                break
        found = [row for row in rows if (row["kernel"], row["dim"]) == (kernel, dim)]
        found.sort(key=lambda row: (row["mode"], row.get("ms", float("inf"))))
        print(common.table(found, COLUMNS), flush=True)
        if time.monotonic() > end:
            raise SystemExit(f"bench.attention_tune: stopped after {arguments.limit:.0f} s with candidates left")


if __name__ == "__main__":
    main()
