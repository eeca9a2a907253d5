"""Search that scales: additions cost what they add, filters and words narrow, what is approximate was measured."""

from __future__ import annotations

import importlib.util
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

from python_model.rag import StoreCorruptError, StoreError
from python_model.rag.filters import checked, read_conditions
from python_model.rag.formats import read_file
from python_model.rag.index import FUSION, Index
from python_model.rag.modes import Document
from python_model.rag.store import vectors as store_vectors
from python_model.rag.store.approximate import least_effort
from python_model.rag.store.vectors import FAN_OUT, int8_products, quantize

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="FAISS is an extra (rag)")
needs_qdrant = pytest.mark.skipif(
    importlib.util.find_spec("qdrant_client") is None, reason="Qdrant is an extra (qdrant)"
)


def unit(count: int, size: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def documents(count: int, start: int = 0) -> list[Document]:
    return [
        Document(
            str(i),
            f"text number{i}",
            source=f"{'notes' if i % 3 else 'mail'}/{i % 7}.md",
            metadata={"year": 2000 + i % 20, "lang": ("de", "fr", "en")[i % 3], "done": i % 2 == 0},
        )
        for i in range(start, start + count)
    ]


def keys(found: Any) -> list[list[str]]:
    return [[hit.document.key for hit in hits] for hits in found]


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


MAIL = ("mail/1.md", "mail/2.md", "mail/3.md")
FILTERS: list[tuple[dict[str, Any], Callable[[Document], bool]]] = [
    ({"lang": "de"}, lambda d: d.metadata["lang"] == "de"),
    ({"lang": ["de", "fr"], "year": 2003}, lambda d: d.metadata["lang"] != "en" and d.metadata["year"] == 2003),
    ({"year": {"min": 2005, "max": 2007.5}}, lambda d: 2005 <= d.metadata["year"] <= 2007),
    ({"year": {"min": 2019}}, lambda d: d.metadata["year"] >= 2019),
    ({"done": True}, lambda d: d.metadata["done"] is True),
    ({"done": 1}, lambda d: False),
    ({"source": "notes/*"}, lambda d: d.source.startswith("notes/")),
    ({"source": ["mail/1.md", "mail/[23].md"], "done": False}, lambda d: d.source in MAIL and not d.metadata["done"]),
    ({"source": "nowhere"}, lambda d: False),
    ({"nothing": "x"}, lambda d: False),
    ({"year": "2003"}, lambda d: False),
]  # fmt: skip


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


# ---- approximate


@pytest.mark.parametrize(
    ("recalls", "target", "expected"),
    [
        ({1: 0.9, 2: 0.98, 4: 0.99, 8: 1.0, 10: 1.0}, 0.98, (2, 0.98)),  # doubles until the target is reached
        ({1: 0.5, 2: 0.6, 4: 0.7, 8: 0.8, 10: 0.99}, 0.98, (10, 0.99)),  # only by the most
        ({1: 0.9, 2: 0.96, 4: 0.966, 8: 0.97, 10: 0.97}, 0.98, (4, 0.966)),  # out of reach: within .005 of the best
    ],
)
def test_the_least_effort_reaches_the_target_or_nearly_the_best(
    recalls: dict[int, float], target: float, expected: tuple[int, float]
) -> None:
    assert least_effort(recalls.__getitem__, 1, 10, target) == expected
    assert least_effort(recalls.__getitem__, 10, 10, target) == (10, recalls[10])


@needs_faiss
@pytest.mark.parametrize("kind", ["ivf-sq8", "hnsw"])
def test_a_faiss_index_is_measured_kept_and_extended(tmp_path: Path, kind: Any) -> None:
    index = Index(tmp_path / "i")
    rows, matrix = documents(1500), unit(1500)
    index.add(rows[:1000], matrix[:1000])
    record = index.build_approximate(kind, recall=0.95)
    assert (record.kind, record.documents, record.target) == (kind, 1000, 0.95) and 0.95 <= record.recall <= 1
    opened = Index(tmp_path / "i")
    assert opened.approximate == record
    asked = unit(50, seed=9)

    def recall(k: int = 10, **options: Any) -> float:
        pairs = zip(opened.search(asked, k, **options), opened.search(asked, k, engine="exact", **options), strict=True)
        found = [({h.document.key for h in a}, {h.document.key for h in b}) for a, b in pairs]
        assert all(len(a) == len(b) for a, b in found)
        return sum(len(a & b) for a, b in found) / sum(len(b) for _, b in found)

    assert recall() > 0.85
    for hits, query in zip(opened.search(asked[:3], 5, engine="approximate"), asked, strict=False):
        assert [h.score for h in hits] == pytest.approx(
            [float(query @ matrix[int(h.document.key)]) for h in hits], abs=0.02
        )
    index.add(rows[1000:1050], matrix[1000:1050])
    assert keys(opened.search(matrix[1049:1050], 1)) == [["1049"]]  # newer than the FAISS index
    index.delete([str(i) for i in range(0, 1000, 2)])
    assert recall() > 0.8 and recall(600) == 1.0  # more than there are: none is missing
    assert recall(where={"lang": "de"}) == 1.0  # few are compared one by one
    assert not index.extend_approximate()
    index.add(rows[1050:1400], matrix[1050:1400])
    assert index.extend_approximate()
    new = opened.approximate
    assert new is not None and new.file != record.file and new.documents == 1400 and new.last > record.last
    assert not (tmp_path / "i" / "vectors" / record.file).exists() and (tmp_path / "i" / "vectors" / new.file).exists()
    assert keys(opened.search(matrix[1399:1400], 1, engine="approximate")) == [["1399"]] and recall() > 0.8
    Index(tmp_path / "i").add(rows[1400:], matrix[1400:])  # a new writer removes leftovers, not this
    assert keys(Index(tmp_path / "i").search(matrix[1499:], 1)) == [["1499"]]
    index.delete([str(i) for i in range(1000, 1400)])
    assert index.extend_approximate() and index.approximate.documents == len(index)  # type: ignore[union-attr]


@needs_faiss
def test_a_filter_narrows_a_faiss_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_model.rag.index.FEW", 0)
    index = Index(tmp_path / "i")
    index.add(documents(1000), unit(1000))
    for kind in ("ivf-sq8", "hnsw"):
        index.build_approximate(kind, recall=1.0)  # type: ignore[arg-type]
        for hits in index.search(unit(20, seed=4), 6, where={"lang": "fr"}):
            assert len(hits) == 6 and {hit.document.metadata["lang"] for hit in hits} == {"fr"}


@needs_faiss
def test_a_faiss_index_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    index = Index(tmp_path / "i")
    index.add(documents(255), unit(255))
    with pytest.raises(ValueError, match="approximate: expected at least 256 documents, got 255"):
        index.build_approximate()
    with pytest.raises(ValueError, match="kind: expected .*got 'lsh'"):
        index.build_approximate("lsh")  # type: ignore[arg-type]
    index.add(documents(45, 255), unit(45, seed=1))
    record = index.build_approximate()
    file = tmp_path / "i" / "vectors" / record.file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreCorruptError, match=f"{record.file}.*checksum"):
        Index(tmp_path / "i").search(unit(1))
    Index(tmp_path / "i").build_approximate()
    assert Index(tmp_path / "i").search(unit(255)[:1], 1)[0][0].score == pytest.approx(1, abs=0.02)


