"""``grit rerank``: rank passages by their relevance to a query."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import Command, add_json, add_model, load, show, tell_cut


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit rerank``."""
    from python_model.generate.rerank import METHODS

    add_model(parser)
    parser.add_argument("--query", required=True, help="query that the passages should answer")
    parser.add_argument(
        "--passages",
        type=Path,
        required=True,
        help="jsonl or text file, or folder; - reads standard input, one passage per line",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="likelihood",
        help="how likely the query is behind each; a yes or no; an order",
    )
    parser.add_argument(
        "--passage-tokens", type=int, default=160, help="maximum tokens per passage; longer ones are truncated"
    )
    parser.add_argument("--top", type=int, default=10, help="number of passages to print")
    add_json(parser)


def run(arguments: Namespace) -> None:
    """Print the passages, best first."""
    from python_model.generate.rerank import rerank
    from python_model.rag.documents import read_documents

    if str(arguments.passages) == "-":
        passages = [line.strip() for line in sys.stdin if line.strip()]
    else:
        passages = [document.content for document in read_documents(arguments.passages)]
    model = load(arguments)
    options = {"method": arguments.method, "passage_tokens": arguments.passage_tokens}
    ranked = rerank(model, arguments.query, passages, **options)[: arguments.top]
    tell_cut("rerank", model, f"--passage-tokens {arguments.passage_tokens}")
    rows: list[dict[str, Any]] = [{"index": r.index, "score": r.score, "passage": passages[r.index]} for r in ranked]
    show(
        arguments,
        {"query": arguments.query, "method": arguments.method, "passages": rows},
        "\n".join(f"{row['score']:8.3f}  [{row['index']}] {row['passage'][:100]}" for row in rows),
    )


COMMAND = Command("rerank", "Rank passages by their relevance to a query.", configure, run)
