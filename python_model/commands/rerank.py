"""``grit rerank``: rank passages by their relevance to a query."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import (
    Command,
    add_chunks,
    add_json,
    add_model,
    chunks_of,
    documents_at,
    load,
    path,
    refuse_without,
    show,
    tell_cut,
)
from python_model.rag.modes import Document
from python_model.support.arguments import check_at_least


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit rerank``."""
    from python_model.generate.rerank import METHODS, PASSAGE_TOKENS

    add_model(parser)
    parser.add_argument("--query", required=True, help="query that the passages should answer")
    parser.add_argument(
        "--passages",
        type=path,
        required=True,
        help="jsonl or text file, or folder; - reads standard input, one passage per line",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="likelihood",
        help="likelihood: how likely each makes the query; pointwise: yes or no for each; listwise: an order of all",
    )
    parser.add_argument(
        "--passage-tokens",
        type=int,
        help=f"maximum tokens per passage; longer ones are truncated; default: {PASSAGE_TOKENS}",
    )
    add_chunks(parser, "rank each passage by the best of its chunks")
    parser.add_argument("--top", type=int, default=10, help="number of passages to print")
    add_json(parser)


def run(arguments: Namespace) -> None:
    """Print the passages, best first."""
    from python_model.generate.rerank import PASSAGE_TOKENS, on_one_line, rerank
    from python_model.model.limits import max_positions

    refuse_without(arguments, COMMAND.parser(), "chunk_tokens", "overlap")
    chunked = bool(arguments.chunk_tokens)
    if chunked and arguments.passage_tokens is not None:
        raise ValueError("--passage-tokens: expected no --chunk-tokens beside it, got both")
    check_at_least("--top", arguments.top, 1)
    given = _documents(arguments.passages)
    if not given:
        raise ValueError("--passages: expected at least one passage on standard input, got none")
    model = load(arguments)
    documents, owners = chunks_of(arguments, model, given)
    limit = PASSAGE_TOKENS if arguments.passage_tokens is None else arguments.passage_tokens
    if chunked:
        limit = max_positions(model.model.config)  # they are shown whole
    ranked = rerank(
        model,
        arguments.query,
        [document.content for document in documents],
        method=arguments.method,
        passage_tokens=limit,
    )
    tell_cut("rerank", model, f"--passage-tokens {limit}", "them")
    best: dict[int, dict[str, Any]] = {}  # of each passage, the first chunk in the ranking
    for place in ranked:
        document, owner = documents[place.index], owners[place.index]
        row = {"index": owner, "score": place.score, "passage": document.content}
        best.setdefault(owner, {**row, "place": document.place} if chunked else row)
    rows = list(best.values())[: arguments.top]
    show(
        arguments,
        {"query": arguments.query, "method": arguments.method, "passages": rows},
        "\n".join(f"{row['score']:8.3f}  [{row['index']}] {on_one_line(row['passage'])[:100]}" for row in rows),
    )


def _documents(passages: Path) -> list[Document]:
    if str(passages) != "-":
        return documents_at("rerank", passages)
    return [Document(f"line {number}", line.strip()) for number, line in enumerate(sys.stdin, 1) if line.strip()]


COMMAND = Command("rerank", "Rank passages by their relevance to a query.", configure, run)
