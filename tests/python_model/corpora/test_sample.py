"""The bundled sample: questions about people and places."""

from __future__ import annotations

from typing import Any

import pytest

from python_model.corpora.sample import NameRows
from python_model.corpora.sources.wordnet import Synset
from python_model.corpora.split import held_out

ABOVE = {
    "n00007846": (),
    "n00027167": (),
    "n09225146": ("n00027167",),
    "poet": ("n00007846",),
    "lake": ("n09225146",),
}


def questions(**changes: Any) -> list[str]:
    synsets = {key: Synset(key, "n", (key,), "what is above a name", (), groups, True) for key, groups in ABOVE.items()}
    key = next(f"n{i}" for i in range(100) if held_out(f"n{i}", 20))
    named = {
        "key": key,
        "part": "n",
        "words": ("Ada Byron", "Ada"),
        "gloss": "a poet of whom some thirty letters tell",
        "examples": (),
        "groups": (),
        "common": False,
        "instance_of": ("poet",),
        "known_name": True,
    }
    synset = Synset(**{**named, **changes})
    found = [list(NameRows({**synsets, synset.key: synset}, test).rows()) for test in (False, True)]
    assert not found[0] or not found[1], "a name is on one side of the split"
    rows = [*found[0], *found[1]]
    assert all(row["key"] == synset.key and bool(found[1]) == held_out(synset.key, 20) for row in rows)
    return [row["text"][0] for row in rows]


def test_people_and_places_that_are_known_are_asked_about() -> None:
    assert questions() == ["Who was Ada Byron?"]
    assert questions(key=next(f"n{i}" for i in range(100) if not held_out(f"n{i}", 20))) == ["Who was Ada Byron?"]
    assert questions(gloss="a poet who writes letters (born in 1970)") == ["Who is Ada Byron?"]
    assert questions(words=("Lake Ada",), instance_of=("lake",)) == ["What is Lake Ada?"]
    assert questions(words=("Ada",), instance_of=("lake",)) == ["What is the Ada?"]
    assert questions(words=("Ada",), instance_of=("n00027167",)) == ["What is Ada?"]


@pytest.mark.parametrize(
    "change",
    [
        {"known_name": False},
        {"gloss": "a poet of whom only few know"},
        {"gloss": "a poet " + "of letters " * 14},
        {"gloss": "a po\u00e8te of whom some thirty letters tell"},
        {"gloss": "a poet of whom some thirty jesus letters tell"},
        {"words": ("Ada",)},
        {"words": ("ada byron",)},
        {"instance_of": ()},
    ],
)
def test_others_are_not(change: dict[str, Any]) -> None:
    assert questions(**change) == []


def test_glosses_have_30_to_160_characters() -> None:
    assert questions(gloss="a" * 30) and questions(gloss="a" * 160)
    assert not questions(gloss="a" * 29) and not questions(gloss="a" * 161)
