"""Is the GPU right? A mixed pack forward and backward against the reference, then the same launches again, bit for bit.

    python -m bench.correctness [--device cuda] [--repeats 50] [--record correctness_cuda.json]

Errors are norms relative to those of the reference in float64 on the same inputs; ``eager`` is the reference in the inputs'
dtype, whose error is due to the dtype alone. The record is written after each problem.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import grit_kernels as gk
from bench import attention, common
from bench.attention_peers import Problem, Regime

COLUMNS = ["problem", "variant", "out", "dq", "dk", "dv", "right", "differing_repeats", "note"]
RESULTS = ("out", "dq", "dk", "dv")


def problems(scale: float = 1.0) -> list[Regime]:
    """Mixed packs small enough for the reference; ``scale`` shortens the samples."""
    found = []
    for heads, heads_kv, dim in ((8, 2, 128), (8, 8, 64)):
        pack = attention.mixed(f"mixed D{dim}", round(6144 * scale), 0.5, (heads, heads_kv, dim), scale, backward=True)
        found += [pack, replace(pack, name=f"mixed window D{dim}", window=(round(256 * scale), round(256 * scale)))]
    small = replace(found[0], name="mixed FP32 D64", heads=4, heads_kv=2, dim=64, dtype=torch.float32)
    return [*found, small]


def inputs(regime: Regime, device: str) -> tuple[Problem, Tensor]:
    """The problem, and the gradient of its output."""
    problem = Problem(regime, device)
    return problem, torch.randn_like(problem.q.detach())


def gradients(
    given: tuple[Problem, Tensor], dtype: torch.dtype | None = None, deterministic: bool = True
) -> list[Tensor]:
    """Output and gradients of q, k, v; computed in ``dtype`` where one is given."""
    problem, grad_out = given
    regime = problem.regime
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (problem.q, problem.k, problem.v)]
    longest = (max(regime.q_lens), max(regime.k_lens))
    tables = (problem.flags, problem.cu_q, problem.cu_k)
    options = {"window_size": regime.window, "deterministic": deterministic}
    out = gk.switch_attention_varlen(*leaves, *tables, *longest, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def measure(regime: Regime, device: str, repeats: int) -> list[dict[str, Any]]:
    """Rows for this package, for its backward pass with atomics, and for the reference in the inputs' dtype."""
    given = inputs(regime, device)
    with gk.backend("reference"):
        truth, eager = gradients(given, torch.float64), gradients(given)
    first = gradients(given)
    differing = 0
    for _ in range(repeats):
        again = gradients(given)
        differing += any(not torch.equal(a, b) for a, b in zip(first, again, strict=True))
    rows: list[dict[str, Any]] = []
    for variant, results in (
        ("eager", eager),
        ("grit", first),
        ("grit, atomics", gradients(given, deterministic=False)),
    ):
        errors = [attention.relative_error(*pair) for pair in zip(results, truth, strict=True)]
        row = {"problem": regime.name, "variant": variant, "dtype": str(regime.dtype), "tokens": sum(regime.q_lens)}
        rows.append(row | dict(zip(RESULTS, errors, strict=True)))
    # the tests' rule: twice the eager error, one rounding of the result, 32 FP32 roundings of sums
    roundings = torch.finfo(regime.dtype).eps + 32 * torch.finfo(torch.float32).eps
    allowed = {name: 2 * rows[0][name] + roundings for name in RESULTS}
    for row in rows[1:]:
        row["right"] = all(row[name] <= most for name, most in allowed.items())
    rows[1] |= {"repeats": repeats, "differing_repeats": differing}
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.correctness", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all lengths")
    parser.add_argument("--record", help="JSON file, a bare name goes into bench/results/KIND")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for regime in problems(arguments.scale):
        try:
            rows += measure(regime, arguments.device, arguments.repeats)
        except Exception as error:  # the next problem may still run
            note = attention.reason(error)
            rows.append({"problem": regime.name, "variant": "grit", "right": False, "note": note})
        if arguments.record:
            common.write_records(arguments.record, rows)
    print(common.table(rows, COLUMNS))
    if not all(row.get("right", True) and not row.get("differing_repeats") for row in rows):
        raise SystemExit("correctness: expected results within tolerance that repeat bit for bit, see the table")


if __name__ == "__main__":
    main()