@needs_faiss
def test_a_faiss_index_with_too_few_documents_left_is_removed(tmp_path: Path) -> None:
    index = Index(tmp_path / "i")
    index.add(documents(300), unit(300))
    file = tmp_path / "i" / "vectors" / index.build_approximate().file
    index.delete([str(i) for i in range(200)])
    assert len(index.search(unit(1), 10)[0]) == 10 and file.exists()
    assert not index.extend_approximate() and index.approximate is None and not file.exists()
    assert (
        keys(index.search(unit(300)[250:251], 1))
        == keys(Index(tmp_path / "i").search(unit(300)[250:251], 1))
        == [["250"]]
    )


@pytest.mark.skipif(importlib.util.find_spec("faiss") is not None, reason="tells what to do without FAISS")
def test_without_faiss_the_message_says_how_to_get_it(tmp_path: Path) -> None:
    index = Index(tmp_path / "i")
    index.add(documents(300), unit(300))
    with pytest.raises(ImportError, match=r"grit-kernels\[rag\]"):
        index.build_approximate()


# ---- Qdrant


@needs_qdrant
def test_vectors_in_qdrant_are_found_filtered_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_model.rag.store.qdrant.POINTS_AT_ONCE", 100)  # several pages
    plain, index = Index(tmp_path / "p"), Index(tmp_path / "i", vectors=f"qdrant:{tmp_path / 'q'}")
    rows, matrix = documents(300), unit(300)
    assert index.search(unit(1), 3) == [[]] and index.vectors()[0] == []
    for made in (plain, index):
        made.add(rows[:200], matrix[:200])
        made.replace([str(i) for i in range(0, 50)], rows[200:], matrix[200:])
        made.delete(["60", "61"])
    asked = unit(4, seed=2)
    for where in [None, *(where for where, _ in FILTERS)]:
        want, found = (made.search(asked, 9, where=where) for made in (plain, index))
        assert keys(found) == keys(want)
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose([h.score for h in a], [h.score for h in b], atol=1e-5)
    assert keys(index.search(asked, 5, texts=["number77"] * 4)) == keys(plain.search(asked, 5, texts=["number77"] * 4))
    got, found = index.vectors()
    assert sorted(got) == sorted(plain.keys()) and list((tmp_path / "i" / "vectors").iterdir()) == []
    torch.testing.assert_close(found[got.index("250")], matrix[250], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="approximate: expected vectors in the index's folder, got Qdrant"):
        index.build_approximate()
    with pytest.raises(ValueError, match="vectors: expected 'qdrant:"):
        Index(tmp_path / "i", vectors="folder")


