"""What all benchmarks share: interleaved timing, the machine's own ceilings, and the record format.

Machines are noisy, so a speed is never a single number: variants run interleaved (A B A B ..), a row keeps the median, and it is
compared with a ceiling (a large matrix product, a large copy) measured in the same run.

A record file is one JSON object ``{"machine": {..}, "command": .., "rows": [{..}, ..]}``; a row holds what was run, its shape,
and the median and all repeats in seconds.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from python_model.support.precision import is_emulated
from python_model.support.resume import JsonLines
from python_model.support.tables import aligned

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
"""Smaller products do not reach the machine's peak."""
COMMIT = "GRIT_KERNELS_COMMIT"
"""Environment variable with the commit of sources that came without git."""
CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
    "asimd",
    "bf16",
    "sve",
)
"""Instruction sets that a record lists, as /proc/cpuinfo spells them."""


def synchronizer(device: str | torch.device) -> Callable[[], None]:
    """A function that waits for the device's queued work; on the CPU it does nothing."""
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)


def interleave(
    variants: dict[str, Callable[[], Any]],
    repeats: int = 7,
    sync: Callable[[], None] | None = None,
    warmup: int = 2,
    before: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each variant, ``repeats`` times in the order A B C A B C ..; ``before`` runs untimed before each call."""
    wait = sync or (lambda: None)
    for _ in range(warmup):
        for run in variants.values():
            run()
    wait()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            if before is not None:
                before()
                wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def interleave_events(
    variants: dict[str, Callable[[], Any]], repeats: int = 7, warmup: int = 2, round_seconds: float = 0.02
) -> dict[str, list[float]]:
    """:func:`interleave` for a GPU: seconds per call from device events around as many back-to-back calls as fill
    ``round_seconds``, so that the host's launch overhead hides behind the previous kernel."""
    calls = {}
    for name, run in variants.items():
        for _ in range(warmup):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        calls[name] = max(1, min(100, round(round_seconds / max(time.perf_counter() - start, 1e-6))))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls[name]):
                run()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3 / calls[name])
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Median over the repeats of ``time(variant) / time(base)`` in the same round: the machine's drift cancels."""
    return {
        name: statistics.median(a / b for a, b in zip(values, seconds[base], strict=True))
        for name, values in seconds.items()
    }


def peak_resident_bytes() -> int:
    """The process's largest resident set so far. ``ru_maxrss`` would start at that of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gemm_ceiling(
    device: str | torch.device, dtype: torch.dtype, size: int | None = None
) -> tuple[Callable[[], Any], float]:
    """A large square matrix product ``(run, flops)``: put ``run`` among the variants to get its rate in the same run. Its result
    goes into memory already allocated, as fresh pages would cost part of the time."""
    n = size or GEMM_SIZE[torch.device(device).type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> Any:
        with torch.no_grad():  # out= does not support gradients, and a backward pass is timed with them enabled
            return torch.mm(a, b, out=out)

    return run, 2.0 * n**3


def copy_ceiling(device: str | torch.device, megabytes: int | None = None) -> tuple[Callable[[], Any], float]:
    """A large copy ``(run, bytes moved)``, reads and writes counted."""
    size = megabytes or (2048 if torch.device(device).type == "cuda" else 256)
    source = torch.randn(size * 2**18, device=device)
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 2.0 * source.numel() * 4


def read_ceiling(device: str | torch.device, megabytes: int = 256) -> tuple[Callable[[], Any], float]:
    """A sum over a large tensor ``(run, bytes read)``."""
    source = torch.randn(megabytes * 2**18, device=device)
    return (lambda: source.sum()), float(source.numel() * 4)


def fresh_read_ceiling(size: float, pool_megabytes: int = 512) -> tuple[Callable[[], Any], float]:
    """A sum over ``size`` bytes of CPU memory ``(run, bytes read)``; every call reads different ones, so no cache holds them."""
    count = int(size) // 4
    parts = itertools.cycle(torch.randn(max(pool_megabytes * 2**18, 3 * count)).split(count)[:-1])
    return (lambda: next(parts).sum()), float(count * 4)


def _command(*arguments: str) -> str:
    """What a command prints; empty if it fails or is not installed."""
    if shutil.which(arguments[0]) is None:
        return ""
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""


def _cpuinfo(name: str) -> str:
    """The first value of a field of /proc/cpuinfo; empty if there is none."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.split(":", 1)[0].strip() == name:
                return line.split(":", 1)[1].strip()
    return ""


