"""``grit eval``: retrieval, next-token loss and answers of one or more checkpoints on held-out data.

    grit eval --model my_run/checkpoint --model smollm2-135m --data DATA --questions nq.jsonl --output results.json

DATA is a folder as described in python_model.evaluation.held_out (default: the bundled sample). Scores are per data set and
overall. ``results.json`` is updated after each checkpoint; results it already holds are not measured again, unless the content of
the checkpoint or of the data has changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from tqdm.auto import tqdm

from python_model.commands.runner import (
    SMALL_MODEL,
    Command,
    add_chunks,
    add_json,
    add_precision,
    add_truncation,
    chunked_texts,
    load,
    location,
    path,
    refuse_without,
    tell_cut,
)
from python_model.evaluation.answers import Question, read_questions, score
from python_model.evaluation.held_out import EVERYTHING, HeldOut, held_out_digest
from python_model.evaluation.language import mean_token_loss, token_loss_sums
from python_model.evaluation.retrieval import embed_documents, retrieval_ranks, scores_from_ranks
from python_model.model.identity import content_digest
from python_model.model.modeling import GritLM
from python_model.model.prompts import TooLong
from python_model.support.files import place_for_file, write_json
from python_model.support.precision import computes_in_bfloat16, computing, device_of
from python_model.support.tables import aligned

COLUMNS = ("ndcg_at_10", "mrr_at_10", "recall_at_1", "recall_at_10", "recall_at_100", "next_token_loss")


def measure(
    model: GritLM,
    held_out: HeldOut,
    *,
    max_length: int,
    bf16: bool | None,
    chunks: tuple[Sequence[str], Sequence[int] | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores by data set, and overall under ``"all"``; ``chunks``: of the documents, and the index of each one's document."""
    texts, owners = (held_out.documents, None) if chunks is None else chunks
    found: dict[str, dict[str, Any]] = {}
    with computing(model.device, bf16):
        if names := [row.dataset for row in held_out.rows]:
            corpus = embed_documents(model, texts, max_length=max_length)
            ranks = retrieval_ranks(
                model,
                held_out.queries,
                corpus,
                held_out.relevant,
                also_relevant=held_out.also_relevant,
                max_length=max_length,
                owners=owners,
            )
            for name in dict.fromkeys([*names, EVERYTHING]):
                chosen = torch.tensor([name in (own, EVERYTHING) for own in names])
                found[name] = asdict(scores_from_ranks(ranks[chosen], len(held_out.documents)))
        if model.mode != "embedding" and held_out.conversations:
            sums: dict[str, tuple[float, int, int, int]] = {}
            for name in dict.fromkeys(row.dataset for row in held_out.conversations):
                rows = [row for row in held_out.conversations if row.dataset == name]
                sums[name] = (*token_loss_sums(model, rows, max_length=max_length), len(rows))
            total, count, left_out, conversations = (sum(column) for column in zip(*sums.values(), strict=True))
            sums[EVERYTHING] = total, int(count), int(left_out), int(conversations)
            for name, (total, count, left_out, conversations) in sums.items():
                try:
                    loss: float | None = mean_token_loss(total, count, left_out, conversations, max_length)
                except TooLong:
                    loss = None  # every first turn of this data set is too long
                found.setdefault(name, {})["next_token_loss"] = loss
                found[name]["conversations"] = conversations
    return found


