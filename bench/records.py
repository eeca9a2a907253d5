"""Compares benchmark records: finds the same measurement in two of them, and what moved beyond noise.

A row is a variant in a setting. It is identified by its texts, integers, flags and lists of them; its floats are the
measurements. Machines differ and drift, so ratios are compared instead of times: each variant against the first of its setting.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOISE = 0.10
"""Ratios closer than this never count as moved."""

NOT_IDENTITY = ("variant", "cached", "read", "same_tokens")
"""Integers and flags that are measured or depend on the variant."""

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Ratio:
    """A variant's time over that of the first variant of its setting, and the relative scatter of the repeats."""

    value: float
    scatter: float


@dataclass(frozen=True)
class Move:
    """A ratio that differs between two records by more than the scatter of both."""

    setting: str
    variant: str
    before: float
    after: float


def read(path: Path) -> dict[str, Any]:
    """A record file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def setting(row: Mapping[str, Any]) -> Key:
    """What a row measures, apart from the variant."""
    found = []
    for name, value in row.items():
        if name in NOT_IDENTITY or isinstance(value, float) or value is None:
            continue
        if isinstance(value, list) and any(isinstance(x, float) for x in value):
            continue
        if isinstance(value, list | dict) and len(str(value)) > 80:
            continue
        if isinstance(value, str | int | bool | list | tuple):
            found.append((name, json.dumps(value)))
    return tuple(sorted(found))


def seconds_of(row: Mapping[str, Any]) -> list[float]:
    """Every repeat's time."""
    for name in ("all_seconds", "seconds"):
        if isinstance(row.get(name), list) and row[name]:
            return [float(x) for x in row[name]]
    return [float(row["seconds"])] if isinstance(row.get("seconds"), int | float) else []


def ratios(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Key, str], Ratio]:
    """Per (setting, variant); settings with one variant and rows without repeats are left out."""
    groups: dict[Key, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "variant" in row and len(seconds_of(row)) > 1:
            groups.setdefault(setting(row), []).append(row)
    found = {}
    for key, members in groups.items():
        base = statistics.median(seconds_of(members[0]))
        for row in members[1:]:
            times = seconds_of(row)
            value = statistics.median(times) / base
            scatter = _scatter(times) + _scatter(seconds_of(members[0]))
            found[(key, str(row["variant"]))] = Ratio(value, scatter)
    return found


def _scatter(times: list[float]) -> float:
    middle = statistics.median(times)
    return statistics.median(abs(t - middle) for t in times) / middle if middle else 0.0


def moved(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> tuple[int, list[Move]]:
    """How many ratios both records have, and those that moved beyond noise, the largest first."""
    old, new = ratios(before), ratios(after)
    common = [key for key in new if key in old]
    moves = []
    for key in common:
        a, b = old[key], new[key]
        if abs(math.log(b.value / a.value)) > max(NOISE, 3 * max(a.scatter, b.scatter)):
            name = ", ".join(json.loads(value) if value.startswith('"') else f"{k} {value}" for k, value in key[0])
            moves.append(Move(name, key[1], a.value, b.value))
    moves.sort(key=lambda move: -abs(math.log(move.after / move.before)))
    return len(common), moves
