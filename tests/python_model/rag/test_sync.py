"""A folder is the truth: an index holds what its files hold now, whatever happened to them or to the process before."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.cli import main
from python_model.rag import formats, sync
from python_model.rag.answer import RAG, bytes_per_token, open_store
from python_model.rag.formats import UnreadableFileError, read_file
from python_model.rag.index import Index, open_index
from python_model.rag.modes import Document
from python_model.rag.reading import read
from python_model.rag.store.kvstore import KVStore

ROOT = Path(__file__).parents[3]
LONG = "\n\n".join(f"Paragraph {i}. A river flows through the city." for i in range(12))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    notes = tmp_path / "notes"
    (notes / "sub").mkdir(parents=True)
    (notes / "a.md").write_text(LONG)
    (notes / "sub" / "b.py").write_text("def add(first, second):\n    return first + second\n")
    (notes / "rows.jsonl").write_text('{"text": "one", "id": 7}\n{"text": "two"}\n')
    return notes


def add(index: Index, model: GritLM, *paths: Path, **options: Any) -> sync.Report:
    return sync.add_files(index, model, paths, max_tokens=60, overlap=0, **options)


def test_files_are_read_again_when_they_change_and_only_then(model: GritLM, folder: Path, tmp_path: Path) -> None:
    index = open_index(tmp_path / "i", model)
    first = add(index, model, folder)
    assert (first.added, first.unchanged, first.documents) == (3, 0, len(index)) and "a.md#3" in index
    assert {d.source for d in map(index.document, index.keys())} == {"a.md", "sub/b.py", "rows.jsonl"}
    assert index.document("rows.jsonl:2").place == "line 2" and index.document("a.md#1").place != "line 1"
    again = add(index, model, folder)
    assert (again.added, again.changed, again.unchanged, again.documents) == (0, 0, 3, 0)
    (folder / "a.md").write_text("A short note.")
    assert add(index, model, folder).changed == 1
    assert [key for key in index.keys() if key.startswith("a.md")] == ["a.md"]  # none of the old chunks stays
    (folder / "a.md").write_text(LONG)
    (folder / "rows.jsonl").unlink()
    add(index, model, folder)
    assert "a.md" not in index and "a.md#3" in index and "7" in index
    gone = add(index, model, folder, sync=True)
    assert gone.removed == 1 and "7" not in index and set(index.sources()) == {"a.md", "sub/b.py"}
    other = sync.add_files(index, model, [folder], max_tokens=30, overlap=0)
    assert (other.changed, other.unchanged) == (2, 0)  # divided otherwise: read again


def test_a_chunk_that_was_deleted_comes_back_with_its_file(model: GritLM, folder: Path, tmp_path: Path) -> None:
    index = open_index(tmp_path / "i", model)
    add(index, model, folder)
    before = {key: index.document(key) for key in index.keys()}
    assert sync.delete(index, ["a.md#1", "sub/b.py"]) == 2
    assert index.sources()["a.md"].digest == "" and index.sources()["rows.jsonl"].digest
    again = add(index, model, folder)
    assert (again.added, again.changed, again.unchanged, again.documents) == (1, 1, 1, 2), "the other chunks are kept"
    assert {key: index.document(key) for key in index.keys()} == before


def test_what_is_to_be_read_is_measured_and_told_file_by_file(model: GritLM, folder: Path, tmp_path: Path) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG")
    index = open_index(tmp_path / "i", model)
    names = ("a.md", "rows.jsonl", "sub/b.py")
    sizes = {name: (folder / name).stat().st_size for name in names}

    def left(max_tokens: int = 60, overlap: int = 0, store: KVStore | None = None) -> int:
        return sync.bytes_to_read(index, [folder], max_tokens, overlap, store)

    assert left() == sum(sizes.values())
    told: list[tuple[int, int]] = []
    report = add(index, model, folder, progress=lambda *figures: told.append(figures))
    assert told == [(n, 4) for n in range(5)] and (report.files, len(report.skipped)) == (4, 1)
    assert left() == 0 and left(max_tokens=30) == left(overlap=9) == sum(sizes.values())
    store = open_store(str(tmp_path / "s"), model)
    assert left(store=store) == sum(sizes.values())
    add(index, model, folder, rag=RAG(model, store=store))
    assert left(store=store) == 0
    store.delete("a.md#1")
    assert left(store=store) == sizes["a.md"] and left() == 0
    (folder / "sub" / "b.py").write_text("pass")
    assert left() == 4


def test_a_file_is_one_file_whichever_folder_it_was_named_by(model: GritLM, folder: Path, tmp_path: Path) -> None:
    index = open_index(tmp_path / "i", model)
    add(index, model, folder)
    assert add(index, model, folder / "sub", folder / "sub" / "b.py").unchanged == 1 and "b.py" not in index
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.md").write_text("Another text.")
    with pytest.raises(ValueError, match=r"would both be 'a.md'"):
        add(index, model, tmp_path / "other")
    os.rename(folder, tmp_path / "moved")
    assert add(index, model, tmp_path / "moved").unchanged == 3


def test_states_leave_the_store_with_their_text(model: GritLM, folder: Path, tmp_path: Path) -> None:
    index, store = open_index(tmp_path / "i", model), open_store(str(tmp_path / "s"), model)
    rag = RAG(model, store=store)
    index.note_store(tmp_path / "s")
    add(index, model, folder)
    assert len(store) == 0
    add(index, model, folder, rag=rag)  # unchanged files, but without states
    assert set(store.keys()) == set(index.keys())
    (folder / "a.md").write_text("A short note.")
    add(index, model, folder)  # no store is named: the states of what is gone go all the same
    assert not [key for key in store.keys() if key.startswith("a.md")]
    add(index, model, folder, rag=rag)
    assert set(store.keys()) == set(index.keys())
    assert sync.delete(index, ["sub/b.py", "7"]) == 2 and set(store.keys()) == {"a.md", "rows.jsonl:2"}
    assert sync.delete(index, ["*.md"]) == 1 and store.keys() == index.keys() == ["rows.jsonl:2"]
    with pytest.raises(KeyError, match="'nothing' matches no document or file"):
        sync.delete(index, ["rows.jsonl:2", "nothing"])
    assert len(index) == 1
    shutil.rmtree(tmp_path / "s")
    assert sync.delete(index, ["rows.jsonl:2"]) == 1 and not (tmp_path / "s").exists()


def test_compacting_an_index_compacts_the_stores_that_are_still_there(model: GritLM, tmp_path: Path) -> None:
    index, store = open_index(tmp_path / "i", model), open_store(str(tmp_path / "s"), model)
    index.note_store(tmp_path / "s")
    index.note_store(tmp_path / "deleted")
    documents = [Document(key, f"A text about {key}.") for key in ("rivers", "cities")]
    states = read(model, [[1, 2, 3], [4, 5, 6]], causal=False)
    RAG(model, store=store).add_to_store(documents, states=states)  # in one shard, which stays until both are gone
    store.delete("rivers")
    before = store.bytes_used
    sync.compact(index)
    assert store.bytes_used < before and store.keys() == ["cities"] and store.verify() == []
    assert not (tmp_path / "deleted").exists()
    (tmp_path / "deleted").mkdir()  # as a process leaves it that dies before it has written its settings
    (tmp_path / "deleted" / "index.sqlite").touch()
    with pytest.raises(FileNotFoundError, match="there is no key-value store in .*deleted"):
        sync.compact(index)


def test_one_pass_gives_the_vectors_and_the_states_of_two(
    model: GritLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str) -> tuple[Index, KVStore]:
        index = open_index(tmp_path / f"i{name}", model)
        path = str(tmp_path / f"s{name}")
        store = open_store(path, model, format="float32")
        rag = RAG(model, store=store)
        add(index, model, folder, rag=rag)
        return index, store

    assert RAG(model).embed_and_read([Document("k", "A river")], "<|embed|>\n") is not None
    assert RAG(model, causal_states=True).embed_and_read([Document("k", "A river")], "<|embed|>\n") is None
    index, store = made("once")
    with monkeypatch.context() as patch:
        patch.setattr(RAG, "embed_and_read", lambda *arguments: None)
        wanted_index, wanted = made("twice")
    torch.testing.assert_close(index.vectors()[1], wanted_index.vectors()[1], atol=2e-6, rtol=0)
    assert store.keys() == wanted.keys() and len(store) > 4
    for key in store.keys():
        got, want = store.load(key), wanted.load(key)
        assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.positions, want.positions)
        torch.testing.assert_close(got.keys_values, want.keys_values, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("limit", [1, 40, 60, 8192])
def test_a_pass_reads_as_many_documents_as_its_tokens_allow(
    model: GritLM, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    texts = ["A river.", "flows " * 12, "through the city", "x", "Paris is the capital of France. " * 2]
    documents = [Document(str(n), text) for n, text in enumerate(texts)]
    rag = RAG(model)
    whole = rag.embed_and_read(documents, "<|embed|>\n")
    assert whole is not None
    lengths = [len(states) for states in whole[1]]
    monkeypatch.setattr("python_model.rag.answer.TOKENS_AT_ONCE", limit)
    passes: list[list[str]] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda given, **options: passes.append(given) or encode(given, **options))
    found = rag.embed_and_read(documents, "<|embed|>\n")
    assert found is not None and [text for given in passes for text in given] == texts
    torch.testing.assert_close(found[0], whole[0], atol=1e-5, rtol=0)
    for got, want in zip(found[1], whole[1], strict=True):
        torch.testing.assert_close(got.keys_values, want.keys_values, atol=1e-4, rtol=1e-4)
    counts = [sum(lengths[texts.index(text)] for text in given) for given in passes]
    assert all(count <= limit or len(given) == 1 for count, given in zip(counts, passes, strict=True))
    for count, following in zip(counts, passes[1:], strict=False):
        assert count + lengths[texts.index(following[0])] > limit, "it would have fitted"


def test_a_batch_that_cannot_be_written_ends_the_run(
    model: GritLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of the file at hand, which would otherwise count as skipped."""
    index = open_index(tmp_path / "i", model)
    replace, calls = index.replace, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        replace(*arguments)

    monkeypatch.setattr(sync, "BATCH", 2)  # a.md alone fills more than one
    monkeypatch.setattr(index, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        add(index, model, folder)
    monkeypatch.undo()
    assert len(index) == 0 and add(index, model, folder).added == 3


def test_files_that_cannot_be_read_are_named_and_skipped(
    model: GritLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_whole: list[str] = []
    digest = sync._digest

    def counted(file: Path) -> str:
        read_whole.append(file.name)
        return digest(file)

    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.md").write_text(" \n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "broken.jsonl").write_text('{"text": "one"\n')
    (folder / "twice.jsonl").write_text('{"text": "one", "id": 7}\n')
    (folder / ".hidden.md").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.md").write_text("secret")
    (folder / "link.md").symlink_to(folder / "gone.md")
    for name in ("large.md", "film.mp4"):
        with open(folder / name, "wb") as file:
            file.truncate(formats.MAX_BYTES + 1)
    monkeypatch.setattr(sync, "_digest", counted)
    index = open_index(tmp_path / "i", model)
    report = add(index, model, folder)
    reasons = {Path(file).name: reason for file, reason in report.skipped}
    words = {
        "binary.txt": "binary",
        "latin.txt": "not UTF-8",
        "empty.md": "is empty",
        "picture.png": "no known kind",
        "broken.jsonl": "broken.jsonl:1",
        "twice.jsonl": "has the key '7' that rows.jsonl has",
        "link.md": "there is no such file",
        "large.md": "is too large: 64 MiB",
        "film.mp4": "no known kind (.mp4)",
    }
    assert set(reasons) == set(words) and all(words[name] in reasons[name] for name in words)
    assert report.added == 3 and not any("secret" in index.document(key).text for key in index.keys())
    unread = {"link.md", "large.md", "film.mp4", "picture.png"}
    assert "binary.txt" in read_whole and not unread & set(read_whole)
    cost = sum((folder / name).stat().st_size for name in set(words) - unread)
    assert sync.bytes_to_read(index, [folder], 60, 0) == cost


def test_a_folder_that_cannot_be_listed_is_named_and_skipped(
    model: GritLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def forbidden(path: Any = ".") -> Any:
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    report = add(open_index(tmp_path / "i", model), model, folder)
    assert report.added == 2 and report.skipped == [(str(folder / "sub"), "is a folder that cannot be listed")]


def test_a_file_is_read_whole_up_to_a_size_and_rows_whatever_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("python_model.rag.formats.MAX_BYTES", 5 << 20)
    (tmp_path / "a.txt").write_text("a" * (5 << 20))
    assert len(read_file(tmp_path / "a.txt", "a.txt")[0].text) == 5 << 20
    (tmp_path / "a.txt").write_text("a" * (6 << 20))
    with pytest.raises(UnreadableFileError, match="is too large: 6 MiB, read are up to 5"):
        read_file(tmp_path / "a.txt", "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * (6 << 20) + '"}\n')
    assert len(read_file(tmp_path / "a.jsonl", "a.jsonl")) == 1


def test_a_killed_or_interrupted_run_goes_on_where_it_was(
    model: GritLM, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sync, "BATCH", 2)
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(8):
        (notes / f"{i}.txt").write_text(f"Note {i}.")
    code = f"""
import os, signal
from python_model import GritLM
from python_model.rag import sync
from python_model.rag.index import open_index
sync.BATCH = 2
model = GritLM({str(checkpoint)!r}, device="cpu", dtype="float32")
index = open_index({str(tmp_path / "i")!r}, model)
with sync.only_writer(index):
    sync.add_files(index, model, [{str(notes)!r}],
                   progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 5 else None)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    index = open_index(tmp_path / "i", model)
    with sync.only_writer(index, lambda: pytest.fail("the lock of a dead process is held")):
        assert len(index) == 4
    real, calls = Index.replace, []

    def interrupted(self: Index, *arguments: Any) -> None:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(real(self, *arguments))

    monkeypatch.setattr(Index, "replace", interrupted)
    command = ["index", str(tmp_path / "i"), "--model", str(checkpoint), "--add", str(notes)]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 130
    told = capsys.readouterr().err
    assert "of 8 files, 2 files added, 0 changed, 4 unchanged" in told and "resumes from here" in told
    monkeypatch.setattr(Index, "replace", real)
    main([*command, "--search", "Note 3.", "--k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 files added, 0 changed, 6 unchanged") and lines[1].startswith("8 documents")
    assert len(lines) == 4 and re.fullmatch(r"0\.\d{4}  3\.txt, line 1  Note 3\..*", lines[2]), "score, place and text"


def test_a_large_file_that_was_begun_keeps_the_chunks_it_has(
    model: GritLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "BATCH", 2)
    real = sync.embed

    def fails_later(index: Index, *arguments: Any) -> Any:
        if len(index) >= 2:
            raise KeyboardInterrupt
        return real(index, *arguments)

    index = open_index(tmp_path / "i", model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sync, "embed", fails_later)
        add(index, model, folder / "a.md")
    assert len(index) == 2 and index.sources()["a.md"].digest == ""
    report = add(index, model, folder / "a.md")
    assert report.documents == len(index) - 2 > 0 and index.sources()["a.md"].digest


def test_the_second_writer_waits_and_then_adds(model: GritLM, folder: Path, tmp_path: Path) -> None:
    index = open_index(tmp_path / "i", model)
    waiting, done = threading.Event(), threading.Event()

    def second() -> None:
        with sync.only_writer(index, waiting.set):
            done.set()

    with sync.only_writer(index):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30) and not done.is_set()
        add(index, model, folder)
    thread.join(30)
    assert done.is_set()


def test_a_store_forgets_the_keys_it_has_and_no_others(tmp_path: Path) -> None:
    assert KVStore(tmp_path / "s").discard(["a", "b"]) == 0


def test_the_cost_is_told_before_the_work_and_a_limit_stops_it(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    command = [
        "index",
        str(tmp_path / "i"),
        "--model",
        str(checkpoint),
        "--add",
        str(folder),
        "--store",
        str(tmp_path / "s"),
    ]
    with pytest.raises(SystemExit, match="--store-limit: expected at most 0 GiB.*nothing was read"):
        main([*command, "--store-limit", "0"])
    told = capsys.readouterr().err
    assert "tokens; their states take about" in told and "(int8)" in told
    assert len(Index(tmp_path / "i")) == 0
    main(command)
    assert len(KVStore(tmp_path / "s")) == len(Index(tmp_path / "i")) > 0
    capsys.readouterr()
    main(command)
    assert "0.0 MiB to read, about 0 tokens" in capsys.readouterr().err


def test_the_cost_of_states_follows_from_the_bytes_of_the_files_and_the_overlap(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four bytes a token, read again where chunks overlap; a limit is compared with what is in the store already, too."""
    monkeypatch.setattr("python_model.rag.answer.bytes_per_token", lambda model, format: 2**24)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    tokens = size / 4 * (1 + 16 / 64)
    states = tokens * 2**24 / 2**30
    command = ["index", str(tmp_path / "i"), "--model", str(checkpoint), "--add", str(folder)]
    command += ["--store", str(tmp_path / "s"), "--chunk-tokens", "64", "--overlap", "16", "--store-limit"]
    with pytest.raises(SystemExit, match=rf"GiB of states, got about {states:.2f} beside 0\.00 in the store"):
        main([*command, str(states * 0.999)])
    told = capsys.readouterr().err
    assert f"{size / 2**20:.1f} MiB to read, about {tokens:,.0f} tokens; " in told
    assert f"their states take about {states:.2f} GiB (int8)" in told
    main([*command, str(states * 1.001)])
    assert len(KVStore(tmp_path / "s")) == len(Index(tmp_path / "i")) > 0
    monkeypatch.setattr(KVStore, "bytes_used", 3 * 2**30)
    with pytest.raises(SystemExit, match=r"got about 0\.00 beside 3\.00 in the store"):
        main([*command, "2.9"])
    main([*command, "3.1"])


def test_a_tokens_states_take_what_is_estimated(model: GritLM) -> None:
    (states,) = read(model, [[1, 2, 3]], causal=True)
    assert bytes_per_token(model, "int8") * 3 == states.keys_values.numel()
    assert bytes_per_token(model, "float32") == 4 * bytes_per_token(model, "int8")


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt_neox", {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}),
        ("gptj", {"n_embd": 64, "n_layer": 3, "n_head": 2}),
    ],
)
def test_states_of_a_family_without_groups_of_heads_are_estimated(family: str, sizes: dict[str, int]) -> None:
    from types import SimpleNamespace

    from transformers import AutoConfig

    of_family: Any = SimpleNamespace(model=SimpleNamespace(config=AutoConfig.for_model(family, **sizes)))
    assert bytes_per_token(of_family, "int8") == 3 * 2 * 64