def cpu_features() -> list[str]:
    """Those of this CPU's instruction sets that matter for speed here."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in CPU_FEATURES if name in flags]


def machine_kind(described: Mapping[str, Any]) -> str:
    """The folder of a machine's records: its GPU, or its CPU's maker and widest instruction set for bfloat16. Ratios between
    variants carry over within a kind, not between kinds."""
    if "gpu" in described:
        return re.sub(r"[^a-z0-9]+", "-", described["gpu"]["name"].lower()).strip("-")
    processor = str(described["processor"]).lower()
    maker = next((name for name in ("amd", "intel", "apple", "neoverse", "arm") if name in processor), "cpu")
    # older records list what the library could use
    features = described.get("cpu_features") or described.get("instruction_sets", [])
    best = next(
        (n for n in ("amx_bf16", "avx512_bf16", "avx512f", "avx512", "avx2", "sve", "asimd") if n in features), ""
    )
    return "-".join(filter(None, (maker, {"amx_bf16": "amx", "avx512f": "avx512"}.get(best, best))))


def machine() -> dict[str, Any]:
    """Hardware, versions and commit, as recorded in every record."""
    import grit_kernels
    from grit_kernels import _library

    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "grit_kernels": grit_kernels.__version__,
        "cpu_features": cpu_features(),
        "instruction_sets": _library.cpu_isas() if _library.status().loaded else [],
        "commit": _command("git", "rev-parse", "HEAD") or os.environ.get(COMMIT, ""),
        "modified": bool(
            _command("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        ),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "clocks": _command("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"),
        }
    return found


def result_path(path: str | Path) -> Path:
    """Where a record or plot is written: a bare name goes into the folder of this kind of machine."""
    target = Path(path)
    if not target.is_absolute() and target.parent == Path("."):
        target = RESULTS / machine_kind(machine()) / target
    return target


def write_records(
    path: str | Path, rows: Iterable[dict[str, Any]], replaces: Callable[[dict[str, Any]], bool] | None = None
) -> Path:
    """Write the rows with the machine's description; a bare name goes into bench/results, in the folder of this kind of machine.

    Args:
        replaces: whether a row of the existing record has been measured again; other rows stay, with their commit and date.
            Default: all rows are replaced.

    Raises:
        ValueError: rows measured on another kind of machine would stay.
    """
    target = result_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    here, kept, found = machine(), [], list(rows)
    if replaces is not None and target.exists():
        before = json.loads(target.read_text())
        kept = [row for row in before["rows"] if not replaces(row)]
        if kept and machine_kind(before["machine"]) != machine_kind(here):
            raise ValueError(
                f"{target}: expected a record of this kind of machine ({machine_kind(here)}), got one of "
                f"{machine_kind(before['machine'])}"
            )
        place = next((i for i, row in enumerate(before["rows"]) if replaces(row)), len(before["rows"]))
        start = sum(not replaces(row) for row in before["rows"][:place])
        origin = f"{before['machine']['commit'][:10]}, {before['machine']['time'][:10]}"
        kept = [{**row, "measured": row.get("measured", origin)} for row in kept]
        found = [*kept[:start], *found, *kept[start:]]
    record = {"machine": here, "command": " ".join(["python", "-m", *_module_arguments()]), "rows": found}
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(target)
    return target


def labelled(model: str) -> tuple[str, str]:
    """Label and checkpoint of ``LABEL=checkpoint``; a checkpoint alone is labelled by its name."""
    label, equals, path = model.partition("=")
    return (label, path) if equals else (Path(model).name, model)


def open_answers(path: Path, settings: dict[str, Any], asked: Sequence[list[str]]) -> JsonLines:
    """The answers of an earlier run, which may have asked more or less, or a new file. Its first row holds the settings, the next
    ones belong to ``asked`` in its order and hold it under that name.

    Raises:
        ValueError: the file has other settings, or answers to something else.
    """
    log = JsonLines(path)
    if not log.rows:
        log.append(settings)
    known = [row["asked"] for row in log.rows[1 : len(asked) + 1]]
    if log.rows[0] != settings or known != list(asked[: len(known)]):
        log.close()
        raise ValueError(f"output: {path} holds answers with another model, data or settings; use another folder")
    return log


def kernel_parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options of a single kernel's benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--record", help="JSON file, a bare name goes into bench/results/KIND")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    return parser


def model_dtype(device: str | torch.device = "cpu") -> str:
    """The dtype that models compute in on this machine by default: bfloat16, or float32 on a CPU that emulates its products."""
    return "float32" if is_emulated(torch.bfloat16, torch.device(device)) else "bfloat16"


def named_dtype(dtype: str) -> dict[str, str]:
    """What a row tells of the dtype; rows of models that name none are in bfloat16."""
    return {} if dtype == "bfloat16" else {"dtype": dtype}


def measure_shapes(
    options: argparse.Namespace, shapes: Sequence[tuple[int, int, int]], measure: Callable[..., list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """``measure(device, shape, dtype, repeats)`` for every shape, first in bfloat16, then in float32. The record is written after
    each, so an interrupted run keeps its rows."""
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape in shapes:
            rows += measure(options.device, shape, dtype, options.repeats)
            if options.record:
                write_records(options.record, rows)
    return rows


def _module_arguments() -> list[str]:
    """The running module and its arguments, with paths relative to the checkout."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = spec.name if spec is not None else Path(sys.argv[0]).stem
    return [module, *(argument.removeprefix(f"{ROOT}{os.sep}") for argument in sys.argv[1:])]


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """The rows as aligned text."""
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    return aligned([columns, ["-" * len(column) for column in columns], *cells])


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
