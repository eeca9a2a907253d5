"""Search that scales: additions cost what they add, filters and words narrow."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_model.rag.filters import checked, read_conditions
from python_model.rag.formats import read_file
from python_model.rag.index import FUSION, Index
from python_model.rag.modes import Document
from python_model.rag.store import vectors as store_vectors
from python_model.rag.store.vectors import FAN_OUT, int8_products, quantize
from tests.python_model.rag.numbered import FILTERS, documents, keys, unit


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of vectors that have been read."""
    found: list[Path] = []
    original = store_vectors.read_file

    def counted(path: Path, check: int) -> Any:
        found.append(path)
        return original(path, check)

    monkeypatch.setattr(store_vectors, "read_file", counted)
    return found


# ---- additions


def test_a_search_after_an_addition_reads_what_was_added_and_no_more(tmp_path: Path, files_read: list[Path]) -> None:
    writer, reader = Index(tmp_path / "i"), Index(tmp_path / "i")
    writer.add(documents(5000), unit(5000))
    reader.search(unit(1), 3)
    assert len(files_read) == 1
    for step in range(3):
        files_read.clear()
        writer.add(documents(2, 5000 + 2 * step), unit(2, seed=1 + step))
        (hits,) = reader.search(unit(2, seed=1 + step)[:1], 1)
        assert hits[0].document.key == str(5000 + 2 * step) and len(files_read) == 1
    files_read.clear()
    writer.delete(["7", "5000"])
    assert "7" not in keys(reader.search(unit(5000)[7:8], 50))[0] and files_read == []


def test_files_of_similar_size_are_merged_eight_at_a_time(tmp_path: Path) -> None:
    index, matrix = Index(tmp_path / "i"), unit(100)
    for row, document in enumerate(documents(100)):
        index.add([document], matrix[row : row + 1])
    assert FAN_OUT == 8 and len(list((tmp_path / "i" / "vectors").iterdir())) == 9  # 64 + 4 x 8 + 4 x 1
    assert torch.equal(index.vectors()[1], matrix)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_files_stay_few_and_every_document_is_found_in_its_place(sizes: list[int], random: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        index = Index(folder)
        matrix, rows, present = unit(sum(sizes)), documents(sum(sizes)), []
        for size in sizes:
            start = len(present)
            index.add(rows[start : start + size], matrix[start : start + size])
            present += range(start, start + size)
        gone = {i for i in present if random.random() < 0.2} - {0}
        index.delete([str(i) for i in gone])
        assert len(list((Path(folder) / "vectors").iterdir())) < 4 * FAN_OUT
        kept = [i for i in present if i not in gone]
        for _ in range(2):
            got, found = index.vectors()
            assert got == [str(i) for i in kept] and torch.equal(
                found, matrix[kept]
            )  # the older first, also after merging
            index.compact()
        assert len(list((Path(folder) / "vectors").iterdir())) == 1
        index.close()


def test_files_stay_below_the_size_from_which_they_are_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_vectors, "MERGED_ROWS", 100)
    index, matrix = Index(tmp_path / "i"), unit(190)

    def rows() -> list[int]:
        return [count for (count,) in index._db.execute("SELECT rows FROM shards ORDER BY id")]

    for start, stop in ((0, 40), (40, 100), (100, 150), (150, 190)):
        index.add(documents(stop - start, start), matrix[start:stop])
    assert rows() == [40, 60, 50, 40]
    index.compact()
    assert rows() == [100, 90] and torch.equal(index.vectors()[1], matrix)
    for row in range(70, 190):
        index.delete([str(row)])
    index.compact()
    assert rows() == [70] and torch.equal(index.vectors()[1], matrix[:70])


def test_compacting_gives_back_what_removed_documents_took(tmp_path: Path) -> None:
    index, other = Index(tmp_path / "i"), Index(tmp_path / "i")
    index.add(documents(4000), unit(4000))
    other.search(unit(1), 1)

    def size() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "i").rglob("*") if file.is_file())

    before = size()
    index.delete([str(i) for i in range(3900)])
    index.compact()
    assert size() < before / 10
    assert keys(other.search(unit(4000)[3950:3951], 1)) == [["3950"]]
    assert keys(other.search(unit(1), 1, texts=["number3950"]))[0]


def test_compacting_that_fails_says_why_and_loses_nothing(tmp_path: Path) -> None:
    """Only a lock means that another process is at work; here SQLite is interrupted."""
    index = Index(tmp_path / "i")
    index.add(documents(20), unit(20))
    db = index._db

    def interrupt(statement: str) -> None:
        if statement == "VACUUM":
            db.set_progress_handler(lambda: True, 1)

    db.set_trace_callback(interrupt)
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        index.compact()
    db.set_progress_handler(None, 1)
    assert keys(index.search(unit(20)[7:8], 1)) == [["7"]]


# ---- int8


@pytest.mark.parametrize(("queries", "count", "size"), [(1, 1, 1), (1, 70, 24), (5, 3, 33), (17, 100, 576)])
def test_int8_products_are_those_of_the_stored_rows(queries: int, count: int, size: int) -> None:
    data, scales = quantize(unit(count, size))
    asked = unit(queries, size, seed=1)
    want = asked.double() @ (data.double() * scales.double()).T
    # a query's 16 bits: half a step of 1 / 127^2 of its largest entry, in each of its entries
    bound = asked.abs().amax() / 127**2 / 2 * (data.double() * scales).abs().sum(dim=1).max() * 1.1 + 1e-6
    assert (int8_products(asked, data, scales) - want).abs().max() <= bound
    assert torch.equal(int8_products(torch.zeros(1, size), data, scales), torch.zeros(1, count))


