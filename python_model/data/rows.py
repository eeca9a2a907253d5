"""The rows that training and evaluation work with, and the checks of a single text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class DataError(ValueError):
    """A data file cannot be used; the message names file and line. ``reason``: what the row is counted under."""

    def __init__(self, message: str, reason: str = "broken") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        return DataError, (str(self), self.reason)  # pickled between processes


class InstructedText(NamedTuple):
    """A text with the instruction it is embedded under, ``""`` for none. Unpacks as ``instruction, text``."""

    instruction: str
    text: str


class PlainText(InstructedText):
    """A text given as a bare string, not as ``[instruction, text]``."""

    __slots__ = ()


@dataclass(frozen=True)
class EmbeddingRow:
    """One query with at least one passage that answers it and any number that do not.

    Attributes:
        pos, neg: there may be several positives; training draws one of them per step.
        key: the entity the row is about.
        dataset: the data set it belongs to.
        pos_scores, neg_scores: a teacher's score of each passage, for distillation; empty where the row has none.
        origin: ``file:line``.
    """

    query: InstructedText
    pos: tuple[InstructedText, ...]
    neg: tuple[InstructedText, ...] = ()
    key: str | None = None
    dataset: str = ""
    pos_scores: tuple[float, ...] = ()
    neg_scores: tuple[float, ...] = ()
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class GenerativeRow:
    """One conversation: user, assistant, user, assistant, ...; a single turn is a text without roles. ``documents``: the texts
    whose cached states it follows. ``origin`` is ``file:line``."""

    turns: tuple[str, ...]
    key: str | None = None
    dataset: str = ""
    origin: str = field(default="", compare=False)
    documents: tuple[str, ...] = ()


Row = EmbeddingRow | GenerativeRow


@dataclass(frozen=True)
class Passage:
    """A text of a corpus to search. ``origin`` is ``file:line``."""

    key: str
    text: str
    origin: str = field(default="", compare=False)


def to_object(row: Row) -> dict[str, Any]:
    """The row as stored in this project's own files; unset fields are omitted."""
    if isinstance(row, GenerativeRow):
        plain = len(row.turns) == 1
        found: dict[str, Any] = {"text": row.turns[0] if plain else list(row.turns)}
        if row.documents:
            found["documents"] = list(row.documents)
    else:
        found = {"query": _to_json(row.query)}
        for name in ("pos", "neg"):
            texts = getattr(row, name)
            # two bare strings could be read as instruction and text
            found[name] = [list(text) if len(texts) == 2 else _to_json(text) for text in texts]
        found |= {name: list(scores) for name in ("pos_scores", "neg_scores") if (scores := getattr(row, name))}
    return found | {name: value for name in ("key", "dataset") if (value := getattr(row, name))}


def _to_json(text: InstructedText) -> str | list[str]:
    return text.text if isinstance(text, PlainText) else [text.instruction, text.text]


def check_text(value: Any, name: str, origin: str, *, may_be_empty: bool = False) -> str:
    """``value`` if it is a text that a tokenizer accepts.

    Raises:
        DataError: not a string, only white space, or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(f"{origin}: {name}: expected a string, got {json_type(value)}")
    if not may_be_empty and not value.strip():
        raise DataError(f"{origin}: {name}: expected a text, got an empty one", "empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise DataError(f"{origin}: {name}: a lone surrogate (\\u{ord(value[error.start]):04x})") from error
    return value


def titled_text(passage: Mapping[str, Any], origin: str, name: str = "") -> str:
    """The text of a passage ``{"text", "title"?}``, after its title if it has one; errors as :func:`check_text`."""
    title = check_text(passage.get("title") or "", f"{name}title", origin, may_be_empty=True).strip()
    text = check_text(passage.get("text"), f"{name}text", origin)
    return f"{title} {text}" if title else text


def json_type(value: Any) -> str:
    """The JSON name of the value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
