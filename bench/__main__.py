"""Every CPU benchmark in one command; bench/gpu.py does the same for a GPU.

    python -m bench                  about 15 minutes on 2 cores; compares with the committed records (make bench)
    python -m bench --full --keep    everything, and the records become the committed ones (make bench-full)

The kernel tests run first, and nothing is measured unless they pass: a benchmark of wrong results is worth nothing. Then come
the machine's ceilings, then each benchmark in a process of its own, with its variants interleaved. Records go to
bench/results/latest, or with ``--keep`` to the folder of this kind of machine, whose plots and page (docs/benchmarks.md) are
then rewritten. Run again after an interruption, it resumes with the benchmarks that have not finished on this commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import ceilings, common, records, report

LATEST = common.RESULTS / "latest"
PROGRESS = "progress.json"


@dataclass(frozen=True)
class Benchmark:
    """A module of this package with its arguments; ``{record}`` becomes a path."""

    name: str
    module: str
    quick: str
    full: str
    limit: int = 240
    """Seconds of the quick run."""

    def command(self, folder: Path, full: bool) -> list[str]:
        text = self.full if full else self.quick
        record = shlex.quote(str(folder / f"{self.name}.json"))
        return [sys.executable, "-m", self.module, *shlex.split(text.format(record=record))]


CPU = (
    Benchmark(
        "attention_cpu",
        "bench.attention",
        "--device cpu --repeats 3 --peers 'grit;sdpa loop;sdpa masked;matmul only' --record {record}",
        "--device cpu --record {record}",
    ),
    Benchmark("model_cpu", "bench.model", "--record {record}", "--record {record}", 300),
    Benchmark(
        "train_cpu",
        "bench.train",
        "--repeats 3 --record {record}",
        "--repeats 7 --record {record}",
    ),
    Benchmark(
        "pooling_cpu",
        "bench.pooling",
        "--repeats 5 --record {record}",
        "--record {record}",
    ),
    Benchmark(
        "contrastive_cpu",
        "bench.contrastive",
        "--repeats 3 --record {record}",
        "--large --record {record}",
    ),
    Benchmark(
        "generative_loss_cpu",
        "bench.generative_loss",
        "--repeats 2 --record {record}",
        "--record {record}",
    ),
    Benchmark(
        "generate_cpu",
        "bench.generate",
        "--repeats 3 --record {record}",
        "--record {record}",
    ),
    Benchmark(
        "rag_cpu",
        "bench.rag",
        "--repeats 3 --lengths 1000 --modes document_first query_cache document_cache --record {record}",
        "--record {record}",
    ),
    Benchmark(
        "serve_cpu",
        "bench.serve",
        "--systems 'one server' --chats 0.5 --texts 8 --loads 100 --seconds 20 --record {record}",
        "--record {record}",
        120,
    ),
)


def tests_pass() -> bool:
    """Run the tests of the kernels that are about to be timed."""
    selection = ["-x", "-m", "not gpu and not model and not slow and not aot"]
    command = [sys.executable, "-m", "pytest", "-q", *selection, "tests/grit_kernels"]
    return subprocess.run(command, cwd=common.ROOT, check=False).returncode == 0


def run_within(command: Sequence[str], limit: float | None) -> int | None:
    """The command's exit code, None where it was stopped after ``limit`` seconds. Its child processes are stopped
    with it: one that measures memory would disturb the next benchmark."""
    process = subprocess.Popen(command, cwd=common.ROOT, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_all(benchmarks: Sequence[Benchmark], folder: Path, *, full: bool) -> dict[str, str]:
    """Run what has not finished on this commit; returns the outcome of each."""
    folder.mkdir(parents=True, exist_ok=True)
    commit = common.machine()["commit"]
    progress = folder / PROGRESS
    saved = json.loads(progress.read_text()) if progress.exists() else {}
    finished = set(saved.get("finished", [])) if saved.get("run") == [commit, full] else set()
    outcome = {}
    for benchmark in benchmarks:
        if benchmark.name in finished:
            outcome[benchmark.name] = "done before"
            continue
        limit = None if full else float(benchmark.limit)
        print(f"\n== {benchmark.name}", flush=True)
        start = time.monotonic()
        code = run_within(benchmark.command(folder, full), limit)
        if code is None:
            outcome[benchmark.name] = f"stopped after {limit:.0f} s"
        elif code:
            outcome[benchmark.name] = f"failed with code {code}"
        else:
            outcome[benchmark.name] = f"ok, {time.monotonic() - start:.0f} s"
            finished.add(benchmark.name)
            progress.write_text(json.dumps({"run": [commit, full], "finished": sorted(finished)}))
    return outcome


def compare(folder: Path) -> list[str]:
    """What moved between the committed records of a machine like this one and those in ``folder``."""
    kind = common.machine_kind(common.machine())
    committed = common.RESULTS / kind
    if not committed.is_dir():
        kinds = ", ".join(sorted({path.parent.name for paths in report.committed().values() for path in paths}))
        return [f"no records of a machine like this one ({kind}) to compare with; there are records of {kinds}"]
    lines = [f"compared with the records of {kind}:"]
    for path in sorted(folder.glob("*.json")):
        old = committed / path.name
        if path.name == PROGRESS or "rows" not in records.read(path):
            continue
        if not old.exists():
            lines.append(f"{path.stem}: no record to compare with")
            continue
        count, moves = records.moved(records.read(old)["rows"], records.read(path)["rows"])
        lines.append(f"{path.stem}: {len(moves)} of {count} ratios moved beyond noise")
        lines += [f"    {m.variant} ({m.setting[:90]}): {m.before:.2f}x -> {m.after:.2f}x" for m in moves[:8]]
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every size and peer")
    parser.add_argument(
        "--keep", action="store_true", help="write to bench/results/KIND and rewrite docs/benchmarks.md"
    )
    parser.add_argument("--only", default="", help="benchmarks whose name contains this text")
    parser.add_argument("--skip-tests", action="store_true", help="skip the kernel tests, if they have just passed")
    arguments = parser.parse_args(argv)
    if not arguments.skip_tests and not tests_pass():
        raise SystemExit("bench: the kernel tests are red; nothing is measured")
    folder = common.RESULTS / common.machine_kind(common.machine()) if arguments.keep else LATEST
    chosen = [b for b in CPU if arguments.only in b.name]
    rates = ceilings.measure("cpu")
    print("ceilings: " + ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()), flush=True)
    outcome = run_all(chosen, folder, full=arguments.full)
    common.write_records(folder / "ceilings_cpu.json", ceilings.rows(rates))
    if arguments.keep:
        report.write(plots=[folder])
    else:
        print("\n".join(compare(folder)))
    print(common.table([{"benchmark": k, "result": v} for k, v in outcome.items()], ["benchmark", "result"]))
    if any("failed" in result for result in outcome.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
