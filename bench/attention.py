"""Attention speed: dense, mixed causal and bidirectional packs, windows, decoding, backward, against its peers.

    python -m bench.attention [--device cpu|cuda] [--only mixed] [--peers grit,flex] [--record NAME.json]

Variants run interleaved; a row keeps the median. Printed per variant: ms, TFLOP/s on visible pairs, its time relative to this
package's in the same rounds, its rate relative to that of a large matrix product in the same run; for decoding, GB/s of keys
and values, and their rate relative to reading as many bytes of memory (on a GPU: to a large copy). Every variant's output is
compared with this package's before it is timed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import common, records
from bench.attention_peers import DIFFERS, LARGEST_ERROR, NOT_ATTENTION, PEERS, Problem, Regime, unwindowed

COLUMNS = [
    "regime",
    "variant",
    "ms",
    "tflops",
    "times_grit",
    "of_gemm",
    "gbps",
    "of_read",
    "of_copy",
    "prepare_ms",
    "note",
]
BEGAN, BEGAN_TWICE = "began and did not end", "began twice and did not end"
"""Notes on a regime while it runs, which remain if the process is stopped."""
AGAIN = 75
"""Exit status once this process has lost the GPU: run it again with --resume to do the rest."""


def same(name: str, length: int, count: int, causal: bool, shape: tuple[int, int, int], **options: Any) -> Regime:
    """``count`` samples of one length and mode; ``shape`` = heads, key heads, head dim."""
    lens = (length,) * count
    return Regime(name, lens, lens, (causal,) * count, *shape, **options)


def mixed(
    name: str, tokens: int, share: float, shape: tuple[int, int, int], scale: float = 1.0, **options: Any
) -> Regime:
    """A training step's pack: ``share`` of the tokens in causal samples of up to 2048, the rest in queries of up to 256 and
    passages of up to 2048 (one query per passage); actual lengths are 40 to 100 % of those."""
    generator = random.Random(0)

    def length(most: int) -> int:
        return round(most * scale * generator.uniform(0.4, 1.0))

    lens: list[int] = []
    causal: list[bool] = []
    used = 0
    while used < tokens * share:
        lens.append(length(2048))
        causal.append(True)
        used += lens[-1]
    while used < tokens:
        for most in (256, 2048):
            lens.append(length(most))
            causal.append(False)
            used += lens[-1]
    order = list(range(len(lens)))
    generator.shuffle(order)
    lens, causal = [lens[i] for i in order], [causal[i] for i in order]
    return Regime(name, tuple(lens), tuple(lens), tuple(causal), *shape, **options)


def decode(name: str, batch: int, cache: int, shape: tuple[int, int, int]) -> Regime:
    return Regime(name, (1,) * batch, (cache,) * batch, (True,) * batch, *shape)


def serving(name: str, shape: tuple[int, int, int]) -> Regime:
    """A server's step: chats that decode, with caches of 256 to 16384 keys, two pieces of long prompts, texts to embed."""
    generator = random.Random(0)
    caches = [round(256 * 64 ** generator.random()) for _ in range(48)]
    texts = [generator.randint(32, 512) for _ in range(8)]
    q_lens, k_lens = (1,) * 48 + (512, 512, *texts), (*caches, 2048, 8192, *texts)
    return Regime(name, q_lens, k_lens, (True,) * 50 + (False,) * 8, *shape)


