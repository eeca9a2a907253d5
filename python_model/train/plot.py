"""Plots of training runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from python_model.support.files import new_file
from python_model.support.optional import require


def plot_losses(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses of a run (records of ``log.jsonl``) as a PNG, one panel per objective; writes nothing if there are none."""
    require("matplotlib", "train")
    # not pyplot: its backend is that of the process, which may be a notebook
    from matplotlib.figure import Figure

    kinds = [
        (key, title)
        for key, title in (("contrastive_loss", "contrastive loss"), ("generative_loss", "next-token loss"))
        if any(record[key] is not None for record in records)
    ]
    if not kinds:
        return
    figure = Figure(figsize=(5 * len(kinds), 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)
    for panel, (key, title) in zip(panels[0], kinds, strict=True):
        points = [(record["step"], record[key]) for record in records if record[key] is not None]
        steps, values = zip(*points, strict=True)
        panel.plot(steps, values, color="0.75", linewidth=1, label="step")
        width = max(1, len(values) // 8)
        smooth = [
            sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))
        ]
        panel.plot(steps, smooth, color="tab:blue", label=f"mean of {width} steps")
        panel.set(title=title, xlabel="step", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
