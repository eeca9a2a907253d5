"""Reading of training rows: every malformed row is refused with its file and line, every well-formed one keeps its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from python_model.data.jsonl import (
    DataError,
    EmbeddingRow,
    GenerativeRow,
    InstructedText,
    Passage,
    read_corpus,
    read_embedding,
    read_generative,
    read_rows,
)

EMBEDDING = {"query": ["find it", "a question"], "pos": [["", "its answer"]], "neg": [["", "another"]]}
GENERATIVE = {"text": ["a question", "a reply"]}


def write(path: Path, *rows: Any) -> Path:
    """A jsonl file; strings and bytes are written as they are, all else as JSON."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_an_embedding_row_keeps_instructions_texts_key_and_origin(tmp_path: Path) -> None:
    file = write(
        tmp_path / "qa.train.jsonl", {**EMBEDDING, "key": "k1"}, {"query": "q", "pos": ["p", ["i", "r"]], "neg": []}
    )
    first, second = read_embedding(file)
    assert first == EmbeddingRow(
        InstructedText("find it", "a question"), (("", "its answer"),), (("", "another"),), "k1", "qa"
    )
    assert second == EmbeddingRow(InstructedText("", "q"), (("", "p"), ("i", "r")), (), None, "qa")
    assert second.origin == f"{file}:2"


def test_a_generative_row_keeps_its_turns(tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", {"text": [" a\n", "b", "c", "d"], "dataset": "other", "ignored": 1})
    assert read_generative(file) == [GenerativeRow((" a\n", "b", "c", "d"), None, "other")]


def test_unicode_empty_lines_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    line = json.dumps({"text": ["naïve\u2028line", "日本語 😀"]}, ensure_ascii=False).encode()
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [row.turns for row in read_generative(file)] == [("naïve\u2028line", "日本語 😀")] * 2
    assert read_generative(file)[1].origin.endswith(":4")


def test_a_folder_gives_the_rows_of_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", EMBEDDING)
    write(tmp_path / "a.jsonl", EMBEDDING, EMBEDDING)
    write(tmp_path / "g.jsonl", GENERATIVE)
    (tmp_path / "notes.txt").write_text("not data")
    embedding, generative = read_rows(tmp_path)
    assert [row.dataset for row in embedding] == ["a", "a", "b"]
    assert read_embedding(tmp_path) == embedding and read_generative(tmp_path) == generative
    assert len(generative) == 1


BROKEN = {
    "broken json": ('{"query": "a"', "not valid JSON"),
    "not utf-8": (b'{"text": ["\xff", "a"]}', "not UTF-8"),
    "not an object": (["a"], "got a list"),
    "a number": (3, "got a number"),
    "null": (None, "got null"),
    "nested too deeply": ("[" * 100_000, "nested too deeply"),
    "no known column": ({"prompt": "a"}, "['prompt']"),
    "both kinds": ({**EMBEDDING, **GENERATIVE}, "both 'query' and 'text'"),
    "no pos": ({"query": "a", "neg": []}, "'pos' is missing"),
    "misspelt neg": ({"query": "a", "pos": ["b"], "negs": []}, "'neg' is missing"),
    "empty pos": ({**EMBEDDING, "pos": []}, "pos: got an empty list"),
    "pos not a list": ({**EMBEDDING, "pos": "b"}, "pos: got a string"),
    "neg null": ({**EMBEDDING, "neg": None}, "neg: got null"),
    "query null": ({**EMBEDDING, "query": None}, "query: got null"),
    "query a number": ({**EMBEDDING, "query": 1.5}, "query: got a number"),
    "empty query": ({**EMBEDDING, "query": ["i", " \n"]}, "query[1]: got an empty text"),
    "instruction null": ({**EMBEDDING, "query": [None, "a"]}, "query[0]: got null"),
    "three parts": ({**EMBEDDING, "query": ["a", "b", "c"]}, "got a list of 3"),
    "empty passage": ({**EMBEDDING, "neg": ["a", ""]}, "neg[1]: got an empty text"),
    "passage null": ({**EMBEDDING, "pos": ["a", None]}, "pos[1]: got null"),
    "text a string": ({"text": "a"}, "text: got a string"),
    "text null": ({"text": None}, "text: got null"),
    "one turn": ({"text": ["a"]}, "got 1 turns"),
    "odd turns": ({"text": ["a", "b", "c"]}, "got 3 turns"),
    "empty reply": ({"text": ["a", ""]}, "text[1]: got an empty text"),
    "turn a boolean": ({"text": ["a", True]}, "text[1]: got true or false"),
    "lone surrogate": ('{"text": ["a", "\\ud800"]}', "lone surrogate"),
    "key a number": ({**GENERATIVE, "key": 3}, "key: got a number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_refused_with_its_file_and_line(tmp_path: Path, name: str) -> None:
    row, message = BROKEN[name]
    good = GENERATIVE if isinstance(row, dict) and "text" in row and "query" not in row else EMBEDDING
    file = write(tmp_path / "data.jsonl", good, b"", row)
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert str(caught.value).startswith(f"{file}:3: ") and message in str(caught.value)


def test_two_kinds_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:2: another kind of row than at .*data.jsonl:1"):
        read_rows(write(tmp_path / "data.jsonl", EMBEDDING, GENERATIVE))


def test_the_other_kind_and_nothing_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only generative rows"):
        read_embedding(write(tmp_path / "g.jsonl", GENERATIVE))
    with pytest.raises(DataError, match="only embedding rows"):
        read_generative(write(tmp_path / "e.jsonl", EMBEDDING))
    with pytest.raises(DataError, match="empty.jsonl: no rows"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no \*.jsonl file"):
        read_rows(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="no file or folder .*missing"):
        read_rows(tmp_path / "missing")


def test_a_corpus_has_unique_keys_and_texts(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus.jsonl", {"key": "a", "text": "one"}, {"key": "b", "text": "one"})
    assert read_corpus(file) == [Passage("a", "one"), Passage("b", "one")]
    with pytest.raises(DataError, match=r"c.jsonl:2: the key 'a' stands already at .*c.jsonl:1"):
        read_corpus(write(tmp_path / "c.jsonl", {"key": "a", "text": "one"}, {"key": "a", "text": "two"}))
    with pytest.raises(DataError, match=r"d.jsonl:1: the column 'key' is missing"):
        read_corpus(write(tmp_path / "d.jsonl", {"text": "one"}))