@needs_qdrant
def test_a_folder_of_qdrant_is_opened_when_it_is_used(tmp_path: Path) -> None:
    first = Index(tmp_path / "i", vectors=f"qdrant:{tmp_path / 'q'}")
    second = Index(tmp_path / "i", vectors=f"qdrant:{tmp_path / 'q'}")
    second.add(documents(1), unit(1))
    assert len(first) == 1 and keys(second.search(unit(1), 1)) == [["0"]]


@needs_qdrant
def test_vectors_that_are_gone_from_qdrant_are_an_error(tmp_path: Path) -> None:
    """Otherwise a search would find nothing, and new documents would begin a collection without the old ones."""
    index = Index(tmp_path / "i", vectors=f"qdrant:{tmp_path / 'q'}")
    assert index.search(np.eye(2, dtype=np.float32)[:1]) == [[]]
    index.add([Document("a", "a"), Document("b", "b")], np.eye(2, dtype=np.float32))
    vectors: Any = index._vectors
    (first, *_) = vectors._client.scroll(vectors.collection)[0]
    vectors._client.delete(vectors.collection, vectors._models.PointIdsList(points=[first.id]), wait=True)
    with pytest.raises(StoreError, match="expected 2 points in the collection .*, got 1"):
        index.vectors()
    vectors._client.delete_collection(vectors.collection)
    for use in (
        lambda: index.search(np.eye(2, dtype=np.float32)[:1]),
        lambda: index.add([Document("c", "c")], np.eye(2, dtype=np.float32)[:1]),
    ):
        with pytest.raises(StoreError, match="expected the collection .*, which holds the index's vectors, got none"):
            use()
    assert index.keys() == ["a", "b"]
    index.delete(["a", "b"])
    index.add([Document("c", "c")], np.eye(2, dtype=np.float32)[:1])
    assert len(index.search(np.eye(2, dtype=np.float32)[:1], 3)[0]) == 1


@needs_qdrant
def test_what_a_failed_transaction_left_in_qdrant_is_never_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(tmp_path / "i", vectors=f"qdrant:{tmp_path / 'q'}")
    rows, matrix = documents(60), unit(60)
    index.add(rows[:30], matrix[:30])
    original = index._vectors.add

    def killed(*arguments: Any) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index._vectors, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            index.add(rows[30:50], matrix[30:50])
    assert len(index.search(matrix[40:41], 30)[0]) == 30 == len(index)  # asks for more until enough are known
    index.add(rows[50:], matrix[50:])
    assert keys(index.search(matrix[55:56], 1)) == [["55"]] and len(index.search(matrix[40:41], 60)[0]) == 40
    index.compact()
    assert len(list(index._vectors._points(with_vectors=False))) == 40  # type: ignore[attr-defined]


@needs_qdrant
@pytest.mark.filterwarnings("ignore:Failed to obtain server version")
def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    index = Index(tmp_path / "i", vectors="qdrant:http://127.0.0.1:1")
    with pytest.raises(StoreError, match="Qdrant at http://127.0.0.1:1"):
        index.add(documents(1), unit(1))
    assert len(index) == 0
