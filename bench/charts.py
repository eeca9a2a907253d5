"""The plots of records, all in one style; ``python -m bench.report --plots`` redraws them from the committed rows.

Most show speed-ups: a row per setting, a facet per named peer, the peer's time relative to this package's. Right of the line at
1, this package is faster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
Table = dict[str, dict[str, float]]
"""Ratio by setting and peer."""

FASTER, SLOWER, NEUTRAL = "#2a6fbb", "#d1712b", "#9a9a9a"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}
PEERS = {
    "sdpa masked": "SDPA, dense mask",
    "sdpa loop": "SDPA, per sample",
    "sdpa split": "SDPA, two launches",
    "flex": "FlexAttention,\ncompiled",
}


@contextlib.contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[Any]:
    """An array (rows, columns) of panels; saved to ``path`` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        drawing, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, **options)
        yield panels
        drawing.savefig(path)
        pyplot.close(drawing)


def facets(table: Table, path: Path, *, unit: str = "peer's time over grit_kernels'") -> None:
    """A panel per peer with a bar per setting; a setting that a peer did not run has no bar."""
    peers = list(dict.fromkeys(peer for ratios in table.values() for peer in ratios))
    settings = list(table)
    most = max(ratio for ratios in table.values() for ratio in ratios.values())
    least = min(ratio for ratios in table.values() for ratio in ratios.values())
    size = (2.2 + 1.75 * len(peers), 0.8 + 0.21 * len(settings))
    with figure(path, 1, len(peers), size, sharey=True, sharex=True) as panels:
        for panel, peer in zip(panels[0], peers, strict=True):
            for place, setting in enumerate(settings):
                ratio = table[setting].get(peer)
                if ratio is None:
                    continue
                panel.barh(place, ratio - 1, left=1, height=0.7, color=FASTER if ratio >= 1 else SLOWER)
                panel.annotate(
                    f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x",
                    (max(ratio, 1), place),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
            panel.axvline(1, color="black", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_xlim(min(0.5, least / 1.2), max(2.0, most) * 2.2)
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.set_title(peer)
        panels[0][0].set_yticks(range(len(settings)), settings)
        panels[0][0].invert_yaxis()
        panels[0][len(peers) // 2].set_xlabel(unit)


def speedups(
    rows: Rows, setting: Callable[[dict[str, Any]], str], values: dict[str, str], peers: dict[str, str] | None = None
) -> Table:
    """The table of :func:`facets` from rows that hold their own ratio to this package.

    Args:
        setting: the name of a row's setting.
        values: fields that hold a ratio, and what is appended to the setting's name for each.
        peers: titles by variant; default: all variants but this package's.
    """
    table: Table = {}
    for field, suffix in values.items():
        for row in rows:
            name = str(row["variant"])
            ours = name.startswith(("grit", "decode", "packed"))
            if (name not in peers if peers else ours) or not isinstance(row.get(field), float):
                continue
            table.setdefault(setting(row) + suffix, {})[peers[name] if peers else name] = row[field]
    return table


def attention(rows: Rows, path: Path) -> None:
    """Every regime against each peer."""
    facets(speedups(rows, lambda row: str(row["regime"]), {"times_grit": ""}, PEERS), path)


def pooling(rows: Rows, path: Path) -> None:
    """Every shape against each way to compute the same mean."""

    def setting(row: dict[str, Any]) -> str:
        return f"{row['dtype']}, {row['tokens']} x {row['hidden']}, {row['samples']} texts"

    facets(speedups([row for row in rows if row["variant"] != "ceiling"], setting, {"speedup": ""}), path)


def contrastive(rows: Rows, path: Path) -> None:
    """Forward alone, and a whole step."""
    shown = [row for row in rows if "queries" in row]

    def setting(row: dict[str, Any]) -> str:
        return f"{row['dtype']}, {row['queries']} x {row['passages']}"

    facets(speedups(shown, setting, {"forward_speedup": ", forward", "step_speedup": ", step"}), path)


def generative_loss(rows: Rows, path: Path) -> None:
    """Forward and backward."""
    shown = [row for row in rows if row["variant"] != "gemm"]
    facets(speedups(shown, lambda row: f"{row['dtype']}, vocabulary {row['vocabulary']}", {"speedup": ""}), path)


def model(rows: Rows, path: Path) -> None:
    """Left: the same work in less time. Right: where a pass spends its time."""
    parts = [row for row in rows if "part" in row]
    speeds = [row for row in rows if "time_over_first" in row and row["time_over_first"] != 1.0]
    with figure(path, 1, 2, (9, 2.4)) as panels:
        left, right = panels[0]
        names = [f"{row['group']}:\n{row['variant']}" for row in speeds]
        bars = left.barh(names, [row["time_over_first"] for row in speeds], color=FASTER)
        left.bar_label(bars, [f"{row['time_over_first']:.1f}x" for row in speeds], padding=3, fontsize=7)
        left.set(xlabel="peer's time over grit_kernels'", title="135M model, texts of 8 to 512 tokens")
        left.margins(x=0.15)
        left.invert_yaxis()
        passes = list(dict.fromkeys(str(row["variant"]) for row in parts))
        begins = dict.fromkeys(passes, 0.0)
        for part in dict.fromkeys(str(row["part"]) for row in parts):
            own = {str(row["variant"]): float(row["seconds"]) for row in parts if row["part"] == part}
            right.barh(passes, [own.get(name, 0.0) for name in passes], left=list(begins.values()), label=part)
            begins = {name: begins[name] + own.get(name, 0.0) for name in passes}
        right.set(xlabel="seconds of one batch", title="where a pass spends its time")
        right.invert_yaxis()
        if parts:
            right.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def train(rows: Rows, path: Path) -> None:
    """Tokens per second beside the memory of a step."""
    names = [str(row["variant"]) for row in rows]
    colours = [FASTER if name.startswith("packed") else NEUTRAL for name in names]
    with figure(path, 1, 2, (8, 0.8 + 0.3 * len(rows)), sharey=True) as panels:
        for panel, field, label in (
            (panels[0][0], "tokens_per_second", "tokens per second"),
            (panels[0][1], "memory_mib", "MiB of one step"),
        ):
            bars = panel.barh(names, [row[field] for row in rows], color=colours)
            panel.bar_label(bars, [f"{row[field]:,.0f}" for row in rows], padding=3, fontsize=7)
            panel.set_xlabel(label)
            panel.margins(x=0.2)
        panels[0][0].invert_yaxis()


def rag(rows: Rows, path: Path) -> None:
    """Time over length, one panel per sample, one line per mode."""
    samples = list(dict.fromkeys(str(row["sample"]) for row in rows))
    with figure(path, 1, len(samples), (4.5 * len(samples), 3), sharey=True) as panels:
        for panel, sample in zip(panels[0], samples, strict=True):
            for mode in dict.fromkeys(str(row["variant"]) for row in rows):
                line = [r for r in rows if r["sample"] == sample and r["variant"] == mode]
                x, y, spread = ([r[name] for r in line] for name in ("length", "median_s", "spread_s"))
                panel.errorbar(x, y, yerr=spread, marker="o", markersize=3, capsize=2, linewidth=1, label=mode)
            panel.set(title=sample, xlabel="tokens")
            panel.grid(True)
        panels[0][0].set_ylabel("seconds to the last new token")
        panels[0][-1].legend(fontsize=7)


def rag_quality(rows: Rows, path: Path) -> None:
    """F1 over the time to the first token, with the interval of the difference to full prefill; one panel per model. The
    line joins the variants that no other beats in both. Nothing is drawn where no times were measured."""
    rows = [row for row in rows if row["first_token_s"] is not None]
    if not rows:
        return
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    names = list(dict.fromkeys(str(row["variant"]) for row in rows))
    with figure(path, 1, len(models), (4.5 * len(models), 3.2), sharey=True) as panels:
        for panel, model in zip(panels[0], models, strict=True):
            own = [row for row in rows if row["model"] == model]
            full = next(row["f1"] for row in own if row["variant"] == "full prefill")
            for row in own:
                below, above = (
                    max(row["f1"] - full * (1 + row["f1_low"]), 0.0),
                    max(full * (1 + row["f1_high"]) - row["f1"], 0.0),
                )
                panel.errorbar(
                    row["first_token_s"],
                    row["f1"],
                    yerr=[[below], [above]],
                    marker="o",
                    capsize=2,
                    linestyle="none",
                    color=f"C{names.index(row['variant'])}",
                    label=row["variant"],
                )
            best: list[tuple[float, float]] = []
            for time, score in sorted((row["first_token_s"], row["f1"]) for row in own):
                if not best or score > best[-1][1]:
                    best.append((time, score))
            panel.plot(*zip(*best, strict=True), color=NEUTRAL, linewidth=0.8, zorder=0)
            panel.set(title=model + ("" if own[0]["valid"] else " (not valid)"), xlabel="seconds to the first token")
        panels[0][0].set_ylim(bottom=0)  # only now: it ends the scaling of an axis that all share
        panels[0][0].set_ylabel("F1, %")
        panels[0][-1].legend(fontsize=6)


def serve(rows: Rows, path: Path) -> None:
    """Waiting times and throughput over the open load, a line per system; filled where the limits are met."""
    shown = [row for row in rows if str(row["load"]).isdecimal()]
    panels_of = {
        "between_p99_ms": "ms between tokens, p99",
        "first_token_p99_s": "seconds to the first token, p99",
        "tokens_per_s": "tokens per second",
        "texts_per_s": "texts embedded per second",
    }
    with figure(path, 1, len(panels_of), (11, 2.6)) as panels:
        for panel, (field, label) in zip(panels[0], panels_of.items(), strict=True):
            for name, colour in zip(
                dict.fromkeys(str(row["variant"]) for row in shown), (SLOWER, FASTER), strict=False
            ):
                own = [row for row in shown if row["variant"] == name]
                memory = max(float(row["memory_mib"]) for row in own)
                x, y = [int(row["load"]) for row in own], [row[field] for row in own]
                panel.plot(x, y, color=colour, linewidth=1, label=f"{name}, {memory:,.0f} MiB")
                faces = [colour if row["within"] == "yes" else "white" for row in own]
                panel.scatter(x, y, s=14, color=faces, edgecolors=colour, zorder=3)
            panel.set(title=label, xlabel="load, % of the two processes' most", ylim=(0, None))
            panel.grid(True)
        panels[0][0].legend(fontsize=6)


def balance(rows: Rows, path: Path) -> None:
    """Both gradients' norms over the steps of each run, as they arise (thin) and as they are added (thick)."""
    runs = [row for row in rows if row["work"] == "norms"]
    with figure(path, 1, len(runs), (4 * len(runs), 2.8), sharey=True) as panels:
        for panel, row in zip(panels[0], runs, strict=True):
            for name, color in (("contrastive", FASTER), ("generative", SLOWER)):
                norms = row[f"{name}_grad_norm"]
                steps = range(1, len(norms) + 1)
                added = [min(norm, row["limit"]) for norm in norms] if row["limit"] else norms
                panel.plot(steps, norms, color=color, linewidth=0.8, alpha=0.6)
                panel.plot(
                    steps,
                    added,
                    color=color,
                    linewidth=1.8,
                    linestyle="--" if name == "generative" else "-",
                    label=name,
                )
            panel.set(title=f"limit {row['limit']:g}" if row["limit"] else "no limit", xlabel="step", yscale="log")
        panels[0][0].set_ylabel("gradient norm")
        panels[0][0].legend()


CHARTS: dict[str, Callable[[Rows, Path], None]] = {
    "attention": attention,
    "pooling": pooling,
    "contrastive": contrastive,
    "generative_loss": generative_loss,
    "model": model,
    "train": train,
    "balance": balance,
    "rag": rag,
    "rag_quality": rag_quality,
    "serve": serve,
}
"""By the record's name without the device."""


def draw(record: Path, rows: Rows) -> Path | None:
    """Draw the plot of a record beside it; None for a kind without a plot, or rows with nothing to draw."""
    chart = CHARTS.get(record.stem.removesuffix("_cpu").removesuffix("_cuda"))
    if chart is None:
        return None
    path = record.with_suffix(".png")
    path.unlink(missing_ok=True)
    chart(rows, path)
    return path if path.exists() else None
