"""Questions with short answers about the FOLDOC and Wikipedia entries of ``grit data``, each with documents to read.

An entry gives up to two questions, whose answers are spans of its text:

    kind    question                                                         answer
    what    What is "latency" in computing? / What is or was Giza?           what the first sentence says it is
    year    Which year is missing in the entry on "Giza": "Built in ____."?   the sentence's only year

The documents of a question are its entry and the entries that BM25 finds nearest to the title and the beginning of that one, in
an order that depends only on question and titles. (The words of the questions themselves would mostly find entries with much
"what", "is" and "was".) Held-out entries are those of ``test/``: no row of ``train/`` is about them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from python_model.corpora.hard_negatives import BM25
from python_model.corpora.split import digest
from python_model.data.files import read_objects
from python_model.evaluation.answers import Question, normalize
from python_model.rag.modes import ANSWER_PREFIX, Document, user_turn
from python_model.support.files import new_file

DISTRACTORS = 3
DATA_SETS = {"foldoc_answer": "foldoc", "wikipedia_answer": "wikipedia"}
_END = (
    r"(?=[,.;:()\"\n]|\s(?:that|which|who|whose|whom|where|when|used|designed|developed|written|for|from|by|in|on|at|to|with|and"
    r"|or|as|produced|made|located|born|known|based|created|between|is|are|was)\b)"
)
_FOLDOC = re.compile(r"(?:1\. )?(?:A|An|The)\s+(.+?)" + _END)
_WIKIPEDIA = re.compile(r"[^.]{0,160}?\b(?:is|was|are|were)\s+(?:a|an|the|one of the)\s+(.+?)" + _END)
_BEFORE = re.compile(r"^(?:/[^/]*/\s*|\([^)]*\)\s*|<[^>]*>\s*)+")
"""What FOLDOC puts before a definition: pronunciation, other names, the field."""
_YEAR = re.compile(r"\b(?:1\d{3}|20[0-2]\d)\b")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
GAP = "____"


@dataclass(frozen=True)
class Entry:
    """An article or definition; ``source`` is ``"foldoc"`` or ``"wikipedia"``."""

    source: str
    title: str
    text: str

    @property
    def document(self) -> Document:
        return Document(f"{self.source}:{self.title}", self.text, self.title)


@dataclass(frozen=True)
class Item:
    """A question, its answers and the documents shown with it, of which ``documents[right]`` has the answer."""

    question: Question
    kind: str
    documents: tuple[Document, ...]
    right: int


def read_entries(data: Path, side: str = "test") -> list[Entry]:
    """The entries of a folder of ``grit data``; ``side``: ``"test"``, those held out, or ``"train"``.

    Raises:
        ValueError: the folder has none of these entries, such as one of WordNet alone.
    """
    files = (
        [data / "test" / "generative.jsonl"] if side == "test" else [data / f"train/{name}.jsonl" for name in DATA_SETS]
    )
    found: dict[str, Entry] = {}
    for file in filter(Path.exists, files):
        for _, row in read_objects(file):
            source, _, title = str(row.get("key", "")).partition(":")
            if row.get("dataset") in DATA_SETS and title:
                found[str(row["key"])] = Entry(source, title, row["text"][1])
    if not found:
        raise ValueError(
            f"data: expected rows of {' or '.join(DATA_SETS)} in {data}, got none; build it with grit data"
        )
    return list(found.values())


def questions_about(entry: Entry) -> Iterator[tuple[str, Question]]:
    """Kind and question, for each kind that the entry allows."""
    computing = entry.source == "foldoc"
    start = (_FOLDOC if computing else _WIKIPEDIA).match(_BEFORE.sub("", entry.text))
    if start is not None and 2 <= len(start[1].split()) <= 8:
        text = f'What is "{entry.title}" in computing?' if computing else f"What is or was {entry.title}?"
        yield "what", Question(text, (start[1].strip(),))
    for sentence in _SENTENCE.split(entry.text):
        years = _YEAR.findall(sentence)
        if len(years) == 1 and 6 <= len(sentence.split()) <= 40:
            gap = _YEAR.sub(GAP, sentence)
            yield "year", Question(f'Which year is missing in the entry on "{entry.title}": "{gap}"?', (years[0],))
            return


def make_items(entries: Sequence[Entry], limit: int | None = None) -> list[Item]:
    """The items of ``entries`` in an order that only depends on the questions; the first ``limit`` of them.

    Raises:
        ValueError: fewer entries than an item has documents.
    """
    if len(entries) <= DISTRACTORS:
        raise ValueError(f"entries: expected more than {DISTRACTORS}, got {len(entries)}")
    asked = [(entry, kind, question) for entry in entries for kind, question in questions_about(entry)]
    asked.sort(key=lambda item: digest(f"rag question:{item[2].question}"))
    asked = asked[:limit]
    queries = [f"{entry.title} {_SENTENCE.split(entry.text)[0]}" for entry, _, _ in asked]
    ranking = BM25(queries, [entry.document.content for entry in entries]).rows()
    return [
        _item(entry, kind, question, scores, entries)
        for (entry, kind, question), scores in zip(asked, ranking, strict=True)
    ]


def _item(entry: Entry, kind: str, question: Question, scores: np.ndarray, entries: Sequence[Entry]) -> Item:
    answer = normalize(question.answers[0])
    others: list[Entry] = []
    for index in np.argsort(-scores, kind="stable"):
        other = entries[int(index)]
        # an entry under the same name, or one that has the answer as well, would be a second right one
        if normalize(other.title) != normalize(entry.title) and answer not in normalize(other.text):
            others.append(other)
        if len(others) == DISTRACTORS:
            break
    shown = [entry, *others]
    shown.sort(key=lambda e: digest(f"{question.question}:{e.source}:{e.title}"))
    return Item(question, kind, tuple(e.document for e in shown), shown.index(entry))


def training_row(item: Item, *, cached: bool = False) -> dict[str, object]:
    """A conversation that answers from the item's documents, as RAG asks it to: it reads them or follows their states."""
    documents = item.documents
    turn = user_turn("document_cache" if cached else "document_first", item.question.question, documents)
    row: dict[str, object] = {"text": [turn, f"{ANSWER_PREFIX} {item.question.answers[0]}"]}
    if not cached:
        return {**row, "dataset": "rag_answer"}
    return {**row, "documents": [document.content for document in documents], "dataset": "rag_cached_answer"}


def training_rows(items: Sequence[Item], cached: float) -> Iterator[dict[str, object]]:
    """The rows of ``items``, of which the share ``cached`` (0 to 1), evenly spread, follow cached states."""
    for number, item in enumerate(items):
        yield training_row(item, cached=int((number + 1) * cached) > int(number * cached))


def main() -> None:
    """Write training rows about the entries that are not held out."""
    parser = argparse.ArgumentParser(prog="python -m bench.rag_questions", description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of grit data")
    parser.add_argument("--output", type=Path, required=True, help=".jsonl file for `grit train`")
    parser.add_argument("--rows", type=int, help="most rows; default: all")
    parser.add_argument("--cached", type=float, default=0.0, help="share of the rows that follow cached documents")
    arguments = parser.parse_args()
    if not 0 <= arguments.cached <= 1:
        parser.error(f"--cached: expected 0 to 1, got {arguments.cached}")
    try:
        items = make_items(read_entries(arguments.data, "train"), arguments.rows)
    except ValueError as error:
        parser.error(str(error))
    with new_file(arguments.output) as file:
        for row in training_rows(items, arguments.cached):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    print(f"{len(items)} rows in {arguments.output}")


if __name__ == "__main__":
    main()
