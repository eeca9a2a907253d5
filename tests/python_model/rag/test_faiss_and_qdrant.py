"""Vectors in FAISS and in Qdrant: what is approximate was measured, and what is found is what the index holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from python_model.rag import StoreCorruptError, StoreError
from python_model.rag.index import Index
from python_model.rag.modes import Document
from python_model.rag.store.approximate import least_effort
from tests.python_model.rag.numbered import FILTERS, documents, keys, unit

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="FAISS is an extra (rag)")
needs_qdrant = pytest.mark.skipif(
    importlib.util.find_spec("qdrant_client") is None, reason="Qdrant is an extra (qdrant)"
)


# ---- FAISS


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
