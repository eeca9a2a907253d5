"""Which method of reranking deserves to be the default: nDCG@10 on held-out queries, as BM25 finds the passages and reranked.

    python -m bench.rerank --data DATA --model CHECKPOINT --output FOLDER --record rerank_cpu.json

DATA is a folder of ``grit data``, or any other that ``grit eval`` takes. Its queries search its corpus by BM25, and each method
orders the ``--passages`` best. A query has one right passage; where BM25 does not find it, every order scores 0, so only queries
for which it does are asked, from each data set in turn. Reported are the mean nDCG@10 of each method, its difference from
BM25's order and from the default's with paired bootstrap intervals of 95 %, and how often it changed the order at all.

Orders are written to FOLDER query by query and do not depend on what else the machine does. The same command resumes, also with
more or fewer ``--queries`` or other methods; ``--minutes`` ends a run early. A row is about the queries that its method has
finished, which are the first ones. Listwise writes its answer token by token, which takes several times as long: it may be asked
fewer in a run of its own (``--methods listwise --queries 60``), and with ``--minutes 0`` a last run only makes the table.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import labelled, model_dtype, open_answers, table, write_records
from bench.proof_table import ROUNDS, ndcg
from python_model.corpora.hard_negatives import BM25
from python_model.corpora.small_model import resolve_model
from python_model.corpora.split import digest
from python_model.evaluation.held_out import EVERYTHING, HeldOut
from python_model.generate.rerank import METHODS, PASSAGE_TOKENS, rerank
from python_model.model.identity import fingerprint
from python_model.model.modeling import GritLM
from python_model.support.arguments import check_at_least
from python_model.support.quiet import quiet

FOUND = "as found"
DEFAULT = inspect.signature(rerank).parameters["method"].default


@dataclass(frozen=True)
class Item:
    """A query and the passages that BM25 found, best first; ``right`` is the index of the one that answers it."""

    dataset: str
    query: str
    passages: tuple[str, ...]
    right: int


def make_items(held_out: HeldOut, passages: int, limit: int | None = None) -> tuple[list[Item], dict[str, float]]:
    """The first ``limit`` queries whose right passage is found, data sets in turn, in an order that depends only on the queries;
    and the share of all queries for which it is found, by data set and overall. Other answers of a query are left out of its
    passages, as in ``grit eval``.

    Raises:
        ValueError: fewer passages than asked for, no query whose passage is found, or a size below 1.
    """
    check_at_least("passages", passages, 1)
    check_at_least("queries", 1 if limit is None else limit, 1)
    if len(held_out.documents) < passages:
        raise ValueError(f"data: expected at least {passages} passages, got {len(held_out.documents)}")
    held_out.check_datasets()
    rows = held_out.rows
    ranking = BM25([row.query.text for row in rows], held_out.documents).rows()
    piles: dict[str, list[Item]] = {row.dataset: [] for row in rows}
    for row, right, also, scores in zip(rows, held_out.relevant, held_out.also_relevant, ranking, strict=True):
        scores = scores.copy()
        scores[list(also)] = -np.inf
        best = np.argsort(-scores, kind="stable")[:passages].tolist()
        if right in best:
            texts = tuple(held_out.documents[place] for place in best)
            piles[row.dataset].append(Item(row.dataset, row.query.text, texts, best.index(right)))
    asked = Counter(row.dataset for row in rows)
    found = {name: len(pile) / asked[name] for name, pile in piles.items()}
    if not any(piles.values()):
        raise ValueError(f"data: expected queries whose passage BM25 finds, got none of {len(rows)}")
    for pile in piles.values():
        pile.sort(key=lambda item: digest(f"rerank:{item.query}"))
    longest = max(map(len, piles.values()))
    items = [pile[turn] for turn in range(longest) for _, pile in sorted(piles.items()) if turn < len(pile)][:limit]
    return items, {EVERYTHING: sum(map(len, piles.values())) / len(rows), **found}


def measure(
    model: GritLM, items: Sequence[Item], methods: Sequence[str], folder: Path, passage_tokens: int, minutes: float
) -> dict[str, list[list[int]]]:
    """Of each method the orders of the first items, as many as there was time for; those of earlier runs are kept.

    Raises:
        ValueError: a log is of another model, other queries or other settings.
    """
    end = time.monotonic() + 60 * minutes
    settings = {"model": fingerprint(model), "passage_tokens": passage_tokens}
    asked = [[item.query, *(f"{digest(passage):016x}" for passage in item.passages)] for item in items]
    with ExitStack() as stack:
        logs = {
            method: stack.enter_context(
                closing(open_answers(folder / f"{method}.jsonl", {**settings, "method": method}, asked))
            )
            for method in methods
        }
        for (number, item), (method, log) in product(enumerate(items), logs.items()):
            if time.monotonic() >= end:
                break
            if len(log.rows) > number + 1:
                continue
            ranked = rerank(model, item.query, item.passages, method=method, passage_tokens=passage_tokens)  # type: ignore[arg-type]
            log.append({"asked": asked[number], "order": [row.index for row in ranked]})
            if number % 20 == 19:
                print(f"{folder.name}: {number + 1} of {len(items)} queries by {method}", flush=True)
    return {method: [row["order"] for row in log.rows[1 : len(items) + 1]] for method, log in logs.items()}


def paired_difference(mine: np.ndarray, theirs: np.ndarray, rounds: int = ROUNDS) -> tuple[float, float, float]:
    """``mean(mine - theirs)`` and its 95 % interval, by resampling the queries."""
    difference = mine - theirs
    draw = np.random.default_rng(0)
    means = difference[draw.integers(0, len(difference), (rounds, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def summary(
    model: str, items: Sequence[Item], found_share: dict[str, float], orders: dict[str, list[list[int]]]
) -> list[dict[str, Any]]:
    """Rows per data set, and of all, for BM25's order and each method, over the queries that it has finished; differences over
    those that both have. ``found_share``: see :func:`make_items`.

    Raises:
        ValueError: a method has finished no query.
    """
    if not all(orders.values()):
        raise ValueError("minutes: expected time for a query by each method, got none; run the command again")
    asked = items[: max(map(len, orders.values()))]
    orders = {FOUND: [list(range(len(item.passages))) for item in asked], **orders}
    scores = {
        name: ndcg([order.index(item.right) + 1 for item, order in zip(asked, found, strict=False)])
        for name, found in orders.items()
    }
    rows = []
    for dataset in (EVERYTHING, *sorted({item.dataset for item in asked})):
        of_dataset = np.array([dataset in (EVERYTHING, item.dataset) for item in asked])
        for name, found in orders.items():
            chosen = of_dataset[: len(found)]
            if not chosen.any():
                continue
            moved = [order != sorted(order) for order, mine in zip(found, chosen, strict=True) if mine]
            row: dict[str, Any] = {
                "model": model,
                "dataset": dataset,
                "variant": name,
                "queries": int(chosen.sum()),
                "found": found_share[dataset],
                "ndcg_at_10": float(scores[name][chosen].mean()),
                "moved": float(np.mean(moved)),
            }
            for key, other in (("over_found", FOUND), ("over_default", DEFAULT)):
                both = chosen[: len(orders.get(other, ()))]
                if other != name and both.any():
                    mine, theirs = (scores[method][: len(both)][both] for method in (name, other))
                    difference = paired_difference(mine, theirs)
                    row |= dict(zip((key, f"{key}_low", f"{key}_high"), difference, strict=True))
            rows.append(row)
    return rows


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What follows for the default from the rows of one model."""
    overall = [row for row in rows if row["dataset"] == EVERYTHING]
    best = max(overall, key=lambda row: row.get("over_found", 0.0))  # on its own queries
    better = [row["variant"] for row in overall if row.get("over_default_low", 0.0) > 0]
    methods = [row["variant"] for row in overall if row["variant"] != FOUND]
    head = f"{best['model']}, {best['queries']} queries: best is {best['variant']} ({best['ndcg_at_10']:.3f})"
    if DEFAULT not in methods:
        return f"{head}; the default ({DEFAULT}) was not measured"
    if better:
        return f"{head}; better than the default ({DEFAULT}) beyond chance: {', '.join(better)}"
    return f"{head}; nothing is better than the default ({DEFAULT}) beyond chance"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rerank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus.jsonl and test/embedding.jsonl")
    parser.add_argument("--model", action="append", help="checkpoint, or LABEL=checkpoint; default: the small model")
    parser.add_argument("--output", type=Path, required=True, help="folder for the orders; the same command resumes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["likelihood", "pointwise"])
    parser.add_argument("--queries", type=int, default=300, help="most queries")
    parser.add_argument("--passages", type=int, default=10, help="passages per query")
    parser.add_argument("--passage-tokens", type=int, default=PASSAGE_TOKENS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end a model's run after so many")
    parser.add_argument("--dtype", default=model_dtype())
    parser.add_argument("--device")
    parser.add_argument("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args()
    quiet()
    items, found_share = make_items(HeldOut(arguments.data), arguments.passages, arguments.queries)
    rows: list[dict[str, Any]] = []
    methods = list(dict.fromkeys(arguments.methods))
    for given in arguments.model or ["smollm2-135m"]:
        label, path = labelled(given)
        model = GritLM(resolve_model(path), dtype=arguments.dtype, device=arguments.device)
        orders = measure(model, items, methods, arguments.output / label, arguments.passage_tokens, arguments.minutes)
        found = summary(label, items, found_share, orders)
        rows += [{**row, "dtype": arguments.dtype, "passages": arguments.passages} for row in found]
        columns = ["model", "dataset", "variant", "queries", "found", "ndcg_at_10", "moved"]
        columns += ["over_found", "over_found_low", "over_found_high"]
        print(table(found, columns))
        print(verdict(found), flush=True)
        if arguments.record:  # after each model: an interrupted run keeps its rows
            write_records(arguments.record, rows)


if __name__ == "__main__":
    main()
