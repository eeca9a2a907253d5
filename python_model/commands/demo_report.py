"""What ``grit demo`` prints about its measurements, in lines of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

WIDTH = 80
LABEL = 10
METRICS = (("nDCG@10", "ndcg_at_10"), ("MRR@10", "mrr_at_10"), ("recall@10", "recall_at_10"))


def opening(queries: int, passages: int, conversations: int) -> str:
    """Before anything is measured."""
    return (
        f"Held out from training: {queries} queries, {passages} passages, {conversations} conversations.\n"
        "Measuring the untrained model ..."
    )


def measured(scores: dict[str, Any]) -> str:
    """One line about a model."""
    return f"  nDCG@10 {scores['ndcg_at_10']:.3f}   next-token loss {scores['next_token_loss']:.3f}"


def both_better(results: dict[str, Any]) -> bool:
    """Whether the trained model searches better and predicts better than the untrained one."""
    before, after = results["before"], results["after"]
    return bool(after["ndcg_at_10"] > before["ndcg_at_10"] and after["next_token_loss"] < before["next_token_loss"])


def lines(results: dict[str, Any], folder: str, since: float | None = None) -> list[str]:
    """Everything after the training. ``since``: seconds since the installation began."""
    return [
        *_table(results),
        *_searches(results),
        *_chats(results),
        *_answer(results["answer"]),
        "",
        *_conclusion(results),
        "",
        *_times(results["seconds"], folder, since),
        "",
        *next_steps(folder),
    ]


def _table(results: dict[str, Any]) -> Iterator[str]:
    before, after, bm25 = results["before"], results["after"], results["bm25"]
    yield ""
    yield f"{'held-out rows':<18}{'before':>10}{'after':>10}{'BM25':>10}"
    for name, key in METRICS:
        lexical = f"{bm25[key]:>10.3f}" if bm25 else f"{'-':>10}"
        yield f"{name:<18}{before[key]:>10.3f}{after[key]:>10.3f}{lexical}"
    yield f"{'next-token loss':<18}{before['next_token_loss']:>10.3f}{after['next_token_loss']:>10.3f}{'-':>10}"
    if not bm25:
        yield "BM25 needs the extra 'demo': pip install 'grit-kernels[demo]'"


def _searches(results: dict[str, Any]) -> Iterator[str]:
    passages = results["before"]["documents"]
    yield from _heading(f"Searches drawn by lot from every kind (rank of the right one of {passages} passages)")
    for number, row in enumerate(results["searches"], 1):
        if number > 1:
            yield ""
        yield from _labelled("search", row["query"])
        yield from _labelled("rank", f"{row['rank_before']} before, {row['rank_after']} after")
        yield from _labelled("found", row["found"])
        if row["found"] != row["right"]:
            yield from _labelled("right is", row["right"])


def _chats(results: dict[str, Any]) -> Iterator[str]:
    yield from _heading("Chats, drawn by lot")
    for number, row in enumerate(results["chats"], 1):
        if number > 1:
            yield ""
        yield from _labelled("question", row["question"])
        yield from _labelled("before", row["before"])
        yield from _labelled("after", row["after"])


def _answer(answer: dict[str, Any]) -> Iterator[str]:
    yield from _heading(
        "An answer from a document that the same weights found (about the first word above whose passage they found)"
    )
    yield from _labelled("question", answer["question"])
    yield from _labelled("document", answer["document"])
    if not answer["is_right"]:
        yield from _labelled("", "(not the passage it should have found)")
    yield from _labelled("answer", answer["answer"])


def _conclusion(results: dict[str, Any]) -> list[str]:
    before, after, bm25 = results["before"], results["after"], results["bm25"]
    lexical = f" (BM25 {bm25['ndcg_at_10']:.3f})" if bm25 else ""
    searches = f"nDCG@10 {before['ndcg_at_10']:.3f} -> {after['ndcg_at_10']:.3f}{lexical}"
    predicts = f"next-token loss {before['next_token_loss']:.3f} -> {after['next_token_loss']:.3f}"
    verdict = "both jobs better than before" if both_better(results) else "NOT both jobs better than before"
    return textwrap.wrap(
        f"One set of weights, {verdict}: {searches}, {predicts}. "
        "That it equals two specialists is the paper's claim: `make proof`.",
        WIDTH,
    )


def _times(seconds: dict[str, float], folder: str, since: float | None) -> Iterator[str]:
    if since is not None:
        yield f"{_clock(since)} minutes from the beginning of the installation to here."
    yield (
        f"{_clock(seconds['total'])} minutes of the demo itself, {_clock(seconds['training'])} of them training "
        f"({seconds['per_step_median']:.2f} s a step)."
    )
    yield f"Weights, figures and the plot of the losses are in {folder}/."


def next_steps(folder: str) -> list[str]:
    """What to do with the checkpoint."""
    model = f"{folder}/checkpoint"
    return [
        "What to do next:",
        "  train on your rows   grit train --data.train_data rows.jsonl --output_dir RUN",
        f"  search your files    grit index INDEX --model {model} --add DIR",
        f'  embed and chat       python_model.GritLM("{model}") (README.md)',
    ]


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _heading(text: str) -> list[str]:
    return ["", *textwrap.wrap(text, WIDTH), ""]


def _labelled(label: str, text: str, most: int = 3) -> list[str]:
    """``text`` beside its label, in at most ``most`` lines; line breaks of code and replies are kept."""
    room = WIDTH - LABEL
    found: list[str] = []
    for line in text.splitlines() or [""]:
        found += textwrap.wrap(line, room) or [""]
    if len(found) > most:
        found = found[:most]
        found[-1] = found[-1][: room - 4].rstrip() + " ..."
    return [f"{label if index == 0 else '':<{LABEL}}{line}".rstrip() for index, line in enumerate(found)]
