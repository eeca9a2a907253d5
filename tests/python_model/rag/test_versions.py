"""What the first version wrote is brought up to date, what a newer one wrote is refused."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.model.identity import fingerprint
from python_model.rag import KVStore, StoreError
from python_model.rag.answer import RAG, open_store
from python_model.rag.fingerprint import former_fingerprint
from python_model.rag.index import Index, add_documents, open_index
from python_model.rag.modes import Document

# what version 0.1 (commit bdb9736) wrote: `grit index index_0_1 --add FILE --store store_0_1` with three documents
FOLDERS_0_1 = Path(__file__).parent
DOCUMENTS_0_1 = {
    "river": Document("river", "A river flows through the city.", "Rivers"),
    "france": Document("france", "Paris is the capital of France."),
    "add": Document("add", "def add(first, second): return first + second"),
}


def as_version_2(db: sqlite3.Connection) -> None:
    """Take away what the second version of an index did not have."""
    for name in ("words_inserted", "words_deleted"):
        db.execute(f"DROP TRIGGER {name}")
    db.execute("DROP TABLE words")
    db.execute("ALTER TABLE documents DROP COLUMN metadata")
    for column in ("rows", "changed"):
        db.execute(f"ALTER TABLE shards DROP COLUMN {column}")
    db.execute("DELETE FROM meta WHERE name IN ('vectors', 'collection')")


def as_version_1(folder: Path) -> None:
    """Put a folder back to the layout and the settings of the first version."""
    with sqlite3.connect(folder / "index.sqlite") as db:
        known = dict(db.execute("SELECT name, value FROM meta"))
        settings = json.loads(known["settings"])
        kept = ("pooling_method", "normalized", "attn", "embed_eos", "projection", "prefix", "causal")
        old = {name: value for name, value in settings.items() if name in kept}
        db.execute("UPDATE meta SET value = ? WHERE name = 'settings'", (json.dumps(old),))
        db.execute("UPDATE meta SET value = '1' WHERE name = 'version'")
        if (folder / "vectors").exists():
            db.execute("DROP TABLE sources")
            db.execute("DROP INDEX documents_of_source")
            for column in ("source", "place"):
                db.execute(f"ALTER TABLE documents DROP COLUMN {column}")
            as_version_2(db)
    db.close()


def test_an_index_and_a_store_that_version_0_1_wrote_go_on(checkpoint: Path, tmp_path: Path) -> None:
    """Vectors and states are those of today's model, and what they answer is what documents answer."""
    for name in ("index_0_1", "store_0_1"):
        shutil.copytree(FOLDERS_0_1 / name, tmp_path / name)
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    index, store = open_index(tmp_path / "index_0_1", model), open_store(str(tmp_path / "store_0_1"), model)
    fresh = open_index(tmp_path / "fresh", model)
    add_documents(fresh, model, list(DOCUMENTS_0_1.values()))
    assert index.keys() == fresh.keys() == list(DOCUMENTS_0_1)
    torch.testing.assert_close(index.vectors()[1], fresh.vectors()[1], atol=1e-5, rtol=0)
    query = model.encode(["capital"], instruction=model.formatter.embed_instruction(""))
    (old,), (new,) = index.search(query, 3), fresh.search(query, 3)
    assert [hit.document for hit in old] == [hit.document for hit in new]
    assert (index.recorded["version"], store.recorded["version"]) == (3, 1)  # only the index changed

    assert store.verify() == [] and sorted(store.keys()) == sorted(DOCUMENTS_0_1)
    stored = RAG(model, index=index, store=store).answer("What is the capital?", mode="document_cache")
    read_anew = RAG(model).answer("What is the capital?", [stored.documents[0]], mode="document_cache")
    assert stored.cached_tokens and stored.text == read_anew.text


