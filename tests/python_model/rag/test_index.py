"""An index finds what exact search finds, survives reopening and damage, and refuses another model's vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from python_model import GritLM
from python_model.rag import StoreCorruptError
from python_model.rag.answer import RAG, open_store
from python_model.rag.documents import chunk, read_documents
from python_model.rag.index import Index, add_documents, open_index
from python_model.rag.modes import Document
from python_model.rag.store.vectors import stable_top_k
from python_model.rag.sync import delete
from tests.python_model.rag.numbered import keys, unit


def make(count: int, size: int = 16, seed: int = 0) -> tuple[list[Document], torch.Tensor]:
    documents = [Document(f"{seed}-{i}", f"text {i}", f"title {i}" if i % 2 else "") for i in range(count)]
    return documents, unit(count, size, seed)


@pytest.mark.parametrize("rows_at_once", [1 << 16, 8])
def test_search_equals_sorting_all_inner_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr("python_model.rag.store.vectors.ROWS_AT_ONCE", rows_at_once)
    index = Index(tmp_path / "i")
    (a, va), (b, vb) = make(30, seed=0), make(25, seed=1)
    index.add(a, va)
    index.add(b, vb)
    queries = make(4, seed=2)[1]
    scores = queries @ torch.cat([va, vb]).T
    want = scores.argsort(dim=1, descending=True)[:, :7]
    names = [d.key for d in a + b]
    for opened in (index, Index(tmp_path / "i")):
        found = opened.search(queries, 7)
        assert keys(found) == [[names[i] for i in row] for row in want.tolist()]
        np.testing.assert_allclose([[h.score for h in hits] for hits in found], scores.gather(1, want), atol=1e-6)
    assert found[0][0].document in a + b and len(index) == 55 and "0-3" in index
    assert [len(hits) for hits in index.search(queries, 100)] == [55] * 4
    got_keys, got = index.vectors()
    assert got_keys == names and torch.equal(got, torch.cat([va, vb]))


@pytest.mark.parametrize(("name", "error"), [("float16", 1e-3), ("int8", 1e-2)])
def test_smaller_vectors_change_scores_by_their_rounding_only(tmp_path: Path, name: Any, error: float) -> None:
    documents, vectors = make(50, 64)
    index = Index(tmp_path / "i", format=name)
    index.add(documents, vectors)
    for hits, query in zip(index.search(vectors[:5], 50), vectors[:5], strict=True):
        exact = {d.key: float(query @ v) for d, v in zip(documents, vectors, strict=True)}
        assert max(abs(hit.score - exact[hit.document.key]) for hit in hits) < error
        assert hits[0].score == pytest.approx(1, abs=error)


def test_adding_deleting_and_overwriting_is_seen_by_every_opened_index(tmp_path: Path) -> None:
    index, other = Index(tmp_path / "i"), Index(tmp_path / "i")
    documents, vectors = make(10)
    assert other.search(vectors[:1], 3) == [[]]
    index.add(documents, vectors)
    assert keys(other.search(vectors[3:4], 1)) == [["0-3"]]
    index.delete(["0-3", "0-4"])
    assert keys(other.search(vectors[3:4], 10))[0] == keys(index.search(vectors[3:4], 10))[0]
    assert "0-3" not in keys(other.search(vectors[3:4], 10))[0] and len(other) == 8
    with pytest.raises(KeyError, match="'0-3' is not in the index"):
        index.delete(["0-1", "0-3"])
    assert "0-1" in index
    with pytest.raises(ValueError, match="'0-1' is in the index already"):
        index.add(documents[1:2], vectors[3:4])
    index.add([Document("0-1", "new")], vectors[3:4], overwrite=True)
    assert keys(other.search(vectors[3:4], 1)) == [["0-1"]] and other.document("0-1").text == "new"
    index.delete(index.keys())
    for engine in ("exact", "auto"):
        assert other.search(vectors[:2], 3, engine=engine) == [[], []]
    assert list((tmp_path / "i" / "vectors").iterdir()) == []


def test_equal_scores_keep_the_order_of_the_documents(tmp_path: Path) -> None:
    index = Index(tmp_path / "i")
    for i in range(3):
        index.add([Document(f"{i}{j}", "x") for j in range(3)], torch.ones(3, 4))
    assert keys(index.search(torch.ones(1, 4), 5)) == [["00", "01", "02", "10", "11"]]


def test_a_reader_does_not_make_the_index_that_a_killed_process_began(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "index.sqlite").touch()  # as SQLite leaves it until the first transaction
    with pytest.raises(FileNotFoundError, match="no index in"):
        Index(tmp_path / "i", create=False)
    assert Index(tmp_path / "i", fingerprint="one").recorded["fingerprint"] == "one"


def test_bad_input_is_named(tmp_path: Path) -> None:
    index = Index(tmp_path / "i", fingerprint="one")
    documents, vectors = make(2)
    index.add(documents, vectors)
    for bad, message in (
        (lambda: index.add(documents, vectors[:1]), r"vectors: expected .*, got \(1, 16\)"),
        (lambda: index.add([Document("n", "x")], torch.full((1, 16), float("nan"))), "expected finite values"),
        (lambda: index.add([Document("n", "x")], torch.ones(1, 8)), "expected size 16 .* got 8"),
        (lambda: index.add([Document("n", "x")] * 2, vectors), "a duplicate key"),
        (lambda: index.search(torch.ones(1, 8)), r"queries: expected .*, got \(1, 8\)"),
        (lambda: index.search(vectors, 0), "k: expected .*got 0"),
        (lambda: index.search(vectors, engine="annoy"), "engine: expected .*got 'annoy'"),
        (lambda: index.search(vectors, engine="approximate"), "engine: expected a FAISS index .*got none"),
        (lambda: index.search(vectors, texts=["one"]), "texts: expected one for each of 2 queries, got 1"),
        (lambda: Index(tmp_path / "j", vectors="redis"), "vectors: expected 'folder' .*got 'redis'"),
        (lambda: Index(tmp_path / "i", fingerprint="two"), "fingerprint: .*got 'two'"),
        (lambda: Index(tmp_path / "i", format="int8"), "format: expected 'float32'.*got 'int8'"),
        (lambda: Index(tmp_path / "j", format="pickle"), "format: expected .*got 'pickle'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(FileNotFoundError, match="no index in"):
        Index(tmp_path / "nowhere", create=False)
    assert len(index) == 2


def test_damaged_vectors_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    Index(tmp_path / "i").add(*make(3))
    (file,) = (tmp_path / "i" / "vectors").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreCorruptError, match=f"{file.name}.*checksum"):
        Index(tmp_path / "i").search(torch.ones(1, 16))
    file.write_bytes(content[:-4])
    with pytest.raises(StoreCorruptError, match=f"{file.name}.*cannot be read"):
        Index(tmp_path / "i").search(torch.ones(1, 16))


def test_documents_come_from_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "note.md").write_text("# A note\n")
    rows = [{"text": "one", "title": "T", "id": 7}, {"text": "two", "_id": "x"}, {"text": "three"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert list(read_documents(tmp_path)) == [
        Document("7", "one", "T"),
        Document("x", "two"),
        Document("a.jsonl:3", "three"),
        Document("b/note.md", "# A note", "note"),
    ]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    with pytest.raises(ValueError, match="a.jsonl:2: not valid JSON"):
        list(read_documents(tmp_path / "a.jsonl"))
    for content, message in ((b'{"title": "T"}', "a.jsonl:1: not a document row"), (b"\n", "a.jsonl is empty")):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_documents(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="a.jsonl:2: not UTF-8"):  # the byte order mark of line 1 is none of its text
        list(read_documents(tmp_path / "a.jsonl"))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for path, message in (("picture.png", "no known kind"), ("bad.txt", "not UTF-8")):
        with pytest.raises(ValueError, match=message):
            list(read_documents(tmp_path / path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .jsonl"):
        list(read_documents(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        list(read_documents(tmp_path / "nowhere"))


@given(st.text(alphabet="ab \n\u00e9\u6771-", max_size=200), st.integers(1, 9))
def test_chunks_hold_the_text_and_stay_within_their_tokens(tokenizer: Any, text: str, size: int) -> None:
    pieces = chunk(Document("k", text, "T"), tokenizer, size)
    assert "".join("".join(piece.text for piece in pieces).split()) == "".join(text.split())
    for piece in pieces:
        # one character may take several tokens and is not divided
        assert len(tokenizer(piece.text, add_special_tokens=False)["input_ids"]) <= size or len(piece.text) == 1
        assert piece.title == "T" and piece.text == piece.text.strip()
    assert [p.key for p in pieces] == (["k"] if len(pieces) == 1 else [f"k#{i}" for i in range(len(pieces))])


def test_chunks_are_cut_at_white_space_and_may_overlap(tokenizer: Any) -> None:
    text = "A river flows through the city. " * 20
    for piece in chunk(Document("k", text), tokenizer, 20):
        assert set(piece.text.split()) <= set(text.split())
    pieces = chunk(Document("k", text), tokenizer, 20, overlap=9)
    assert all(len(tokenizer(p.text, add_special_tokens=False)["input_ids"]) <= 20 for p in pieces)
    assert sum(len(p.text) for p in pieces) > len(text)
    for bad in ((0, 0), (4, 2), (4, -1)):
        with pytest.raises(ValueError, match="max_tokens, overlap: expected"):
            chunk(Document("k", text), tokenizer, *bad)


def test_a_model_fills_an_index_that_another_model_cannot_open(checkpoint: Path, tmp_path: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    documents = [Document(str(i), text) for i, text in enumerate(["A river flows.", "def add(first):", "Paris is it."])]
    index = open_index(tmp_path / "i", model)
    add_documents(index, model, documents, batch=2)
    want = model.encode([d.content for d in documents], instruction="<|embed|>\n")
    np.testing.assert_allclose(index.vectors()[1], want, atol=2e-6)
    answer = RAG(model, index=open_index(tmp_path / "i", model)).answer("A river flows.", k=2, max_new_tokens=2)
    assert answer.documents[0] == documents[0] and len(answer.scores) == 2 and answer.scores[0] > 0.99
    cached = RAG(model, index=index).answer("A river flows.", mode="query_cache", max_new_tokens=2)
    assert cached.cached_tokens > 0  # the states of the pass that embedded the question
    with pytest.raises(ValueError, match="settings: expected"):
        open_index(tmp_path / "i", GritLM(checkpoint, pooling_method="cls", device="cpu", dtype="float32"))
    other = GritLM(checkpoint, device="cpu", dtype="float32")
    with torch.no_grad():
        other.decoder[0].norm.weight.mul_(1.5)
    with pytest.raises(ValueError, match="fingerprint: expected"):
        open_index(tmp_path / "i", other)
    with pytest.raises(ValueError, match="'long' has more than 512 tokens"):
        add_documents(index, model, [Document("long", "a river " * 600)])


def test_documents_are_added_in_batches_within_a_length_and_replace_others_if_asked(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    index = open_index(tmp_path / "i", model)
    documents = [Document(str(i), f"river {i}") for i in range(5)]
    told: list[tuple[int, int]] = []
    add_documents(index, model, documents, batch=2, progress=lambda *figures: told.append(figures))
    assert told == [(2, 5), (4, 5), (5, 5)] and len(index) == 5
    again = [Document("3", "a city")]
    with pytest.raises(ValueError, match="'3' is in the index already"):
        add_documents(index, model, again)
    add_documents(index, model, again, overwrite=True)
    assert index.document("3") == again[0] and len(index) == 5
    length = len(model.formatter.text("<|embed|>\n", "a city", 512))
    add_documents(index, model, again, overwrite=True, max_length=length)
    with pytest.raises(ValueError, match=f"'3' has more than {length - 1} tokens"):
        add_documents(index, model, again, overwrite=True, max_length=length - 1)


@pytest.mark.filterwarnings("ignore:projection")
def test_an_embedding_head_with_other_weights_is_another_model(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = (GritLM(checkpoint, projection=16, device="cpu", dtype="float32") for _ in range(2))
    open_index(tmp_path / "i", first)
    open_index(tmp_path / "i", first)
    with pytest.raises(ValueError, match="settings: expected"):
        open_index(tmp_path / "i", second)
    head: Any = first.projection
    with torch.no_grad():
        head.weight[3, 1] += 0.1  # one number of many
    with pytest.raises(ValueError, match="settings: expected"):
        open_index(tmp_path / "i", first)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 50), st.integers(2, 6))
def test_top_k_equals_a_stable_sort_also_where_scores_are_equal(rows: int, n: int, k: int, values: int) -> None:
    scores = torch.randint(values, (rows, n)).float()
    best, columns = stable_top_k(scores, k)
    expected, order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best, expected[:, :k]) and torch.equal(columns, order[:, :k])


def test_a_file_in_place_of_its_folder_is_named(checkpoint: Path, tmp_path: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    (tmp_path / "file").touch()
    for open_folder in (lambda path: open_index(path, model), lambda path: open_store(str(path), model)):
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(NotADirectoryError, match=f"^{path}: expected a folder or a new name, got a file$"):
                open_folder(path)


def test_an_empty_name_is_not_that_of_documents_without_a_file(tmp_path: Path) -> None:
    """``grit index --delete ""`` removed all that came from no file."""
    documents, vectors = make(4)
    index = Index(tmp_path / "i")
    index.add(documents, vectors)
    with pytest.raises(ValueError, match="name: expected a key, a file or a pattern, got ''"):
        delete(index, [documents[0].key, ""])
    assert len(index) == 4 and delete(index, ["0-*"]) == 4