def test_int8_finds_what_its_stored_rows_would(tmp_path: Path) -> None:
    index = Index(tmp_path / "i", format="int8")
    index.add(documents(500), unit(500))
    asked = unit(20, seed=3)
    stored = index.vectors()[1]
    want = (asked @ stored.T).topk(10)
    found = index.search(asked, 10)
    np.testing.assert_allclose([[hit.score for hit in hits] for hits in found], want.values, atol=1e-4)


# ---- filters


@pytest.mark.parametrize(("where", "agrees"), FILTERS, ids=[str(where) for where, _ in FILTERS])
def test_a_filter_finds_the_best_of_those_that_agree(
    tmp_path: Path, where: dict[str, Any], agrees: Callable[[Document], bool]
) -> None:
    index = Index(tmp_path / "i")
    rows, matrix = documents(400), unit(400)
    for start in range(0, 400, 100):
        index.add(rows[start : start + 100], matrix[start : start + 100])
    asked = unit(3, seed=5)
    allowed = [i for i, row in enumerate(rows) if agrees(row)]
    order = (asked @ matrix[allowed].T).argsort(dim=1, descending=True)[:, :8].tolist()
    want = [[str(allowed[i]) for i in row] for row in order]
    assert keys(index.search(asked, 8, where=where)) == want
    words = keys(index.search(asked[:1], 400, where=where, texts=["text"]))[0]
    assert sorted(words) == sorted(str(i) for i in allowed)


def test_conditions_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    assert read_conditions(["lang=de", "lang=fr", "year>=2020", "year<=2024.5", "done=true", "source=1"]) == {
        "lang": ["de", "fr"],
        "year": {"min": 2020, "max": 2024.5},
        "done": [True],
        "source": ["1"],
    }
    for bad in (["lang"], ["year>x"], ["year>=x"], ["year=3", "year>=2"], ["source>=1"]):
        with pytest.raises(ValueError, match="where: expected"):
            read_conditions(bad)
    for where in ({"a": None}, {"a": []}, {"a": {}}, {"a": {"least": 1}}, {"a": {"min": "x"}}, {"source": 3}):
        with pytest.raises(ValueError, match="where: expected"):
            checked(where)
    index = Index(tmp_path / "i")
    index.add(documents(3), unit(3))
    with pytest.raises(ValueError, match="where: expected"):
        index.search(unit(1), where={"a": None})
    injected = {"x') OR 1 --": "1", 'quote"d': "2"}
    assert index.search(unit(1), where=injected) == [[]]
    for large in (2**63, {"min": -(2**63) - 1}):
        with pytest.raises(ValueError, match="where: expected integers of 64 bits for 'a', got"):
            index.search(unit(1), where={"a": large})
    assert read_conditions(["name=nan", "name=inf", "name=1e3"]) == {"name": ["nan", "inf", 1000.0]}


def test_a_name_that_reads_as_a_pattern_stands_for_itself_too(tmp_path: Path) -> None:
    index = Index(tmp_path / "i")
    index.add([Document("a", "x", source="notes[1].md"), Document("b", "x", source="notes1.md")], unit(2))
    assert sorted(keys(index.search(unit(1), where={"source": "notes[1].md"}))[0]) == ["a", "b"]
    assert keys(index.search(unit(1), where={"source": "*]*"})) == [["a"]]


def test_numbers_that_json_does_not_have_are_no_metadata(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "a": NaN, "b": -Infinity, "c": 1.5}')
    (document,) = read_file(tmp_path / "a.jsonl", "a.jsonl")
    assert document.metadata == {"c": 1.5}
    index = Index(tmp_path / "i")
    index.add([document], unit(1))
    assert len(index.search(unit(1), where={"c": 1.5})[0]) == 1
    with pytest.raises(ValueError, match="metadata: expected finite numbers, got nan as 'a' of 'k'"):
        index.add([Document("k", "x", metadata={"a": float("nan")})], unit(1))
    assert len(index) == 1


def test_other_fields_of_a_row_are_its_metadata(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one", "id": 1, "lang": "de", "year": 3, "ok": true, "no": null, "list": []}'
    )
    (document,) = read_file(tmp_path / "a.jsonl", "a.jsonl")
    assert document.metadata == {"lang": "de", "year": 3, "ok": True}
    index = Index(tmp_path / "i")
    index.add([document], unit(1))
    assert index.document("1").metadata == document.metadata


# ---- words


def test_a_hybrid_search_fuses_the_ranks_by_vectors_and_by_words(tmp_path: Path) -> None:
    index = Index(tmp_path / "i")
    rows, matrix = documents(200), unit(200)
    rows[150] = replace(rows[150], text="The Rivers flow, said XK-42.")
    index.add(rows, matrix)
    asked = matrix[10:11]
    for text in ("river", "xk 42", "FLOWING"):
        (hits,) = index.search(asked, 2, texts=[text])
        assert sorted(hit.document.key for hit in hits) == ["10", "150"]
        place = keys(index.search(asked, 50))[0]
        for hit in hits:
            by_vector = 1 / (FUSION + 1 + place.index(hit.document.key)) if hit.document.key in place else 0
            by_words = 1 / (FUSION + 1) if hit.document.key == "150" else 0
            assert hit.score == pytest.approx(by_vector + by_words)
    # no word is known, or there is none, whatever signs it has: what the vectors say
    for text in ("zzz", "", '"*" AND (', "NEAR"):
        assert keys(index.search(asked, 5, texts=[text])) == keys(index.search(asked, 5))
    index.delete(["150"])
    assert "150" not in keys(index.search(asked, 100, texts=["river"]))[0]
    index.add([replace(rows[150], text="other")], matrix[150:151])
    index.compact()
    assert keys(index.search(asked, 1, texts=["river"])) == [["10"]]
