"""docs/benchmarks.md: every committed record as a table with its machine and command.

    python -m bench.report [--plots]

One section per benchmark with one table per kind of machine, from bench/results/KIND/NAME.json. ``--plots`` redraws the plots.
tests/bench/test_records.py compares the committed page with what this writes, so no figure can go stale or be typed by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import charts, records
from bench.common import RESULTS, ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
HEADER = """# Benchmarks

Written by `python -m bench.report` from the records in `bench/results`, one folder per kind of machine. The variants of a table
ran interleaved in one process on one machine; figures are medians. Compare ratios within a table, not figures between tables.
`make bench` repeats the CPU benchmarks in about 15 minutes and reports what moved.

## Time one kernel yourself

```
pip install -e ".[bench]" --no-build-isolation
python -m pytest bench --benchmark-only -k "attention and mixed"           # a table per op and shape, a row per peer
python -m pytest bench --benchmark-only --benchmark-save before            # now change the kernel ..
python -m pytest bench --benchmark-only --benchmark-compare                # .. and compare with the last saved run
```

These run on any machine, and on its CUDA device if it has one; `--benchmark-compare-fail=median:10%` makes a slower median an
error. A peer's result is compared with this package's before it is timed, and a peer that is not installed or has no kernel for
a problem is skipped; `-rs` shows why. The peers:

- attention, forward and backward: this package in one launch and in two; SDPA per sample, with a dense mask, and in one padded
  call per mode (on a GPU also its cuDNN and flash kernels by name); torch's `varlen_attn`; compiled FlexAttention; flash-attn and
  FlashAttention 3 in their varlen form, with one launch per mode
- contrastive loss: eager, eager with FP32 scores, `torch.compile`, Inf-CL
- next-token loss: eager, `torch.compile`, torch's `linear_cross_entropy`, Liger, Cut Cross-Entropy
- pooling: a mean per sample, a masked mean, the same under `torch.compile`
- RMSNorm with a residual, SiLU-gated product: eager, `torch.compile`, Liger

