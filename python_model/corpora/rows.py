"""The rows that are written, and the instructions of the retrieval tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INSTRUCTIONS = {
    "wordnet_definition": "Given a word and its synonyms, retrieve the dictionary definition",
    "wordnet_sense": "Given a sentence and a word in it, retrieve the definition of the word as used there",
    "python_function": "Given a description of a function, retrieve the Python code that implements it",
    "wikipedia": "Given an encyclopedia topic, retrieve the article introduction about it",
    "foldoc": "Given a computing term, retrieve its definition",
    "debian": "Given a short summary of a software package, retrieve its full description",
}
"""By data set."""


def row(dataset: str, key: str, query: str, pos: str, neg: Sequence[str]) -> dict[str, Any]:
    """An embedding row."""
    return {
        "query": [INSTRUCTIONS[dataset], query],
        "pos": [["", pos]],
        "neg": [["", text] for text in neg],
        "key": key,
        "dataset": dataset,
    }


def conversation(dataset: str, key: str, *turns: str) -> dict[str, Any]:
    """A generative row."""
    return {"text": list(turns), "key": key, "dataset": dataset}


def sentence(text: str) -> str:
    """The text with a capital first letter and a full stop."""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")
