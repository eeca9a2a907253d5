"""``grit rag``: answer questions from an index: one, or a file of them with scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import (
    Command,
    add_json,
    add_model,
    add_search,
    add_truncation,
    load,
    location,
    path,
    refuse_both,
    show,
)

if TYPE_CHECKING:
    from python_model.rag.modes import Document


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit rag``."""
    from python_model.rag.modes import MODES

    parser.add_argument("index", type=location, help="folder of the index (see grit index)")
    add_model(parser)
    add_truncation(parser)
    parser.add_argument(
        "--question", help="one question; without it and --questions, each line of standard input is one"
    )
    parser.add_argument(
        "--questions", type=path, help='jsonl file of {"question": .., "answers": [..]} rows: answer and score them'
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="with --questions: evaluate cached states, so that --mode auto may use them with this checkpoint",
    )
    parser.add_argument(
        "--mode", choices=("auto", *MODES), default="auto", help="which states are cached (docs/rag.md)"
    )
    parser.add_argument("--k", type=int, default=1, help="number of documents per question")
    add_search(parser)
    parser.add_argument("--store", type=location, help="folder of the key-value store of the documents' states")
    parser.add_argument(
        "--keep",
        type=float,
        metavar="GIB",
        help="with --store: keep the states of documents that a mode had to read, in "
        "a store of at most so many GiB; those that were not used for longest make room",
    )
    parser.add_argument("--instruction", default="", help="instruction for embedding the question")
    parser.add_argument("--causal-states", action="store_true", help="cache causal states")
    parser.add_argument(
        "--recompute", type=int, default=0, help="number of leading tokens of each joined text to recompute"
    )
    parser.add_argument(
        "--recompute-share",
        type=float,
        default=0.0,
        help="share of the tokens of all joined texts but the first to recompute instead, where states deviate most",
    )
    parser.add_argument("--max-new-tokens", type=int, default=16, help="maximum tokens of an answer")
    add_json(parser, "one JSON object per question, then one with the scores")


def run(arguments: Namespace) -> None:
    """Answer the questions."""
    from python_model.evaluation.answers import read_questions, score
    from python_model.rag.answer import RAG, open_store
    from python_model.rag.filters import read_conditions
    from python_model.rag.index import open_index

    refuse_both(arguments, "question", "questions")
    if arguments.question is not None and not arguments.question.strip():
        raise ValueError(f"--question: expected a non-empty text, got {arguments.question!r}")
    if arguments.calibrate and arguments.mode != "auto":
        raise ValueError(
            f"--mode: expected no --calibrate beside it, which measures several modes, got {arguments.mode!r}"
        )
    if arguments.mode == "none":
        for name in ("k", "hybrid", "where", "instruction"):  # each would be ignored
            if getattr(arguments, name) != COMMAND.parser().get_default(name):
                raise ValueError(f"--{name}: expected no --mode none beside it, which searches nothing, got both")
    model = load(arguments)
    store, limit = None, arguments.keep
    if limit is not None and not (limit > 0 and arguments.store):
        raise ValueError("--keep: expected --store and a number of GiB above 0, got no store, or another number")
    if arguments.store:
        options: dict[str, Any] = {} if limit is None else {"max_bytes": int(limit * 2**30), "when_full": "drop_unused"}
        store = open_store(arguments.store, model, causal_states=arguments.causal_states, **options)
    rag = RAG(
        model,
        index=open_index(arguments.index, model, create=False),
        store=store,
        causal_states=arguments.causal_states,
        recompute=arguments.recompute,
        recompute_share=arguments.recompute_share,
        query_prefix=model.formatter.embed_instruction(arguments.instruction),
        keep_read=limit is not None,
        hybrid=arguments.hybrid,
        where=read_conditions(arguments.where),
    )
    questions = None if arguments.questions is None else read_questions(arguments.questions)
    if arguments.calibrate:
        from python_model.rag.calibration import calibrate

        if questions is None:
            raise ValueError("--calibrate: expected --questions with answers, got none")
        result = calibrate(rag, questions, k=arguments.k, max_new_tokens=arguments.max_new_tokens)
        table = "  ".join(f"{mode} {value:.1f}" for mode, value in result["f1"].items())
        chosen = ", ".join(result["trusted"]) or "none; documents are read in full"
        show(arguments, result, f"F1: {table}\ncached states that --mode auto may use: {chosen}")
        return
    if questions is not None:
        texts: Any = [question.question for question in questions]
    else:
        texts = [arguments.question] if arguments.question is not None else map(str.strip, sys.stdin)
    replies = []
    for text in texts:
        if not text:
            continue
        answer = rag.answer(text, mode=arguments.mode, k=arguments.k, max_new_tokens=arguments.max_new_tokens)
        replies.append(answer.text)
        if arguments.json:
            print(json.dumps({"question": text, **asdict(answer)}, ensure_ascii=False), flush=True)
        else:
            print(answer.text, f"   [{answer.mode}] {_sources(answer.documents)}", flush=True)
    if questions is not None:
        scores = score(replies, questions)
        text = f"match {scores.match:.2f}  exact match {scores.exact_match:.2f}  F1 {scores.f1:.2f}"
        show(arguments, asdict(scores), f"{text}  ({scores.questions} questions)")


def _sources(documents: Sequence[Document]) -> str:
    """``[1] file, location  [2] ..``, numbered as in the prompt."""
    return "  ".join(f"[{number}] {document.location}" for number, document in enumerate(documents, 1))


COMMAND = Command("rag", "Answer questions from an index of documents.", configure, run)
