"""Everything to measure on a borrowed GPU, in steps of a few minutes; run again, it resumes where it stopped (make gpu).

    python3 -m bench.gpu --out FOLDER                          # stops after --limit seconds (540)
    python3 -m bench.gpu --out FOLDER --resume EARLIER         # resumes from another run's folder
    python3 -m bench.gpu --out FOLDER --step 2                 # one step only
    python3 -m bench.gpu --out FOLDER --dry-run                # on any CPU, tiny, with injected failures
    python -m bench.gpu --keep FOLDER                          # its records become the committed ones

It needs no network; this Python must have torch, Triton, transformers and pytest. The most valuable tasks come first; each is a
process of its own with a time limit, and whatever happens to one, the next begins. FOLDER gets three files: records.json, updated
with every row that a task writes; table.txt, the table that is printed last; log.txt, what the tasks printed.

Exit status: 0 if results were right, whatever else failed; 1 if a check of them, a test or all peers speak against them
(gpu_verdict.py); 3 if the check of correctness has not ended. Of a dry run: 0 if what was injected failed and nothing else.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import common, gpu_table, gpu_verdict
from bench.attention import AGAIN

RECORDS, TABLE, LOG = "records.json", "table.txt", "log.txt"
WORK = "work"
"""Folder beside them while a run lasts: what its tasks write."""
RESERVE = 6.0
"""Seconds of the limit reserved for the table."""
TRIES = 3
"""How often a task is begun that was stopped or lost the GPU without writing a new row."""
SILENCE = 120.0
"""Seconds without a new row after which a task that can resume from its record is considered hung, and restarted."""
DRY_SILENCE = 15.0
HUNG, LOST = "hung", "lost the GPU"

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A module with its arguments: ``{record}`` becomes a file, ``{device}`` cuda.

    ``limit``, ``least``: seconds it may take, and seconds that must be left for it to begin. ``before``: a program that runs it,
    such as a profiler; unless it is on PATH, the task is skipped. ``parse``: makes rows of its output, if it writes no record.
    ``dry``: the command of a dry run, by default the same on the CPU, tiny.
    """

    name: str
    step: int
    command: str
    limit: float
    least: float = 20.0
    before: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    parse: Callable[[str], list[Row]] | None = None
    dry: str = ""


def parse_tests(text: str) -> list[Row]:
    """pytest's counts, and a row per failed test."""
    rows: list[Row] = []
    for line in text.splitlines():
        if found := re.match(r"(?:FAILED|ERROR) (\S+)(?: - (.*))?", line):
            rows.append({"test": found[1], "result": "failed", "note": (found[2] or "")[:160]})
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|error|skipped)", text)}
    return [{"test": "all", "result": ", ".join(f"{n} {what}" for what, n in counts.items()) or "none ran"}, *rows]


def parse_sanitizer(text: str) -> list[Row]:
    """compute-sanitizer's summary and its first errors."""
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    errors = re.findall(r"^=+ ((?:Invalid|Error|Program hit|Race|Out-of-range|Unsupported)[^\n]*)", text, re.MULTILINE)
    return [{"errors": int(summary[-1]) if summary else "no summary", "note": "; ".join(errors[:3])}]


