"""Plots of training runs and of ablations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from python_model.support.files import new_file
from python_model.support.optional import require


def plot_losses(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses of a run (records of ``log.jsonl``) as a PNG, one panel of 600 pixels per objective.

    Writes nothing if there are none, nor without matplotlib: a note says how to install it. The log holds the losses anyway.
    """
    try:
        require("matplotlib", "train")
    except ImportError as error:
        print(f"note: no {path.name}, as {error}", flush=True)
        return
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


def plot_ablation(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw an ablation's rows (:mod:`python_model.train.ablation`) as a PNG: nDCG@10 and next-token loss.

    It is 1080 pixels wide. Each variant has a bar in the color of its group, or none where it has no such score.
    """
    require("matplotlib", "train")
    from matplotlib.figure import Figure

    names = [f"{row['group']}: {row['variant']}" if row["group"] else row["variant"] for row in rows]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    colors = [f"C{groups.index(row['group']) % 10}" for row in rows]
    figure = Figure(figsize=(9, 1 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, squeeze=False, sharey=True)[0]
    places = range(len(rows))
    for panel, (key, title) in zip(
        panels,
        (("ndcg_at_10", "nDCG@10, higher is better"), ("next_token_loss", "next-token loss, lower is better")),
        strict=True,
    ):
        values = [row["scores"][key] for row in rows]
        bars = panel.barh(places, [value or 0.0 for value in values], color=colors)
        panel.bar_label(bars, ["-" if value is None else f"{value:.3f}" for value in values], padding=3, fontsize=7)
        panel.set(title=title, xlim=(0, 1.2 * max([value or 0.0 for value in values]) or 1.0))
        panel.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(places, names)
    panels[0].invert_yaxis()
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
