"""Whether the results of a run on a borrowed GPU were right: the last line of its table, and its exit status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.attention import BEGAN
from bench.attention_peers import DIFFERS, NOT_ATTENTION

HELD, WRONG, UNCHECKED = 0, 1, 3
"""Exit statuses; 2 is that of a wrong command line."""
MOST_SHOWN = 3
Row = Mapping[str, Any]


def verdict(tasks: Mapping[str, Row], records: Mapping[str, Row]) -> tuple[int, str]:
    """An exit status and the line that says why."""
    if found := wrong(tasks, records):
        more = f"; {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
        return WRONG, f"correctness did not hold: {'; '.join(found[:MOST_SHOWN])}{more}"
    if not tasks.get("correctness_cuda", {}).get("ended"):
        return UNCHECKED, "correctness was not checked to the end"
    return HELD, "correctness held"


def wrong(tasks: Mapping[str, Row], records: Mapping[str, Row]) -> list[str]:
    """What speaks against this package's results: in the comparison with the reference, in tests, in compute-sanitizer, in
    regimes where this package fails or no peer agrees with it. A peer that is alone in differing does not."""
    everything = [row for record in records.values() for row in record["rows"]]
    agreeing = {row["regime"] for row in everything if "regime" in row and "ms" in row and not _ours(row)}
    found: dict[str, str] = {}  # what, and the record that says so
    for name, record in records.items():
        for row in record["rows"]:
            found |= dict.fromkeys(_against(name, row, agreeing), name)
    for name, task in tasks.items():
        checks = name in ("correctness_cuda", "tests") or name.startswith("sanitizer")
        failed = str(task["outcome"]).startswith(("failed", "hung", "lost"))
        if checks and failed and name not in found.values():
            found[f"{name} {task['outcome']}"] = name
    return list(found)


def _against(name: str, row: Row, agreeing: set[str]) -> list[str]:
    """What a row of a record says; ``agreeing``: regimes in which a peer's results are ours."""
    found = []
    if row.get("right") is False:
        found.append(f"{row['problem']}, {row['variant']}: not right {row.get('note', '')}".rstrip())
    if row.get("differing_repeats"):
        found.append(f"{row['problem']}: {row['differing_repeats']} repeats differ")
    if row.get("result") == "failed":
        found.append(f"{row['test']} failed")
    if row.get("errors"):
        found.append(f"{name}: errors {row['errors']}")
    if "regime" in row:
        note = str(row.get("note", ""))
        failed = _ours(row) and "ms" not in row and note != BEGAN
        if failed or (note.startswith(DIFFERS) and row["regime"] not in agreeing):
            found.append(f"{row['regime']}, {row['variant']}: {note}")
    return found


def _ours(row: Row) -> bool:
    return row["variant"].startswith("grit") or row["variant"] in NOT_ATTENTION
