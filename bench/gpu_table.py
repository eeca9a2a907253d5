"""The table at the end of a run on a borrowed GPU: less than 100 lines, from the records so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import common, gpu_verdict

MOST_LINES = 99
Row = Mapping[str, Any]


def table(machine: Row, tasks: Mapping[str, Row], records: Mapping[str, Row]) -> str:
    """Tasks and their outcomes, then a section per record, the most valuable first; last, whether results were right."""
    gpu = machine.get("gpu", {})
    name = gpu.get("name") or machine.get("processor")
    lines = [
        f"{name}, torch {machine.get('torch')}, triton {machine.get('triton')}, {gpu.get('clocks', '')}".rstrip(", ")
    ]
    lines += _section(
        [{"task": name, **found, "note": str(found.get("note", ""))[-70:]} for name, found in tasks.items()],
        ["task", "outcome", "seconds", "note"],
    )
    rows = {name: list(record["rows"]) for name, record in records.items()}
    lines += _section(rows.get("correctness_cuda", []), ["problem", "variant", "out", "dq", "dk", "dv", "right",
                                                         "differing_repeats", "note"])  # fmt: skip
    lines += _section(rows.get("ceilings_cuda", []), ["ceiling", "rate"])
    attention = [row for name in ("attention_cuda", "decode_cuda", "attention_all_cuda") for row in rows.get(name, [])]
    lines += _section(
        best_peers(attention), ["regime", "ms", "tflops", "gbps", "share", "atomics", "best peer", "its time", "note"]
    )
    for name in ("attention_hopper_cuda", "attention_tune_cuda", "attention_tune_all_cuda"):
        lines += _section(
            best_configs(rows.get(name, [])), ["kernel", "dim", "mode", "config", "ms", "of_gemm", "note"]
        )
    for name in ("hopper_tests", "tests"):
        lines += _section(rows.get(name, [])[:8], ["test", "result", "note"])
    sanitized = [{"task": name, **row} for name in sorted(rows) if "sanitizer" in name for row in rows[name]]
    lines += _section(sanitized, ["task", "errors", "note"])
    profiled = [row for name in sorted(rows) if name.startswith("ncu_") for row in rows[name]]
    lines += _section(profiled, list(dict.fromkeys(key for row in profiled for key in row)))
    lines += _section(rows.get("unified_cuda", []), ["work", "variant", "tokens_per_second", "times_packed", "of_gemm"])
    pooled = [row for row in rows.get("pooling_cuda", []) if row["variant"].startswith("grit")]
    lines += _section(pooled[:8], ["variant", "dtype", "tokens", "hidden", "of_ceiling", "milliseconds"])
    twins = [row for row in rows.get("cuda_twin_cuda", []) if row["variant"] == "cuda"]
    lines += _section(twins[:8], ["op", "problem", "milliseconds", "times_triton", "note"])
    columns = ["variant", "dtype", "queries", "passages", "forward_tflops", "step_speedup"]
    lines += _section(rows.get("contrastive_cuda", [])[:8], columns)
    lines += _section(
        rows.get("generative_loss_cuda", [])[:6], ["variant", "dtype", "vocabulary", "milliseconds", "speedup"]
    )
    most = MOST_LINES - 2
    if len(lines) > most:
        lines = [*lines[: most - 1], f".. {len(lines) - most + 1} more lines, see records.json"]
    lines += ["", gpu_verdict.verdict(tasks, records)[1]]
    return "\n".join(line[:170] for line in lines)


def _section(rows: Sequence[Row], columns: list[str]) -> list[str]:
    shown = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    return ["", *common.table([dict(row) for row in rows], shown).splitlines()] if rows else []


def best_peers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line per regime: this package, the fastest peer and its time relative to ours, and what failed. ``atomics``: the relative
    time of a backward pass with atomics."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = found.setdefault(row["regime"], {"regime": row["regime"]})
        if "ms" not in row:
            why = f"{row['variant']}: {row['note']}"
            if why not in line.get("note", ""):
                line["note"] = "; ".join(filter(None, [line.get("note"), why]))
        elif row["variant"] == "grit":
            share = next((row[name] for name in ("of_gemm", "of_copy", "of_read") if name in row), None)
            line |= {"ms": row["ms"], "tflops": row["tflops"], "gbps": row.get("gbps", ""), "share": share}
        elif row["variant"] == "grit, atomics":
            line["atomics"] = row["times_grit"]
        elif not row["variant"].startswith("grit") and row["variant"] != "matmul only":
            if row["times_grit"] < line.get("its time", float("inf")):
                line |= {"best peer": row["variant"], "its time": row["times_grit"]}
    return [{**line, "note": line.get("note", "")[:60]} for line in found.values()]


def best_configs(rows: Sequence[Row]) -> list[Row]:
    """The table's entry and the two fastest, per kernel, head size and mode."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["dim"], row["mode"]), []).append(row)
    found = []
    for group in groups.values():
        timed = sorted((row for row in group if "ms" in row), key=lambda row: row["ms"])
        entry = [row for row in group if row.get("note") == "table"]
        found += entry + [row for row in timed[:2] if row not in entry]
    return found
