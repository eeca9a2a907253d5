"""Match, exact match and F1 of generated answers, and the file format of questions.

Answers are compared after SQuAD's normalisation: lower case, no punctuation, no articles, single spaces. Each score is the
best over a question's accepted answers; averages are in percent.
"""

from __future__ import annotations

import collections
import os
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from python_model.data.files import read_objects

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """One row of a file in the format of open Natural Questions: ``{"question": str, "answers": [str, ..]}``."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class AnswerScores:
    """Means in percent: whether an accepted answer occurs in the reply, whether it equals the reply, and their word overlap."""

    match: float
    exact_match: float
    f1: float
    questions: int


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def match(reply: str, answers: Sequence[str]) -> float:
    """1.0 if an accepted answer is part of the reply (an answer of only articles and punctuation never is)."""
    wanted = [normalize(answer) for answer in answers]
    return float(any(answer and answer in normalize(reply) for answer in wanted))


def exact_match(reply: str, answers: Sequence[str]) -> float:
    """1.0 if the reply equals an accepted answer."""
    return float(any(normalize(answer) == normalize(reply) for answer in answers))


def f1(reply: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, best over the accepted answers."""
    return max(_word_f1(normalize(reply).split(), normalize(answer).split()) for answer in answers)


def _word_f1(reply: list[str], answer: list[str]) -> float:
    common = sum((collections.Counter(reply) & collections.Counter(answer)).values())
    if common == 0:
        return 0.0
    return 2 * common / (len(reply) + len(answer))


def score(replies: Sequence[str], questions: Sequence[Question]) -> AnswerScores:
    """Scores of one reply per question."""
    if len(replies) != len(questions) or not questions:
        raise ValueError(f"replies: expected {len(questions)}, one per question, got {len(replies)}")

    def mean(metric: Callable[[str, Sequence[str]], float]) -> float:
        return 100 * sum(metric(r, q.answers) for r, q in zip(replies, questions, strict=True)) / len(questions)

    return AnswerScores(mean(match), mean(exact_match), mean(f1), len(questions))


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Rows of a jsonl file ``{"question": str, "answers": [str, ..]}`` (``"answer"``, also as a single string, is accepted).

    Raises:
        ValueError: a row is malformed; the message names file and line.
    """
    found = []
    for origin, row in read_objects(path):
        answers = row.get("answers", row.get("answer"))
        answers = [answers] if isinstance(answers, str) else answers
        text = row.get("question")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{origin}: expected a question row, got one whose question is missing, empty or not a text"
            )
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(
                f"{origin}: expected a question row, got one whose answers are missing, empty or not texts"
            )
        found.append(Question(text, tuple(answers)))
    if not found:
        raise ValueError(f"{path}: expected questions, got none")
    return found