def test_an_index_and_a_store_of_the_first_version_are_brought_up_to_date(checkpoint: Path, tmp_path: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    documents = [
        Document("a.md#0", "A river"),
        Document("a.md#1", "flows."),
        Document("b.jsonl:3", "x"),
        Document("7", "y"),
    ]
    add_documents(open_index(tmp_path / "i", model), model, documents)
    RAG(model, store=open_store(str(tmp_path / "s"), model)).add_to_store(documents)
    as_version_1(tmp_path / "i")
    as_version_1(tmp_path / "s")
    for _ in range(2):
        index = open_index(tmp_path / "i", model)
        assert [index.document(key).source for key in index.keys()] == ["a.md", "a.md", "b.jsonl", "7"]
        assert index.recorded["version"] == 3 and len(index.search(index.vectors()[1], 4)[0]) == 4
        assert open_store(str(tmp_path / "s"), model).verify() == []
    as_version_1(tmp_path / "i")
    Index(tmp_path / "i").close()  # without a model: its settings are completed by the next that has one
    assert len(open_index(tmp_path / "i", model)) == 4
    as_version_1(tmp_path / "i")
    with pytest.raises(ValueError, match="settings: expected.*rebuild the index: `grit index"):
        open_index(tmp_path / "i", GritLM(checkpoint, device="cpu", dtype="float32", bidirectional_window="full"))


def test_a_setting_that_came_later_has_the_value_it_had_before(checkpoint: Path, tmp_path: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    open_index(tmp_path / "i", model).close()
    with sqlite3.connect(tmp_path / "i" / "index.sqlite") as db:
        (text,) = db.execute("SELECT value FROM meta WHERE name = 'settings'").fetchone()
        settings = json.loads(text)
        assert settings.pop("truncate_dim", 0) is None
        db.execute("UPDATE meta SET value = ? WHERE name = 'settings'", (json.dumps(settings),))
    db.close()
    for _ in range(2):
        assert open_index(tmp_path / "i", model).recorded["settings"]["truncate_dim"] is None
    only = r"settings: expected \{'truncate_dim': None\} as the index .* has, got \{'truncate_dim': 16\}; "
    with pytest.raises(ValueError, match=only):
        open_index(tmp_path / "i", GritLM(checkpoint, truncate_dim=16, device="cpu", dtype="float32"))


@pytest.mark.filterwarnings("ignore:projection")
def test_a_fingerprint_of_a_sample_is_brought_up_to_date(checkpoint: Path, tmp_path: Path) -> None:
    """Earlier versions knew a sample of each weight: their model goes on, and from then on every element counts."""
    torch.manual_seed(0)
    model: Any = GritLM(checkpoint, projection=8, device="cpu", dtype="float32")
    open_index(tmp_path / "i", model).close()
    open_store(str(tmp_path / "s"), model).close()
    for name in ("i", "s"):
        with sqlite3.connect(tmp_path / name / "index.sqlite") as db:
            (text,) = db.execute("SELECT value FROM meta WHERE name = 'settings'").fetchone()
            settings = json.loads(text)
            settings.pop("projection_content", None)
            former = {"settings": settings, "fingerprint": former_fingerprint(model)}
            for key, value in former.items():
                db.execute("UPDATE meta SET value = ? WHERE name = ?", (json.dumps(value), key))
        db.close()
    other: Any = GritLM(checkpoint, projection=8, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="settings: expected"):
        open_index(tmp_path / "i", other)  # which does not become its own
    store = KVStore(tmp_path / "s")
    assert RAG(model, store=store).store is store  # also without being brought up to date
    for _ in range(2):
        for opened in (open_index(tmp_path / "i", model), open_store(str(tmp_path / "s"), model)):
            assert opened.recorded["fingerprint"] == fingerprint(model)
    assert open_index(tmp_path / "i", model).recorded["settings"]["projection_content"]
    with torch.no_grad():
        model.decoder[0].embed_tokens.weight[7, 1] += 0.1
    for open_again in (lambda: open_index(tmp_path / "i", model), lambda: open_store(str(tmp_path / "s"), model)):
        with pytest.raises(ValueError, match="fingerprint: expected"):
            open_again()


def test_a_newer_version_is_refused_by_the_command_that_makes_it_anew(tmp_path: Path) -> None:
    Index(tmp_path / "i").close()
    KVStore(tmp_path / "s").close()
    for kind, name in ((Index, "i"), (KVStore, "s")):
        with sqlite3.connect(tmp_path / name / "index.sqlite") as db:
            db.execute("UPDATE meta SET value = '9' WHERE name = 'version'")
        db.close()
        with pytest.raises(StoreError, match="format version 9.*rebuild it with `grit index"):
            kind(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_act", "gelu"), ("sliding_window", 16), ("layer_types", ["full_attention"] * 2)]
)
def test_a_config_that_gives_other_states_has_another_fingerprint(
    checkpoint: Path, tmp_path: Path, name: str, value: Any
) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    before = fingerprint(model)
    setattr(model.model.config, name, value)
    assert fingerprint(model) != before
