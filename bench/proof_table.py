"""Turns the records of `make proof` into a table with paired bootstrap intervals and a plot of the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from python_model.support.files import new_file

ROUNDS = 10_000
BUDGET = {"": "the same steps", "double-": "twice the steps"}
"""What the infix of a specialist's name says."""
Record = dict[str, Any]
Rows = Sequence[tuple[float, int]]
"""Of each conversation: the sum of its reply tokens' losses, and their number."""


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


def mean_losses(conversations: dict[str, Rows]) -> dict[str, float]:
    """Each data set's mean over tokens."""
    return {
        name: sum(loss for loss, _ in rows) / sum(count for _, count in rows) for name, rows in conversations.items()
    }


def relative_loss_difference(
    mine: Sequence[Rows], theirs: Sequence[Rows], rounds: int = ROUNDS
) -> tuple[float, float, float]:
    """By how much the mean over data sets of each one's mean over tokens differs, and its 95 % interval.

    The bootstrap resamples conversations within each data set, both models' together.
    """
    draw = np.random.default_rng(0)
    totals = np.zeros((2, 1 + rounds))
    for pair in zip(mine, theirs, strict=True):
        losses = np.array([[row[0] for row in rows] for rows in pair])
        counts = np.array([row[1] for row in pair[0]], dtype=float)
        times = draw.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), rounds)
        times = np.vstack([np.ones(len(counts), dtype=times.dtype), times])
        totals += (losses @ times.T) / (counts @ times.T)
    ratios = totals[0] / totals[1] - 1
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    return float(ratios[0]), float(low), float(high)


def table(records: Sequence[Record]) -> str:
    """Markdown: every run's figures, then unified against each specialist, per data set and overall."""
    records = [
        record | ({"losses": mean_losses(record["conversation_losses"])} if "conversation_losses" in record else {})
        for record in records
    ]
    lines = ["| run | steps | nDCG@10 | next-token loss | short answers |", "|---|---|---|---|---|"]
    for record in sorted(records, key=_order):
        cells = [
            f"{ndcg(record['ranks']).mean():.3f}" if "ranks" in record else "-",
            f"{np.mean(list(record['losses'].values())):.3f}" if record.get("losses") else "-",
            f"{np.mean(record['matches']):.3f}" if record.get("matches") else "-",
        ]
        lines.append(f"| {record['name']} | {record['steps']} | " + " | ".join(cells) + " |")
    lines += ["", "The loss is the mean over data sets of each one's mean over tokens.", ""]
    for kind in BUDGET:
        lines += _against(records, kind) + _against_generative(records, kind)
    lines += _losses(records)
    return "\n".join(lines).rstrip() + "\n"


def _pairs(records: Sequence[Record], mode: str, kind: str) -> list[tuple[Record, Record]]:
    """The unified run beside the specialist of each seed that has both."""
    named = {record["name"]: record for record in records}
    found = [(f"unified-{record['seed']}", f"{mode}-{kind}{record['seed']}") for record in records]
    return [(named[mine], named[theirs]) for mine, theirs in dict.fromkeys(found) if mine in named and theirs in named]


def _against(records: Sequence[Record], kind: str) -> list[str]:
    """Unified nDCG relative to the embedding specialist of the same seed; seeds are averaged per query."""
    pairs = _pairs(records, "embedding", kind)
    if not pairs:
        return []
    mine, theirs = (np.mean([ndcg(pair[side]["ranks"]) for pair in pairs], axis=0) for side in (0, 1))
    sets = np.asarray(pairs[0][0]["measured_on"]["sets"])
    lines = [
        f"Unified against the embedding specialist of {BUDGET[kind]} ({len(pairs)} seed(s)): relative difference of nDCG@10, "
        "95 % interval of the paired bootstrap over queries.",
        "",
        "| set | queries | unified | specialist | difference |",
        "|---|---|---|---|---|",
    ]
    for name in [*dict.fromkeys(sorted(sets)), "all"]:
        chosen = np.ones(len(sets), dtype=bool) if name == "all" else sets == name
        difference = "-"
        if theirs[chosen].mean() > 0:
            difference = _shown(*relative_difference(mine[chosen], theirs[chosen]))
        figures = f"{mine[chosen].mean():.3f} | {theirs[chosen].mean():.3f}"
        lines.append(f"| {name} | {chosen.sum()} | {figures} | {difference} |")
    by_seed = [
        (pair[0]["seed"], relative_difference(*(ndcg(record["ranks"]) for record in pair)))
        for pair in pairs
        if any(rank <= 10 for rank in pair[1]["ranks"])
    ]
    return [*lines, "", *_by_seed(by_seed)]


def _against_generative(records: Sequence[Record], kind: str) -> list[str]:
    """Unified next-token loss relative to the generative specialist of the same seed; seeds are averaged per conversation."""
    pairs = [
        pair for pair in _pairs(records, "generative", kind) if all("conversation_losses" in record for record in pair)
    ]
    if not pairs:
        return []
    lines = [
        f"Unified against the generative specialist of {BUDGET[kind]} ({len(pairs)} seed(s)): relative difference of the "
        "next-token loss, 95 % interval of the paired bootstrap over conversations (below 0 the unified model is better).",
        "",
        "| set | conversations | difference |",
        "|---|---|---|",
    ]
    names = sorted(pairs[0][0]["conversation_losses"])
    for name in [*names, "all"]:
        chosen = names if name == "all" else [name]
        mine, theirs = (
            [_averaged([pair[side]["conversation_losses"][own] for pair in pairs]) for own in chosen] for side in (0, 1)
        )
        rows = sum(len(pairs[0][0]["conversation_losses"][own]) for own in chosen)
        lines.append(f"| {name} | {rows} | {_shown(*relative_loss_difference(mine, theirs))} |")
    by_seed = [
        (
            pair[0]["seed"],
            relative_loss_difference(*([record["conversation_losses"][name] for name in names] for record in pair)),
        )
        for pair in pairs
    ]
    return [*lines, "", *_by_seed(by_seed)]


def _averaged(seeds: Sequence[Rows]) -> Rows:
    """Each conversation once, with its mean loss: as draws of their own, the seeds would make the interval too narrow."""
    return [(sum(loss for loss, _ in rows) / len(rows), rows[0][1]) for rows in zip(*seeds, strict=True)]


def _by_seed(differences: Sequence[tuple[int, tuple[float, float, float]]]) -> list[str]:
    """What each seed gives alone: the intervals are over rows, this is how much runs differ."""
    if len(differences) < 2:
        return []
    shown = "; ".join(f"seed {seed} {_shown(*difference)}" for seed, difference in differences)
    return [f"Each seed alone, all rows: {shown}.", ""]


def _shown(point: float, low: float, high: float) -> str:
    return f"{point:+.1%} [{low:+.1%}, {high:+.1%}]"


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
