"""Plots of records: one bar per row, time beside memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import RESULTS


def draw(
    rows: Sequence[dict[str, Any]], path: str | Path, setting: Sequence[str], values: Sequence[tuple[str, str]]
) -> Path:
    """Bars of ``values`` (name in the row, axis label) side by side; ``setting`` names what tells groups of bars apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    target = Path(path)
    if not target.is_absolute() and target.parent == Path("."):
        target = RESULTS / target
    shown = [row for row in rows if any(row.get(name) for name, _ in values)]
    groups = list(dict.fromkeys(tuple(str(row.get(name, "")) for name in setting) for row in shown))
    labels = [f"{row['variant']}  ({', '.join(str(row.get(name, '')) for name in setting)})" for row in shown]
    colours = [f"C{groups.index(tuple(str(row.get(name, '')) for name in setting)) % 10}" for row in shown]
    figure, axes = pyplot.subplots(
        1, len(values), figsize=(4 + 4 * len(values), 1 + 0.2 * len(shown)), sharey=True, constrained_layout=True
    )
    for axis, (name, label) in zip(axes, values, strict=True):
        axis.barh(range(len(shown)), [row.get(name) or 0.0 for row in shown], color=colours)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(shown)), labels, fontsize=7)
    axes[0].invert_yaxis()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return target
