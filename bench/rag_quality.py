"""Quality beside latency: answers from four documents, read in full or taken from cached states, on held-out questions.

    python -m bench.rag_quality --data DATA --model CHECKPOINT --output FOLDER --record rag_quality_cpu.json

Every question (see bench/rag_questions.py) is answered by every variant before the next question, so that the machine's drift
cancels in their ratios:

    no documents           the question alone
    full prefill           documents and question are read (document_first)
    bidirectional cache    states of each document's embedding pass, keys moved to their places
    causal cache           states of each document read causally, keys moved to their places
    + first 16             and the first 16 tokens of each document but the first recomputed
    + 15 % selected        and 15 % of the tokens of each document but the first recomputed, those that deviate most (CacheBlend)

Reported: F1 and match, with paired bootstrap intervals of the F1 relative to full prefill; the time to the first token (states
loaded from a store on disk, joined and recomputed, the prompt read, one token chosen; without the search, which all share); bytes
of states per token; and how often a document must be reused before making and storing its states has paid. The result counts
only if full prefill reaches 1.5 times the F1 without documents. The goal is a first token in a third of the time at an F1 at most
2 % lower; where no variant keeps it, ``--mode auto`` has no reason to leave full prefill.

Answers are written to FOLDER question by question; the same command resumes, also with more or fewer ``--questions``. Replies
do not depend on what else the machine does, but times do: ``--timed 20`` asks the first 20 questions of each model once more,
which takes minutes of a quiet machine, and takes all times from there; ``--timed 0`` leaves times out. Several ``--model`` are
several models in one table and plot, for example one that was trained on ``python -m bench.rag_questions --cached .75``, whose
replies follow cached documents. The first is the one to do without: the F1 of the others is also compared with its full prefill.
``--calibrate`` keeps the F1 with each checkpoint, so that ``grit rag --mode auto`` uses cached states where they answer as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import labelled, open_answers, table, write_records
from bench.proof_table import relative_difference
from bench.rag_questions import Item, make_items, read_entries
from python_model.evaluation.answers import f1, match
from python_model.model.identity import fingerprint
from python_model.model.modeling import GritLM
from python_model.rag.answer import RAG, open_store
from python_model.rag.calibration import HELPS, LEAST_QUESTIONS, keep
from python_model.rag.store.kvstore import FORMATS, KVStore
from python_model.support.quiet import quiet

WITHOUT, FULL = "no documents", "full prefill"
TO_FIRST = ("f1_to_first", "f1_to_first_low", "f1_to_first_high")
FASTER, LOWER = 3.0, 0.02
"""The goal: how many times faster to the first token, at an F1 lower by how much."""


@dataclass(frozen=True)
class Variant:
    """A mode of answering; ``causal``: which attention made the stored states, None where there are none."""

    mode: str
    causal: bool | None = None
    recompute: int = 0
    recompute_share: float = 0.0


VARIANTS = {
    WITHOUT: Variant("none"),
    FULL: Variant("document_first"),
    "bidirectional cache": Variant("document_cache", False),
    "causal cache": Variant("document_cache", True),
    "causal cache + first 16": Variant("document_cache", True, recompute=16),
    "causal cache + 15 % selected": Variant("document_cache", True, recompute_share=0.15),
}


class Asker:
    """Answers items by every variant with one model."""

    def __init__(self, model: GritLM, folder: Path, format: str, new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.stores: dict[bool, KVStore] = {
            causal: open_store(str(folder / name), model, causal_states=causal, format=format)  # type: ignore[arg-type]
            for causal, name in ((False, "bidirectional"), (True, "causal"))
        }
        self.rags = {
            name: RAG(
                model,
                store=None if variant.causal is None else self.stores[variant.causal],
                causal_states=bool(variant.causal),
                recompute=variant.recompute,
                recompute_share=variant.recompute_share,
            )
            for name, variant in VARIANTS.items()
        }

    def ask(self, item: Item, turn: int) -> dict[str, Any]:
        """Of each variant: the reply, its scores and times. ``turn`` rotates the order in which variants are timed."""
        writing: dict[bool, float] = {}
        for causal, store in self.stores.items():
            writer = RAG(self.model, store=store, causal_states=causal)
            start = time.perf_counter()
            writer.add_to_store(item.documents)
            writing[causal] = time.perf_counter() - start
        names = list(VARIANTS)
        turn %= len(names)
        found = {}
        for name in (*names[turn:], *names[:turn]):
            variant = VARIANTS[name]
            documents = [] if name == WITHOUT else list(item.documents)
            answer = self.rags[name].answer(
                item.question.question, documents, mode=variant.mode, max_new_tokens=self.new_tokens
            )
            found[name] = {
                "reply": answer.text,
                "f1": f1(answer.text, item.question.answers),
                "match": match(answer.text, item.question.answers),
                "first_token_s": answer.seconds["states"] + answer.seconds["first_token"],
                "write_s": 0.0 if variant.causal is None else writing[variant.causal],
                "cached": answer.cached_tokens,
                "read": answer.read_tokens,
                "bytes": 0 if variant.causal is None else self.stores[variant.causal].bytes_used,
            }
        for store in self.stores.values():
            store.discard([document.key for document in item.documents])
        return {name: found[name] for name in VARIANTS}

    def close(self) -> None:
        """Close the stores."""
        for store in self.stores.values():
            store.close()


def measure(model: GritLM, items: Sequence[Item], log: Path, format: str, new_tokens: int) -> list[dict[str, Any]]:
    """The answers to ``items``, in their order; those in ``log`` from an earlier run, of more questions or fewer, are kept.

    Raises:
        ValueError: the log is of another model, other questions or other settings.
    """
    settings = {
        "model": fingerprint(model),
        "format": format,
        "new_tokens": new_tokens,
        "variants": {name: vars(variant) for name, variant in VARIANTS.items()},
    }
    asked = [[item.question.question, *(document.key for document in item.documents)] for item in items]
    with closing(open_answers(log, settings, asked)) as rows, tempfile.TemporaryDirectory() as folder:
        asker = Asker(model, Path(folder), format, new_tokens)
        if len(rows.rows) - 1 < len(items):
            asker.ask(items[0], 0)  # the first forward passes of a process take longer
        for number in range(len(rows.rows) - 1, len(items)):
            rows.append({"asked": asked[number], **asker.ask(items[number], number)})
            if number % 20 == 19:
                print(f"{log.stem}: {number + 1} of {len(items)} questions", flush=True)
        asker.close()
    return rows.rows[1 : len(items) + 1]


def summary(
    model: str,
    items: Sequence[Item],
    answers: Sequence[dict[str, Any]],
    timed: Sequence[dict[str, Any]] | None = None,
    first: Sequence[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One row per variant; ``valid``: whether documents help this model enough for cached states to be judged.

    ``timed``: answers to take the times from, if not from ``answers``; without any, times are None. ``first``: another model's
    answers, whose full prefill ``f1_to_first`` is relative to; without any, it is None.
    """
    timed = answers if timed is None else timed
    scores = {name: np.array([row[name]["f1"] for row in answers]) for name in VARIANTS}
    seconds = {name: np.array([row[name]["first_token_s"] for row in timed]) for name in VARIANTS}
    valid = bool(scores[FULL].mean() > 0 and scores[FULL].mean() >= HELPS * scores[WITHOUT].mean())
    found = []
    for name in VARIANTS:
        own = [row[name] for row in answers]
        low, high = 0.0, 0.0
        difference = 0.0
        if name != FULL and scores[FULL].mean() > 0:
            difference, low, high = relative_difference(scores[name], scores[FULL])
        to_first: tuple[float | None, ...] = (None, None, None)
        if first is not None and (theirs := np.array([row[FULL]["f1"] for row in first])).mean() > 0:
            to_first = relative_difference(scores[name], theirs)
        cached = sum(row["cached"] for row in own)
        first_token: float | None = None
        times_faster: float | None = None
        reuses: float | None = None
        if timed:
            first_token = float(np.median(seconds[name]))
            times_faster = float(np.median(seconds[FULL] / seconds[name]))
            saved = statistics.median(seconds[FULL] - seconds[name])
            written = statistics.median(row[name]["write_s"] for row in timed)
            reuses = written / saved if cached and saved > 0 else None
        found.append(
            {
                "model": model,
                "variant": name,
                "valid": valid,
                "questions": len(items),
                "timed": len(timed),
                "f1": 100 * float(scores[name].mean()),
                "match": 100 * statistics.fmean(row["match"] for row in own),
                "f1_difference": difference,
                "f1_low": low,
                "f1_high": high,
                **dict(zip(TO_FIRST, to_first, strict=True)),
                "first_token_s": first_token,
                "times_faster": times_faster,
                "bytes_per_token": sum(row["bytes"] for row in own) / cached if cached else 0.0,
                "break_even_reuses": reuses,
                "f1_by_kind": {
                    kind: 100 * float(scores[name][[item.kind == kind for item in items]].mean())
                    for kind in dict.fromkeys(item.kind for item in items)
                },
                "seconds": [round(float(value), 6) for value in seconds[name]],
                "f1_of_questions": [round(float(value), 4) for value in scores[name]],
            }
        )
    return found


