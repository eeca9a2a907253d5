"""BM25 as a yardstick."""

from __future__ import annotations

import pytest

from python_model.data import sample_dir
from python_model.evaluation.held_out import HeldOut

pytest.importorskip("bm25s", reason="extra demo")
pytest.importorskip("snowballstemmer", reason="extra demo")

from python_model.evaluation.lexical import bm25  # noqa: E402

DOCUMENTS = ["the rivers flow to the sea", "def count_words(text): pass", "a small house"]


def test_words_meet_by_stem_and_by_the_parts_of_identifiers() -> None:
    found = bm25(["a flowing river", "counting the words"], DOCUMENTS, [0, 1])
    assert found.recall_at_1 == 1.0 and found.documents == 3 and found.queries == 2


def test_a_query_without_a_known_word_finds_nothing() -> None:
    assert bm25(["the zebra"], DOCUMENTS * 5, [2]).ndcg_at_10 == 0.0


def test_the_sample_is_as_hard_as_the_demo_says() -> None:
    sample = HeldOut(sample_dir())
    found = bm25([text for _, text in sample.queries], sample.documents, sample.relevant)
    assert found.ndcg_at_10 == pytest.approx(0.419, abs=5e-4)