Each variant runs to its end before the next begins; published ratios come from `python -m bench`, whose variants take turns.
"""

TITLES: dict[str, tuple[str, str]] = {
    "attention_cpu": (
        "Attention on a CPU",
        "`times_grit`: the variant's time over this package's. `of_gemm`: share of a matrix product's rate, for visible pairs.",
    ),
    "pooling_cpu": (
        "Pooling on a CPU",
        "`of_ceiling`: share of the rate at which the machine reads memory; `speedup`: the variant's time over grit_kernels'. "
        "No input is in the cache. The backward writes a gradient as large as its input to fresh memory, whose page faults cost "
        "more than the writing. Memory: growth of the peak resident set during a call.",
    ),
    "contrastive_cpu": (
        "Contrastive loss on a CPU",
        "`forward` without gradients, `step` forward and backward, `backward` the difference; speedups are the variant's "
        "time over grit_kernels'. The scores of the last row would "
        "take 34 GB. Loss and memory (growth of the peak resident set) from a step in a process of its own; the oracle is a "
        "chunked float64 loss of the same inputs.",
    ),
    "generative_loss_cpu": (
        "Next-token loss on a CPU",
        "`speedup`: the variant's time over grit_kernels', forward and backward. `error`: the largest difference of a token's "
        "loss from that in float64. Memory is the growth of the peak resident set in a process of its own.",
    ),
    "model_cpu": ("The 135M model end to end on a CPU", "`time_over_first`: the variant's time over the first one's."),
    "train_cpu": (
        "One unified training step of the 135M model on a CPU",
        "`speedup` over three padded passes of unpatched transformers; memory of one step beyond weights and gradients.",
    ),
    "balance_cpu": (
        "Limiting each objective's gradient, on a CPU",
        "`norms`: a run of the demo's recipe at a temperature of .02 each; the plot shows its norms. `step`: losses, gradients "
        "and clipping of one step; `time_over_first`: the variant's time over that of accumulating both in one gradient.",
    ),
    "gradient_cosine_cpu": (
        "The cosine of both objectives' gradients",
        "Of each step of unified runs of the proof, from their logs: `low` and `high` are quantiles at 5 and 95 %; "
        "`within_tenth`: the share of the steps with a cosine of at most 0.1 in size.",
    ),
    "generate_cpu": (
        "Decoding with the 135M model on a CPU",
        "16 greedy tokens after a filled cache; in bfloat16 two ways of computing may choose different tokens.",
    ),
    "rag_cpu": (
        "Answering from documents with the 135M model on a CPU",
        "16 new tokens. `of_plain_rag`: time over plain retrieval with the document first; `cached`, `read`: tokens from stored "
        "states, and tokens read.",
    ),
    "rag_quality_cpu": (
        "Quality of answers from cached states on a CPU",
        "Four documents per question, one of them right; `f1_difference`, with its 95 % interval, is relative to full prefill. "
        "`break_even_reuses`: uses of a document after which making its states has paid. Rows that are not `valid` say nothing: "
        "full prefill must reach 1.5 times the F1 without documents.",
    ),
    "search_cpu": (
        "Searching 100,000 vectors on one core of a CPU",
        "Size 576, around 1,000 random centres; the process is bound to one core, for building as well. `open_s`: a new "
        "process's first search; `query_ms`: one query; `times_exact`: its time over that of this index's exact float32 "
        "search; `recall`: the share of the 10 true neighbours found; `add_and_search_s`: adding 16 vectors, then a search. "
        "What can be adjusted is set to a recall of 0.98 where that is reached.",
    ),
    "corpus_cpu": (
        "What Ray adds to embedding a corpus, on a CPU",
        "The 135M model, one thread. `plain`: one call of encode(); `ray`: the seconds of the units of `grit embed --ray` with "
        "one worker; `overhead`: their ratio minus 1, at most 0.05 if the goal is met; `outside`: the share of the units' time "
        "not spent in encode(); `start_s`: starting actors and loading the model, once per run.",
    ),
    "rerank_cpu": (
        "Reranking what BM25 finds, with the 135M model",
        "Held-out queries whose one right passage BM25 finds among the best ten; `found`: the share of such queries. "
        "`moved`: the share of the queries whose order was changed. Differences in nDCG@10 with their 95 % intervals: "
        "`over_found` from BM25's order, `over_default` from the default method.",
    ),
    "folder_cpu": (
        "An index that follows a folder, on a CPU",
        "`killed`: until a third of the files was indexed, then kill -9; `resumed`: the same command again; `synced`: after one "
        "file was cut in half and another removed. With the states of all documents, in int8; `run_s` includes loading the "
        "135M model.",
    ),
    "serve_cpu": (
        "One server against two processes on a CPU",
        "transformers serve for chats and sentence-transformers for embeddings, half of the threads each, or `grit serve` with "
        "all. `closed`: four chats and four requests to embed always wait; what the two processes finish then is a load of 100. "
        "The other loads arrive whatever the server does, and grow until the limits are missed (`within`; `python -m bench.serve "
        "--help` names them). `times`: the ratio of the largest loads within the limits.",
    ),
    "rag_1b_cpu": (
        "The same with random weights of a 1.1B shape on a CPU",
        "22 layers of size 2048, 32 query and 4 key heads, bfloat16; 3 repeats.",
    ),
    "demo_seeds_cpu": (
        "The demo over seeds",
        "`make demo-seeds`: the small model after one epoch of the bundled sample's triples, on rows held out by entity; BM25 "
        "with stemming, stop words and the parts of identifiers on the same rows.",
    ),
    "demo_seeds_bf16_cpu": (
        "The demo in bfloat16",
        "The same with `--bf16` and one seed, on a CPU that emulates its products: what it reaches, not how fast.",
    ),
}
PROOF_NOTE = (
    "`make proof`: the small model (SmolLM2-135M-Instruct, from a 4-bit file) trained for both jobs, or for one of them with the "
    "same base, rows, steps, tokens per objective and clipping, on what `grit data DATA --test-rows 700` builds; measured on "
    "rows held out by entity. Runs before commit 7468ea6 rank by bfloat16 scores, where near passages tie with the right one. "
    "A curve searches 500 queries among 1,000 passages."
)
HIDDEN = (
    *("seconds", "all_seconds", "lengths", "ms", "tflops", "dtype", "heads", "window", "prepare_ms", "loss"),
    *("batch", "texts"),
)
EXACT = ("mean_loss", "oracle_loss")
"""Columns that differ only by rounding."""


def columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a table shows: every scalar except those that only serve comparing records; the dtype if only it differs."""
    told = {tuple(v for k, v in row.items() if k != "dtype" and isinstance(v, str | int)) for row in rows}
    found: list[str] = ["dtype"] if len(told) < len(rows) and len({row.get("dtype") for row in rows}) > 1 else []
    for row in rows:
        for name, value in row.items():
            if name not in found and name not in HIDDEN and isinstance(value, str | int | float):
                found.append(name)
    return found