def answer_scores(model: GritLM, questions: Sequence[Question], *, max_new_tokens: int) -> dict[str, float]:
    """Match, exact match and F1 (in percent) of greedy replies to the questions, without documents."""
    from python_model.generate.text import replies

    texts = replies(model, [[row.question] for row in questions], max_new_tokens=max_new_tokens)
    return asdict(score(texts, questions))


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line per checkpoint and data set."""
    header = ["checkpoint", "data set", *COLUMNS]
    lines = [header]
    for result in results:
        for name, scores in result["scores"].items():
            cells = [scores.get(column) for column in COLUMNS]
            lines.append([result["model"], name, *("-" if c is None else f"{c:.3f}" for c in cells)])
        if answers := result.get("answers"):
            text = ", ".join(f"{key} {value:.1f}" for key, value in answers.items() if key != "questions")
            lines.append([result["model"], f"answers to {answers['questions']} questions: {text}"])
    return aligned(lines)


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit eval``."""
    parser.add_argument("--model", type=location, action="append", help="checkpoint folder or name; may be repeated")
    parser.add_argument("--device", help="device to compute on; default: CUDA if available")
    parser.add_argument("--data", type=path, help="folder with corpus.jsonl and test/; default: the bundled sample")
    parser.add_argument(
        "--questions", type=path, help="jsonl file of {question, answers} rows: also score generated answers"
    )
    add_truncation(parser)
    parser.add_argument("--mode", choices=["unified", "embedding"], default="unified")
    parser.add_argument("--max-length", type=int, default=512, help="maximum tokens per text")
    add_chunks(parser, "find each document by the best of its chunks")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="maximum tokens per answer")
    add_precision(parser)
    parser.add_argument(
        "--output",
        type=path,
        help="JSON file for the results; checkpoints it already has under the same options are not evaluated again",
    )
    add_json(parser, "JSON instead of a table")


def run(arguments: Namespace) -> None:
    """Evaluate each checkpoint that has no result yet."""
    from python_model.data import sample_dir

    data = arguments.data or sample_dir()
    bf16 = computes_in_bfloat16(arguments.bf16, device_of(arguments.device))
    options = {
        "data": str(data),
        "questions": None if arguments.questions is None else str(arguments.questions),
        "mode": arguments.mode,
        "max_length": arguments.max_length,
        "max_new_tokens": arguments.max_new_tokens,
        "bf16": bf16,
        **({} if arguments.truncate_dim is None else {"truncate_dim": arguments.truncate_dim}),
        **({"chunks": [arguments.chunk_tokens, arguments.overlap]} if arguments.chunk_tokens else {}),
    }
    refuse_without(arguments, COMMAND.parser(), "chunk_tokens", "overlap")
    refuse_without(arguments, COMMAND.parser(), "questions", "max_new_tokens")
    if arguments.questions is not None and arguments.mode == "embedding":
        raise ValueError("questions: expected a model that generates, got one in mode 'embedding'")
    held_out = HeldOut(data)
    held_out.check_datasets()
    questions = None if arguments.questions is None else read_questions(arguments.questions)
    results = _saved(arguments.output)
    for name in tqdm(arguments.model or [SMALL_MODEL], desc="checkpoints", unit="checkpoint"):
        model = load(
            Namespace(model=name, device=arguments.device, truncate_dim=arguments.truncate_dim), mode=arguments.mode
        )
        content = None if arguments.output is None else _content(model, data, arguments.questions)
        before = [r for r in results if r["model"] == name and r["options"] == options]
        if any(r.get("content") == content for r in before):
            continue
        if before:
            print(f"grit eval: {name} or the data have changed since {arguments.output} was written", file=sys.stderr)
            results = [r for r in results if r not in before]
        chunks = chunked_texts(arguments, model, held_out.documents)
        scores = measure(model, held_out, max_length=arguments.max_length, bf16=bf16, chunks=chunks)
        tell_cut("eval", model, f"--max-length {arguments.max_length}", "" if arguments.chunk_tokens else "documents")
        result: dict[str, Any] = {"model": name, "options": options, "content": content, "scores": scores}
        if questions is not None:
            result["answers"] = answer_scores(model, questions, max_new_tokens=arguments.max_new_tokens)
        results.append(result)
        if arguments.output is not None:
            write_json(arguments.output, results)
    print(json.dumps(results, indent=2) if arguments.json else table(results))


def _content(model: GritLM, data: Path, questions: Path | None) -> dict[str, str]:
    """Digests of what the scores are of."""
    found = {"model": content_digest(model), "data": held_out_digest(data)}
    if questions is not None:
        found["questions"] = hashlib.blake2b(questions.read_bytes(), digest_size=16).hexdigest()
    return found


def _saved(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    if not place_for_file(path).exists():
        return []
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, list) or not all({"model", "options", "scores"} <= row.keys() for row in saved):
            raise ValueError("not a list of results")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"output: {path} does not hold results ({error}); choose another file") from error
    return saved


COMMAND = Command("eval", "Evaluate checkpoints on held-out data.", configure, run)