def keeps_f1(row: dict[str, Any]) -> bool:
    """Whether a variant with cached states has an F1 that is not too low."""
    return row["variant"] not in (WITHOUT, FULL) and row["valid"] and row["f1_difference"] >= -LOWER


def keeps_goal(row: dict[str, Any]) -> bool:
    """Whether a variant with cached states is fast enough at an F1 that is not too low."""
    return keeps_f1(row) and row["times_faster"] is not None and row["times_faster"] >= FASTER


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What follows from the rows of one model."""
    model, full, without = (
        rows[0]["model"],
        *(next(row["f1"] for row in rows if row["variant"] == name) for name in (FULL, WITHOUT)),
    )
    if not rows[0]["valid"]:
        return (
            f"{model}: not valid. Full prefill has F1 {full:.1f} and no documents {without:.1f}; expected at least {HELPS:g} "
            "times as much, so nothing follows about cached states"
        )
    kept = [row["variant"] for row in rows if keeps_goal(row)]
    goal = f"{FASTER:g}x faster to the first token at an F1 at most {LOWER:.0%} lower"
    if kept:
        return f"{model}: {goal}: {', '.join(kept)}"
    if not rows[0]["timed"] and (enough := [row["variant"] for row in rows if keeps_f1(row)]):
        return f"{model}: an F1 at most {LOWER:.0%} lower: {', '.join(enough)}; times were not measured"
    return f"{model}: no variant is {goal}; auto stays at full prefill"


def calibrate(model: GritLM, rows: Sequence[dict[str, Any]], items: Sequence[Item], format: str) -> list[str]:
    """Keeps the F1 of a model's variants next to its checkpoint (see :mod:`python_model.rag.calibration`); returns the variants
    that ``auto`` may use from now on.

    Raises:
        ValueError: too few questions, or a model that was not loaded from a folder.
    """
    scores = {row["variant"]: row["f1"] for row in rows}
    trusted = []
    with tempfile.TemporaryDirectory() as folder:
        asker = Asker(model, Path(folder), format, 1)
        try:
            for name, variant in VARIANTS.items():
                if variant.causal is None:
                    continue
                found = {VARIANTS[kind].mode: scores[kind] for kind in (WITHOUT, FULL, name)}
                kept = keep(asker.rags[name], found, questions=len(items), k=len(items[0].documents))
                trusted += [name] if variant.mode in kept["trusted"] else []
        finally:
            asker.close()
    return trusted


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rag_quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of grit data")
    parser.add_argument("--model", action="append", required=True, help="checkpoint, or LABEL=checkpoint; repeat it")
    parser.add_argument("--output", type=Path, required=True, help="folder for the answers; the same command resumes")
    parser.add_argument("--questions", type=int, help="most questions; default: all")
    parser.add_argument(
        "--timed", type=int, help="ask so many once more for all times; 0: no times; default: those of the answers"
    )
    parser.add_argument("--format", choices=FORMATS, default="int8", help="format of the stored states")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--new", type=int, default=16, help="most tokens of a reply")
    parser.add_argument("--calibrate", action="store_true", help="keep the F1 with each checkpoint, for --mode auto")
    parser.add_argument("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args()
    quiet()
    try:
        items = make_items(read_entries(arguments.data), arguments.questions)
    except ValueError as error:
        parser.error(str(error))
    if arguments.calibrate and len(items) < LEAST_QUESTIONS:
        parser.error(f"--calibrate: expected at least {LEAST_QUESTIONS} questions, got {len(items)}")
    rows: list[dict[str, Any]] = []
    first: list[dict[str, Any]] | None = None
    for given in arguments.model:
        label, path = labelled(given)
        model = GritLM(path, dtype=arguments.dtype, device=arguments.device)
        answers = measure(model, items, arguments.output / f"{label}.jsonl", arguments.format, arguments.new)
        timed = None
        if arguments.timed is not None:
            log = arguments.output / f"{label}.timed.jsonl"
            timed = measure(model, items[: arguments.timed], log, arguments.format, arguments.new)
        found = summary(label, items, answers, timed, first)
        rows += [{**row, "dtype": arguments.dtype, "format": arguments.format} for row in found]
        columns = ["model", "variant", "f1", "f1_low", "f1_high", "match", "first_token_s", "times_faster"]
        columns += ["bytes_per_token", "break_even_reuses", *(() if first is None else TO_FIRST)]
        print(table(found, columns))
        print(verdict(found), flush=True)
        first = answers if first is None else first
        if arguments.calibrate:
            trusted = calibrate(model, found, items, arguments.format)
            print(f"{label}: auto may use {', '.join(trusted) or 'no cached states'}", flush=True)
        if arguments.record:  # after each model: an interrupted run keeps its rows
            write_records(arguments.record, rows)


if __name__ == "__main__":
    main()