def gpu_regimes() -> list[Regime]:
    large, small = (32, 8, 128), (32, 32, 64)
    # the most valuable first: there may not be time for all
    found = [mixed(f"mixed {share}% causal", 65536, share / 100, large) for share in (50, 0, 25, 75, 100)]
    found.append(mixed("backward mixed 50% causal", 32768, 0.5, large, backward=True))
    for shape in (large, small):
        for length in (1024, 4096, 16384):
            for causal in (True, False):
                mode = "causal" if causal else "bidirectional"
                found.append(same(f"dense {mode} N{length} D{shape[2]}", length, 16384 // length, causal, shape))
    for window in (1024, 4096):
        for causal in (True, False):
            mode = "causal" if causal else "bidirectional"
            found.append(same(f"window {window} {mode} N16384", 16384, 2, causal, large, window=(window, window)))
    found += [decode(f"decode B{b} cache {n}", b, n, large) for b in (1, 8, 64) for n in (4096, 32768)]
    found.append(serving("step of a server", large))
    for causal in (True, False):
        mode = "causal" if causal else "bidirectional"
        found.append(same(f"backward {mode} N8192 D128", 8192, 2, causal, large, backward=True))
    return found


def cpu_regimes() -> list[Regime]:
    small, large = (9, 3, 64), (8, 2, 128)
    found = []
    for length, count, shape in ((1024, 4, small), (4096, 1, large), (256, 16, large)):
        for causal in (True, False):
            mode = "causal" if causal else "bidirectional"
            found.append(same(f"dense {mode} N{length} D{shape[2]}", length, count, causal, shape))
    found += [mixed(f"mixed {share}% causal", 4096, share / 100, small, scale=0.5) for share in (0, 25, 50, 75, 100)]
    for causal in (True, False):
        mode = "causal" if causal else "bidirectional"
        found.append(same(f"window 1024 {mode} N4096", 4096, 1, causal, small, window=(1024, 1024)))
    found.append(same("fp32 causal N1024 D64", 1024, 4, True, small, dtype=torch.float32))
    found.append(decode("decode B8 cache 4096", 8, 4096, large))
    for causal in (True, False):
        mode = "causal" if causal else "bidirectional"
        found.append(same(f"backward {mode} N1024 D64", 1024, 4, causal, small, backward=True))
    found.append(mixed("backward mixed 50% causal", 2048, 0.5, small, scale=0.5, backward=True))
    return found


def variants(problem: Problem, peers: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """The variants that solve the problem, each checked against this package (in the backward pass: its gradients). A peer that
    fails, lacks memory or a kernel, or computes something else is left out; ``problem.failures`` says why."""
    found: dict[str, Callable[[], Any]] = {}
    expected: list[torch.Tensor] = []
    leaves = (problem.q, problem.k, problem.v)
    grad_out = torch.randn_like(problem.q)
    for name in peers:
        try:
            run = PEERS[name](problem)
            if run is None:
                continue
            if problem.regime.backward:
                out = run()

                def run(out: torch.Tensor = out) -> Any:
                    return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

                results = list(run())
            else:
                results = [run()]
        except Exception as error:  # whatever another package raises
            if name == peers[0]:
                raise
            problem.failures[name] = reason(error)
            continue
        if name not in NOT_ATTENTION:
            expected = expected or results
            error = max(relative_error(*pair) for pair in zip(results, expected, strict=True))
            if error > LARGEST_ERROR:
                problem.failures[name] = f"{DIFFERS} from {peers[0]}: relative error {error:.3g}"
                continue
        found[name] = run
    return found


def reason(error: Exception) -> str:
    """The first line of an error, for a row of a table."""
    return f"{type(error).__name__}: {str(error)[:80]}".splitlines()[0]


def relative_error(result: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over that of ``wanted``; infinite where the result is NaN or of another shape."""
    if result.shape != wanted.shape:
        return float("inf")
    error = float((result.float() - wanted.float()).norm() / wanted.float().norm())
    return error if error == error else float("inf")


def measure(regime: Regime, device: str, peers: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    problem = Problem(regime, device)
    with torch.set_grad_enabled(regime.backward):
        runs = variants(problem, peers)
    decoding = max(regime.q_lens) == 1
    gemm, gemm_flops = common.gemm_ceiling(device, regime.dtype)
    ceiling = "gemm"
    if decoding:
        ceiling = "copy" if device == "cuda" else "read"
        moved = common.copy_ceiling(device) if device == "cuda" else common.fresh_read_ceiling(regime.kv_bytes())
    runs[ceiling] = moved[0] if decoding else gemm
    with torch.set_grad_enabled(regime.backward):
        if device == "cuda":
            seconds = common.interleave_events(runs, repeats)
        else:
            seconds = common.interleave(runs, repeats)
    middle, relative = common.medians(seconds), common.ratios(seconds, next(iter(runs)))
    rows = []
    for name in runs:
        if name == ceiling:
            continue
        rate = (unwindowed(regime) if name == "grit, no window" else regime).flops() / middle[name]
        row: dict[str, Any] = {
            "regime": regime.name, "variant": name, "ms": middle[name] * 1e3, "tflops": rate / 1e12,
            "times_grit": relative[name], "dtype": str(regime.dtype), "heads": [regime.heads, regime.heads_kv, regime.dim],
            "window": regime.window, "samples": len(regime.q_lens), "tokens": sum(regime.k_lens), "seconds": seconds[name],
        }  # fmt: skip
        if decoding:
            row["gbps"] = regime.kv_bytes() / middle[name] / 1e9
            row[f"of_{ceiling}"] = row["gbps"] * 1e9 / (moved[1] / middle[ceiling])
        else:
            row["of_gemm"] = rate / (gemm_flops / middle["gemm"])
        if name in problem.prepare_seconds:
            row["prepare_ms"] = problem.prepare_seconds[name] * 1e3
        rows.append(row)
    return rows + [
        {"regime": regime.name, "variant": name, "note": why, "dtype": str(regime.dtype)}
        for name, why in problem.failures.items()
    ]


def measured_in(rows: list[dict[str, Any]]) -> Callable[[dict[str, Any]], bool]:
    """Whether a row of an earlier record belongs to a regime that has been measured again."""
    done = {row["regime"] for row in rows}
    return lambda row: row["regime"] in done


def to_do(regimes: Sequence[Regime], record: Path) -> list[Regime]:
    """What a run that resumes from ``record`` measures: regimes that it lacks, then those that once began and did not end (the
    process was stopped, or hung). One that did so twice is left out."""
    rows = records.read(record)["rows"] if record.exists() else []
    seen = {row["regime"]: row.get("note") for row in rows}
    new = [regime for regime in regimes if regime.name not in seen]
    return new + [regime for regime in regimes if seen.get(regime.name) == BEGAN]


def device_lost(device: str) -> bool:
    """Whether an error has ended this process's use of the GPU: every later call would fail with the same error."""
    try:
        common.synchronizer(device)()
    except RuntimeError:
        return True
    return False


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", default="", help="regimes whose name contains this text, or one of several between ';'"
    )
    parser.add_argument("--peers", default=";".join(PEERS), help="names separated by ';', this package first")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--record",
        help="JSON file, a bare name goes into bench/results/KIND; with --only, only those rows are replaced",
    )
    parser.add_argument("--resume", action="store_true", help="skip regimes that the record has")
    parser.add_argument(
        "--dtype", help="of regimes that name none; default: that in which models compute on the device"
    )
    arguments = parser.parse_args(argv)
    peers = [name.strip() for name in arguments.peers.split(";")]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: {sorted(unknown)} are not among {list(PEERS)}")
    if arguments.resume and not arguments.record:
        parser.error("--resume: expected a --record to resume from")
    torch.manual_seed(0)
    wanted = arguments.only.split(";")
    regimes = gpu_regimes() if arguments.device == "cuda" else cpu_regimes()
    dtype = getattr(torch, arguments.dtype or common.model_dtype(arguments.device))
    regimes = [
        replace(regime, dtype=torch.float32 if regime.name.startswith("fp32") else dtype)
        for regime in regimes
        if any(text in regime.name for text in wanted)
    ]
    keeps = bool(arguments.only or arguments.resume)
    if arguments.resume:
        regimes = to_do(regimes, common.result_path(arguments.record))
    begun = _begun(arguments.record) if arguments.resume else set()
    rows: list[dict[str, Any]] = []
    failed = False
    for regime in regimes:
        mark = {"regime": regime.name, "variant": peers[0], "note": BEGAN_TWICE if regime.name in begun else BEGAN}
        if arguments.resume:
            common.write_records(arguments.record, [*rows, mark], measured_in([*rows, mark]))
        try:
            measured = measure(regime, arguments.device, peers, arguments.repeats)
        except Exception as error:  # the other regimes may still work
            failed = True
            measured = [{**mark, "note": reason(error), "dtype": str(regime.dtype)}]
        print(common.table(measured, COLUMNS), flush=True)
        rows += measured
        if arguments.record:
            # after each regime: an interrupted run keeps its rows, and the other rows of an earlier record
            common.write_records(arguments.record, rows, measured_in(rows) if keeps else None)
        if device_lost(arguments.device):
            raise SystemExit(AGAIN)
    if failed:
        raise SystemExit("bench.attention: this package failed in a regime, see the notes")


def _begun(record: str) -> set[str]:
    """Regimes that began and did not end, according to the record."""
    path = common.result_path(record)
    rows = records.read(path)["rows"] if path.exists() else []
    return {row["regime"] for row in rows if row.get("note") == BEGAN}


if __name__ == "__main__":
    main()