def parse_profile(text: str) -> list[Row]:
    """A row per kernel of ncu's raw CSV page, with those of METRICS that this GPU has."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(lines))
    if len(table) < 3:
        return [{"kernel": "none", "note": " ".join(text.split())[-200:]}]
    head, units, *found = table
    rows = []
    for cells in found:
        named = dict(zip(head, cells, strict=False))
        row: Row = {"kernel": named.get("Kernel Name", "")[:60]}
        for name, unit, value in zip(head, units, cells, strict=False):
            if name in METRICS:
                row[f"{METRICS[name]} {unit}".strip()] = value
        rows.append(row)
    return rows


METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor cores",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks by registers",
}
FIRST_REGIMES = "mixed 50% causal;dense causal N4096 D128;dense bidirectional N4096 D128;window 1024 bidirectional"
FIRST_PEERS = "grit;grit, two launches;sdpa loop cudnn;sdpa split cudnn;torch varlen;flash-attn;flash-attn 3;flex"
TESTS = "tests/grit_kernels/attention/test_triton_gpu.py"
TESTS_OF_HOPPER = "-m gpu -p no:cacheprovider tests/grit_kernels/attention/test_hopper_gpu.py"
TESTS_OF_GPU = (
    "-m gpu -p no:cacheprovider --continue-on-collection-errors tests/grit_kernels"
    f" --ignore={TESTS_OF_HOPPER.split()[-1]}"
)
"""Arguments of pytest; bench.launches records the same tests. A kernel behind a switch that hangs must not end the others."""


def _sanitized(number: int, test: str) -> Task:
    return Task(
        f"sanitizer_{number}", 2, f"pytest -m gpu -p no:cacheprovider {test}", 90, 45,
        "compute-sanitizer --tool memcheck", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, parse_sanitizer,
    )  # fmt: skip


def _profiled(kernel: str, regime: str) -> Task:
    run = f"bench.attention --device {{device}} --only '{regime}' --peers grit --repeats 1"
    sections = "--section SpeedOfLight --section LaunchStats --section Occupancy --section ComputeWorkloadAnalysis"
    ncu = f"ncu --csv --page raw --clock-control none {sections} --kernel-name regex:{kernel}"
    return Task(f"ncu_{kernel}", 2, run, 60, 25, f"{ncu} --launch-skip 1 --launch-count 1", parse=parse_profile)


INSTALL = "pip install --no-deps --no-build-isolation --no-index --quiet -e ."
TASKS = (
    # 1: is it right, how fast is it
    Task("install", 1, INSTALL, 60, 5, environment={"GRIT_KERNELS_NO_EXTENSION": "1"}, dry="bench.gpu_dry broken_install"),
    Task("compile_first", 1, "bench.launches --groups correctness,hopper,attention,tuning", 150),
    Task("correctness_cuda", 1, "bench.correctness --device {device} --record {record}", 90),
    Task("hopper_tests", 1, f"pytest -rfE {TESTS_OF_HOPPER}", 90, 10, parse=parse_tests, dry="bench.gpu_dry broken_install"),
    Task(
        "attention_hopper_cuda", 1,
        "bench.attention_tune --kernels hopper,hopper_backward --dims 128,64 --limit 70 --record {record} --resume", 90,
        dry="bench.gpu_dry broken_install",
    ),
    Task("ceilings_cuda", 1, "bench.ceilings --device {device} --record {record}", 40, 10),
    Task(
        "attention_cuda", 1,
        f"bench.attention --device {{device}} --only '{FIRST_REGIMES}' --peers '{FIRST_PEERS}' --record {{record}} --resume", 210,
    ),
    Task(
        "attention_tune_cuda", 1,
        "bench.attention_tune --kernels forward --dims 128,64 --few --limit 110 --record {record} --resume", 140,
        dry="bench.gpu_dry slow_rows --record {record}",
    ),
    # 2: what tests and tools find
    Task("compile_tests", 2, "bench.launches --groups tests", 240, 60),
    Task(
        "tests", 2,
        f"pytest -rfE {{processes}} {TESTS_OF_GPU}", 300, 60,
        parse=parse_tests, dry="bench.gpu_dry red_tests",
    ),
    _sanitized(1, f"'{TESTS}::test_few_rows_over_a_long_cache_equal_the_reference[3]'"),
    _sanitized(2, f"'{TESTS}::test_a_mixed_pack_of_real_lengths_equals_a_launch_per_sample[window0]'"),
    _sanitized(3, f"'{TESTS}::test_any_call_equals_the_reference_forward_and_backward[2]'"),
    _profiled("attention_forward_kernel", "dense causal N4096 D128"),
    _profiled("backward_keys_kernel", "backward causal N8192 D128"),
    _profiled("backward_rows_kernel", "backward causal N8192 D128"),
    _profiled("attention_decode_kernel", "decode B8 cache 32768"),
    # 3: the other kernels and the model
    Task("compile_rest", 3, "bench.launches --groups unified,pooling,contrastive,twins", 90),
    Task(
        "unified_cuda", 3, "bench.unified --device {device} --shape mistral-7b --record {record}", 200, 60,
        dry="bench.gpu_dry unified --shape tiny --queries 1 --conversations 1 --scale 0.02 --repeats 1 --record {record}",
    ),
    Task(
        "decode_cuda", 3,
        "bench.attention --device {device} --only decode --peers 'grit;sdpa split;torch varlen;flash-attn;matmul only'"
        " --record {record} --resume", 120,
    ),
    Task("pooling_cuda", 3, "bench.pooling --device {device} --repeats 7 --record {record}", 90),
    Task("contrastive_cuda", 3, "bench.contrastive --device {device} --repeats 5 --record {record}", 150, 40),
    Task("generative_loss_cuda", 3, "bench.generative_loss --device {device} --repeats 5 --record {record}", 120, 40),
    # 4: CUDA C++ beside its Triton twin; what took too long before
    Task("build_cuda", 4, INSTALL, 400, 120, environment={"GRIT_KERNELS_CUDA": "1"}, dry="bench.gpu_dry broken_install"),
    Task("cuda_twin_cuda", 4, "bench.cuda_twin --record {record}", 90, dry="bench.gpu_dry broken_install"),
    Task("attention_all_cuda", 4, "bench.attention --device {device} --record {record} --resume", 500),
    Task("compile_tuning", 4, "bench.launches --groups tuning_all", 400),
    Task(
        "attention_tune_all_cuda", 4, "bench.attention_tune --limit 480 --record {record} --resume", 500,
        dry="bench.gpu_dry slow_rows --record {record}",
    ),
)  # fmt: skip


def described() -> dict[str, Any]:
    """This machine, as described by a separate process: the runner takes no GPU memory, and a broken GPU does not end it."""
    code = "import json; from bench import common; print(json.dumps(common.machine()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"processor": "unknown", "error": run.stderr.strip()[-300:]}
    return dict(json.loads(run.stdout.splitlines()[-1]))


class Run:
    """The state of a run: what became of each task, and the records, as records.json holds them."""

    def __init__(self, out: Path, machine: dict[str, Any], *, dry: bool = False, earlier: Path | None = None) -> None:
        self.out, self.machine, self.dry = out, machine, dry
        self.work = out.resolve() / WORK
        self.tasks: dict[str, Row] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, float] = {}
        shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed
        self.work.mkdir(parents=True)
        for folder in (out, earlier):
            if folder is not None and (folder / RECORDS).exists():
                self._go_on_with(folder / RECORDS)
                break

    def _go_on_with(self, path: Path) -> None:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kinds = [common.machine_kind(machine) for machine in (saved["machine"], self.machine)]
        if kinds[0] != kinds[1] or saved["dry_run"] != self.dry:
            raise ValueError(f"{path}: expected records of this kind of machine ({kinds[1]}), got {kinds[0]}")
        self.tasks, self.records = saved["tasks"], saved["records"]
        for name, record in self.records.items():
            self._record(name).write_text(json.dumps(record), encoding="utf-8")

    def _record(self, name: str) -> Path:
        return self.work / f"{name}.json"

    def save(self) -> None:
        """Rewrite records.json and table.txt."""
        state = {"machine": self.machine, "dry_run": self.dry, "tasks": self.tasks, "records": self.records}
        for name, text in ((RECORDS, json.dumps(state, indent=1)), (TABLE, self.table())):
            partial = self.out / f"{name}.partial"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.out / name)

    def table(self) -> str:
        """What is printed last."""
        return gpu_table.table(self.machine, self.tasks, self.records)

    def collect(self) -> None:
        """Read what the tasks have written since."""
        changed = False
        for path in self.work.glob("*.json"):
            written = path.stat().st_mtime
            if self._seen.get(path.stem) != written:
                self._seen[path.stem] = written
                self.records[path.stem] = json.loads(path.read_text(encoding="utf-8"))
                changed = True
        if changed:
            self.save()

    def to_do(self, tasks: Sequence[Task]) -> list[Task]:
        """Tasks that have not ended and have not been stopped too often."""
        ended = {name for name, found in self.tasks.items() if found["ended"] or found["tries"] >= TRIES}
        return [task for task in tasks if task.name not in ended]

    def command(self, task: Task) -> list[str]:
        text = (task.dry or f"bench.gpu_dry {task.command.removeprefix('bench.')}") if self.dry else task.command
        values = {
            "record": shlex.quote(str(self._record(task.name))),
            "device": "cpu" if self.dry else "cuda",
            "processes": "-n 8" if importlib.util.find_spec("xdist") else "",
        }
        run = [sys.executable, "-m", *shlex.split(text.format(**values))]
        return [*shlex.split(task.before), *run]

    def run(self, task: Task, end: float) -> None:
        """Run a task until it ends or its time does, and keep its outcome."""
        found = self.tasks.setdefault(task.name, {"step": task.step, "tries": 0, "seconds": 0.0, "ended": False})
        if task.before and (self.dry or shutil.which(task.before.split()[0]) is None):
            why = "has nothing to watch on a CPU" if self.dry else "is not installed"
            found.update(outcome=f"{task.before.split()[0]} {why}", ended=True)
            return self.save()
        left = end - time.monotonic()
        if left < min(task.least, task.limit):
            found["outcome"] = found.get("outcome", "no time left")
            return self.save()
        limit = min(task.limit, left)
        found["tries"] += 1
        rows = self.rows(task)
        found["outcome"] = "began"  # what remains if this process is killed
        self.save()
        print(f"{task.name} ..", flush=True)
        start = time.monotonic()
        log = self.out / LOG
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n== {task.name}\n")
        begin = log.stat().st_size
        code, hung = self._run_within(task, limit, log)
        text = log.read_bytes()[begin:].decode(errors="replace")
        found["seconds"] = round(found["seconds"] + time.monotonic() - start, 1)
        found["note"] = "" if code == 0 else " ".join(text.split())[-160:]
        if code is None:
            found["outcome"] = HUNG if hung else f"stopped after {limit:.0f} s"
        elif code == AGAIN:
            found["outcome"] = LOST
        else:
            found["outcome"] = "ok" if code == 0 else f"failed with status {code}"
            found["ended"] = True
        if task.parse is not None:
            record = {"machine": self.machine, "command": " ".join(self.command(task)[1:]), "rows": task.parse(text)}
            self._record(task.name).write_text(json.dumps(record), encoding="utf-8")
        self.collect()
        if self.rows(task) > rows:
            found["tries"] = 1
        self.save()
        print(f"{task.name}: {found['outcome']}", flush=True)

    def rows(self, task: Task) -> int:
        """Number of rows in the task's record."""
        return len(self.records.get(task.name, {"rows": ()})["rows"])

    def _run_within(self, task: Task, limit: float, log: Path) -> tuple[int | None, bool]:
        """The exit status, or None if the task was stopped; and whether it was stopped because it hung."""
        paths = [str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths), **task.environment}
        end = time.monotonic() + limit
        silence = (DRY_SILENCE if self.dry else SILENCE) if "--resume" in task.command else limit
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.command(task), cwd=common.ROOT, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                changed, seen = time.monotonic(), dict(self._seen)
                while process.poll() is None and time.monotonic() < min(end, changed + silence):
                    time.sleep(0.2)
                    self.collect()
                    if seen != self._seen:
                        changed, seen = time.monotonic(), dict(self._seen)
                return process.poll(), process.poll() is None and time.monotonic() < end
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
                    process.wait()

    def close(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


def run_all(run: Run, tasks: Sequence[Task], seconds: float) -> None:
    """Run what remains within ``seconds``; print the table whatever happens."""
    end = time.monotonic() + seconds - RESERVE
    try:
        for task in run.to_do(tasks):
            run.run(task, end)
            while run.tasks[task.name]["outcome"] in (HUNG, LOST) and run.tasks[task.name]["tries"] < TRIES:
                before = run.tasks[task.name]["tries"], run.rows(task)
                run.run(task, end)
                if (run.tasks[task.name]["tries"], run.rows(task)) == before:
                    break  # no time left
    finally:
        run.collect()
        run.save()
        run.close()
        print(run.table(), flush=True)


def keep(folder: Path) -> None:
    """Make the folder's records the committed ones of its kind of machine, and rewrite the page."""
    from bench import report

    saved = json.loads((folder / RECORDS).read_text(encoding="utf-8"))
    if saved["dry_run"]:
        raise ValueError(f"{folder}: expected records of a GPU, got those of a dry run")
    target = common.RESULTS / common.machine_kind(saved["machine"])
    target.mkdir(parents=True, exist_ok=True)
    for name, record in saved["records"].items():
        (target / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    report.write(plots=[target])


def status(run: Run) -> int:
    """The exit status, see the top of the file; says why where it is not 0."""
    if run.dry:
        from bench import gpu_dry

        if found := gpu_dry.surprises(run.tasks, run.records):
            print("dry run:", "; ".join(found), flush=True)
        return gpu_verdict.WRONG if found else gpu_verdict.HELD
    return gpu_verdict.verdict(run.tasks, run.records)[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results; a run in it is resumed")
    parser.add_argument("--resume", type=Path, metavar="EARLIER", help="folder of an earlier run to resume from")
    parser.add_argument("--step", type=int, nargs="+", help="of 1 to 4; default: all")
    parser.add_argument("--only", default="", help="tasks whose name contains this text")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which this run ends")
    parser.add_argument("--commit", default="", help="of these sources, for the records, if there is no git")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, with failures")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="commit the folder's records and rewrite the page")
    arguments = parser.parse_args(argv)
    if arguments.keep is not None:
        keep(arguments.keep)
        return 0
    if arguments.out is None:
        parser.error("--out: expected the folder of the results, got none")
    if arguments.commit:
        os.environ[common.COMMIT] = arguments.commit
    steps = arguments.step or [1, 2, 3, 4]
    tasks = [task for task in TASKS if task.step in steps and arguments.only in task.name]
    if not tasks:
        parser.error(f"--step, --only: expected some of {', '.join(task.name for task in TASKS)}, got no task")
    try:
        run = Run(arguments.out, described(), dry=arguments.dry_run, earlier=arguments.resume)
    except ValueError as error:
        parser.error(str(error))
    run_all(run, tasks, arguments.limit)
    return status(run)


if __name__ == "__main__":
    sys.exit(main())
