"""Turns the records of `make proof` into a table with paired bootstrap intervals and a plot of the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from python_model.support.files import new_file

ROUNDS = 10_000
Record = dict[str, Any]


def ndcg(ranks: Sequence[int]) -> np.ndarray:
    """nDCG@10 of each query with one relevant passage at these ranks."""
    places = np.asarray(ranks, dtype=float)
    return np.where(places <= 10, 1 / np.log2(1 + places), 0.0)


def relative_difference(mine: np.ndarray, theirs: np.ndarray, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """``mean(mine) / mean(theirs) - 1`` and its 95 % interval, by resampling the queries (both models' scores together)."""
    point = mine.mean() / theirs.mean() - 1
    draw = np.random.default_rng(0)
    ratios = np.empty(rounds)
    for index in range(rounds):
        chosen = draw.integers(0, len(mine), len(mine))
        ratios[index] = mine[chosen].mean() / max(theirs[chosen].mean(), 1e-12) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(point), float(low), float(high)


def table(records: Sequence[Record]) -> str:
    """Markdown: every run's figures, then unified against each specialist, per data set and overall."""
    lines = ["| run | steps | nDCG@10 | next-token loss | short answers |", "|---|---|---|---|---|"]
    for record in sorted(records, key=_order):
        cells = [
            f"{ndcg(record['ranks']).mean():.3f}" if "ranks" in record else "-",
            f"{np.mean(list(record['losses'].values())):.3f}" if record.get("losses") else "-",
            f"{np.mean(record['matches']):.3f}" if record.get("matches") else "-",
        ]
        lines.append(f"| {record['name']} | {record['steps']} | " + " | ".join(cells) + " |")
    lines += ["", "The loss is the mean over data sets of each one's mean over tokens.", ""]
    lines += _against(records, "embedding", "")
    lines += _against(records, "embedding", "double-")
    lines += _losses(records)
    return "\n".join(lines).rstrip() + "\n"


def _against(records: Sequence[Record], mode: str, kind: str) -> list[str]:
    """Unified nDCG relative to the embedding specialist of the same seed; seeds are averaged per query."""
    pairs = [
        (mine, theirs)
        for theirs in records
        for mine in records
        if theirs["name"] == f"{mode}-{kind}{theirs['seed']}" and mine["name"] == f"unified-{theirs['seed']}"
    ]
    if not pairs:
        return []
    mine, theirs = (np.mean([ndcg(pair[side]["ranks"]) for pair in pairs], axis=0) for side in (0, 1))
    sets = np.asarray(pairs[0][0]["measured_on"]["sets"])
    budget = "twice the steps" if kind else "the same steps"
    lines = [
        f"Unified against the embedding specialist of {budget} ({len(pairs)} seed(s)): relative difference of nDCG@10, "
        "95 % interval of the paired bootstrap over queries.",
        "",
        "| set | queries | unified | specialist | difference |",
        "|---|---|---|---|---|",
    ]
    for name in [*dict.fromkeys(sorted(sets)), "all"]:
        chosen = np.ones(len(sets), dtype=bool) if name == "all" else sets == name
        difference = "-"
        if theirs[chosen].mean() > 0:
            point, low, high = relative_difference(mine[chosen], theirs[chosen])
            difference = f"{point:+.1%} [{low:+.1%}, {high:+.1%}]"
        figures = f"{mine[chosen].mean():.3f} | {theirs[chosen].mean():.3f}"
        lines.append(f"| {name} | {chosen.sum()} | {figures} | {difference} |")
    return [*lines, ""]


def _losses(records: Sequence[Record]) -> list[str]:
    """Next-token loss per data set, one column per run."""
    with_losses = [record for record in sorted(records, key=_order) if record.get("losses")]
    if not with_losses:
        return []
    names = sorted({name for record in with_losses for name in record["losses"]})
    lines = ["| next-token loss | " + " | ".join(record["name"] for record in with_losses) + " |"]
    lines.append("|---" * (len(with_losses) + 1) + "|")
    for name in names:
        cells = [f"{record['losses'][name]:.3f}" if name in record["losses"] else "-" for record in with_losses]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _order(record: Record) -> tuple[int, str]:
    kinds = ("BM25", "base", "unified", "embedding", "generative")
    kind = next((i for i, name in enumerate(kinds) if record["name"].startswith(name)), len(kinds))
    return kind, record["name"]


def plot(records: Sequence[Record], path: Path) -> None:
    """Curves of the runs: nDCG@10 and next-token loss over the share of the steps, and both gradient norms of unified runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = any(record.get("curve") for record in records)  # a plan may measure only at the end
    figure, drawn = plt.subplots(1, 3 if curves else 1, figsize=(12 if curves else 5, 3.4), constrained_layout=True)
    panels = drawn if curves else [None, None, drawn]
    colours = {"unified": "tab:blue", "embedding": "tab:orange", "generative": "tab:green"}
    for record in sorted(records, key=_order):
        points = sorted(record.get("curve", {}).values(), key=lambda p: p["share"])
        style: dict[str, Any] = {"color": colours.get(record["mode"], "0.5"), "marker": "o", "label": record["name"]}
        style["linestyle"] = "--" if "double" in record["name"] else "-"
        for panel, key in ((panels[0], "ranks"), (panels[1], "losses")):
            values = [
                ndcg(p[key]).mean() if key == "ranks" else np.mean(list(p[key].values())) for p in points if p.get(key)
            ]
            if values and panel is not None:
                panel.plot([p["share"] * 100 for p in points if p.get(key)], values, **style)
        for key, colour in (("contrastive_grad_norm", "tab:orange"), ("generative_grad_norm", "tab:green")):
            if record["mode"] == "unified" and record.get("log"):
                panels[2].plot(
                    [r["step"] for r in record["log"]],
                    [r[key] for r in record["log"]],
                    color=colour,
                    lw=1,
                    label=f"{record['name']} {key.split('_')[0]}",
                )
    for panel, title in zip(panels, ("nDCG@10", "next-token loss", "gradient norms of unified runs"), strict=True):
        if panel is None:
            continue
        panel.set(title=title, xlabel="% of the steps" if panel is not panels[2] else "step")
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=7)
    panels[2].set_yscale("log")
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