def cell(value: Any, digits: int = 3) -> str:
    """Three significant digits, or more."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return str(value)


def section(name: str, paths: Sequence[Path]) -> str:
    """The section of a benchmark, on every kind of machine that has a record of it."""
    title, note = TITLES.get(name, (name.replace("_", " "), ""))
    lines = [f"## {title}", "", *([note, ""] if note else [])]
    for path in paths:
        lines += _table(path, title, named=len(paths) > 1)
    return "\n".join(lines)


def _table(path: Path, title: str, named: bool) -> list[str]:
    record = records.read(path)
    rows: list[dict[str, Any]] = record["rows"]
    machine = record["machine"]
    columns = columns_of(rows)
    plot = path.with_suffix(".png")
    dtypes = {str(row.get("dtype", "bfloat16")).removeprefix("torch.") for row in rows}
    only = next(iter(dtypes)) if len(dtypes) == 1 else "bfloat16"
    return [
        *([f"### {path.parent.name}", ""] if named else []),
        f"{describe(machine)}{'' if only == 'bfloat16' else f', in {only}'}. `{record['command']}`",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(row.get(name), 8 if name in EXACT else 3) for name in columns) + " |" for row in rows),
        "",
        *_conclusions(path.stem, rows),
        *([f"![{title}](../{plot.relative_to(ROOT).as_posix()})", ""] if plot.exists() else []),
    ]


def _conclusions(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a benchmark with a goal says of each model."""
    if name != "rag_quality_cpu":
        return []
    from bench.rag_quality import verdict

    models = dict.fromkeys(row["model"] for row in rows)
    return [*(f"- {verdict([row for row in rows if row['model'] == model])}." for model in models), ""]


def describe(machine: dict[str, Any]) -> str:
    """Processor, instruction sets, threads, torch, date and commit of a record."""
    gpu = f", {machine['gpu']['name']}" if "gpu" in machine else ""
    features = ", ".join(machine.get("cpu_features") or machine.get("instruction_sets", []))
    return (
        f"{machine['processor']}{gpu} ({features}), {machine['threads']} thread(s), torch {machine['torch']}, "
        f"{machine['time'][:10]}, commit {machine['commit'][:10]}"
    )


def committed() -> dict[str, list[Path]]:
    """The records of each benchmark, in the order of the page."""
    found: dict[str, list[Path]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        if path.parent.name != "latest" and path.stem != "progress" and "rows" in records.read(path):
            found.setdefault(path.stem, []).append(path)
    order = list(TITLES)
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: found[name] for name in names}


def proofs() -> str:
    """The proof's tables, by plan (bench/results/proof for configs/proof.yaml, and so on)."""
    lines: list[str] = []
    for table in sorted(RESULTS.glob("proof*/table.md")):
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(table.parent.glob("*-*.json"))]
        machines = {describe(run["machine"]) for run in runs}
        plot = table.with_name("proof.png").relative_to(ROOT).as_posix()
        lines += [
            f"### configs/{table.parent.name}.yaml",
            "",
            *sorted(machines),
            "",
            table.read_text(encoding="utf-8"),
            *([f"![The proof's runs](../{plot})", ""] if (ROOT / plot).exists() else []),
        ]
    title = "## One model against two specialists"
    return "\n".join([title, "", PROOF_NOTE, "", *lines]) if lines else ""


def page() -> str:
    """The whole page."""
    sections = [section(name, paths) for name, paths in committed().items()]
    return HEADER + "\n" + "\n".join([*sections, proofs()]).rstrip("\n") + "\n"


def write(plots: Iterable[Path] = ()) -> None:
    """Rewrite docs/benchmarks.md, and redraw the plots of the records in these folders."""
    for folder in plots:
        for path in folder.glob("*.json"):
            if path.stem != "progress" and "rows" in (record := records.read(path)):
                charts.draw(path, record["rows"])
    PAGE.write_text(page(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--plots", action="store_true", help="redraw the plots of all committed records")
    folders = {path.parent for paths in committed().values() for path in paths}
    write(sorted(folders) if parser.parse_args(argv).plots else ())


if __name__ == "__main__":
    main()
