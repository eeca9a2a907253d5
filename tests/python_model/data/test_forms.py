"""Rows of other tools are read as those tools mean them, or refused with a reason; nothing about them is dropped in silence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from python_model.data.datasets import open_file
from python_model.data.files import data_files, read_objects, unread_note
from python_model.data.index import index_file
from python_model.data.reading import file_reader, read_rows, tolerant_rows
from python_model.data.report import DataReport
from python_model.data.rows import DataError, EmbeddingRow, GenerativeRow, InstructedText, PlainText, Row, to_object
from tests.python_model.data.test_data import write


def plain(*texts: str) -> tuple[PlainText, ...]:
    return tuple(PlainText("", text) for text in texts)


def row(tmp_path: Path, columns: dict[str, Any], **options: Any) -> Row:
    file = write(tmp_path / "x.jsonl", columns)
    reader = file_reader(file, **options)
    return reader.row(columns, f"{file}:1")


FLAG = {"query": "a dog runs", "pos": ["a dog is running", "dogs run"], "neg": ["a cat sleeps"]}
EMBEDDING_FORMS: dict[str, tuple[dict[str, Any], EmbeddingRow]] = {
    "FlagEmbedding, prompt is the instruction": (
        {**FLAG, "prompt": "Find the same.", "type": "symmetric_sts"},
        EmbeddingRow(
            InstructedText("Find the same.", "a dog runs"), plain(*FLAG["pos"]), plain(*FLAG["neg"]), dataset="x"
        ),
    ),
    "FlagEmbedding, teacher's scores": (
        {**FLAG, "pos_scores": [3, 2.5], "neg_scores": [-1]},
        EmbeddingRow(
            PlainText("", "a dog runs"), plain(*FLAG["pos"]), plain(*FLAG["neg"]), None, "x", (3.0, 2.5), (-1.0,)
        ),
    ),
    "no negatives": ({"query": "q", "pos": ["p"]}, EmbeddingRow(PlainText("", "q"), plain("p"), dataset="x")),
    "negatives null": (
        {"query": "q", "pos": ["p"], "neg": None},
        EmbeddingRow(PlainText("", "q"), plain("p"), dataset="x"),
    ),
    "sentence-transformers triplet": (
        {"anchor": "who", "positive": "she", "negative": "rain"},
        EmbeddingRow(PlainText("", "who"), plain("she"), plain("rain"), dataset="x"),
    ),
    "sentence-transformers tuple": (
        {"anchor": "who", "positive": "she", "negative_10": "c", "negative_1": "a", "negative_2": "b"},
        EmbeddingRow(PlainText("", "who"), plain("she"), plain("a", "b", "c"), dataset="x"),
    ),
    "sentence-transformers, a query and an instruction": (
        {"query": "who", "positive": "she", "negatives": "rain", "instruction": "Find her."},
        EmbeddingRow(InstructedText("Find her.", "who"), plain("she"), plain("rain"), dataset="x"),
    ),
    "sentence-transformers tuple with lists": (
        {"anchor": "who", "positive": ["she", "her"], "negative": ["rain", "sun", "wind"]},
        EmbeddingRow(PlainText("", "who"), plain("she", "her"), plain("rain", "sun", "wind"), dataset="x"),
    ),
    "sentence-transformers tuple with fewer negatives": (
        {"anchor": "who", "positive": "she", "negative_1": None, "negative_2": "rain", "negative_3": "sun"},
        EmbeddingRow(PlainText("", "who"), plain("she"), plain("rain", "sun"), dataset="x"),
    ),
    "sentence-transformers pair": (
        {"sentence1": "a", "sentence2": "b"},
        EmbeddingRow(PlainText("", "a"), plain("b"), dataset="x"),
    ),
    "tevatron": (
        {
            "query_id": "1",
            "query": "who wrote it",
            "positive_passages": [{"docid": "7", "title": "Book", "text": "she wrote it"}],
            "negative_passages": [{"docid": "8", "title": "", "text": "rain"}],
        },
        EmbeddingRow(PlainText("", "who wrote it"), plain("Book she wrote it"), plain("rain"), dataset="x"),
    ),
    "tevatron of another version": (
        {"query_text": "who", "positive_passages": [{"text": "she"}], "negative_passages": None, "answers": ["she"]},
        EmbeddingRow(PlainText("", "who"), plain("she"), dataset="x"),
    ),
    "FlagEmbedding with columns that hold nothing": (
        {**FLAG, "score": None, "teacher_scores": None, "label_id": 7},
        EmbeddingRow(PlainText("", "a dog runs"), plain(*FLAG["pos"]), plain(*FLAG["neg"]), dataset="x"),
    ),
    "GRIT, all in lists, with its entity and data set": (
        {"query": ["Find", "q"], "pos": [["", "p"], ["Say", "r"]], "neg": [], "key": "k", "dataset": "d"},
        EmbeddingRow(
            InstructedText("Find", "q"), (InstructedText("", "p"), InstructedText("Say", "r")), (), key="k", dataset="d"
        ),
    ),
}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
SHARED: dict[str, Any] = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
ALPACA = {"instruction": "hi", "output": "hello"}
CHATS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "messages with a system text by another name": ({**TALK, "system_prompt": "be brief"}, ("be brief\n\nhi", "hello")),
    "ShareGPT that is wanted, with a weight of 1": ({**SHARED, "kto_tag": True, "weight": 1.0}, ("hi", "hello")),
    "Alpaca with columns that hold nothing": (
        {**ALPACA, "label": None, "kto_tag": None, "weight": None, "pos": None, "system": "", "system_prompt": None},
        ("hi", "hello"),
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        ("hi", "hello"),
    ),
    "messages with a system text": (
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": "hello"},
            ]
        },
        ("be brief\n\nhi", "hello"),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "id": "3"},
        ("hi", "hello"),
    ),
    "Alpaca": ({"instruction": "say it", "input": "hi", "output": "hello"}, ("say it\n\nhi", "hello")),
    "Alpaca without input": ({"instruction": "say hi", "input": "", "output": "hello"}, ("say hi", "hello")),
    "ShareGPT with other names and a system text": (
        {
            "system": "be brief",
            "conversations": [{"from": "user", "value": "hi"}, {"from": "model", "value": "hello"}],
        },
        ("be brief\n\nhi", "hello"),
    ),
    "Alpaca with earlier turns and a system text": (
        {
            "system": " be brief ",
            "history": [["who", "she"], ["where", "here"]],
            "instruction": "say hi",
            "output": "hello",
        },
        ("be brief\n\nwho", "she", "where", "here", "say hi", "hello"),
    ),
    "messages of a developer, in parts": (
        {
            "messages": [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": "hello", "tool_calls": []},
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": "bye"},
            ]
        },
        ("be brief\n\nhi", "hello", "and?", "bye"),
    ),
    "prompt and response": ({"prompt": "hi", "response": "hello", "system": ""}, ("hi", "hello")),
    "prompt and completion": ({"prompt": "hi", "completion": "hello"}, ("hi", "hello")),
    "prompt and completion as messages": (
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "hello"}]},
        ("hi", "hello"),
    ),
}


@pytest.mark.parametrize("name", EMBEDDING_FORMS)
def test_a_row_to_embed_is_read_as_its_tool_means_it(tmp_path: Path, name: str) -> None:
    columns, expected = EMBEDDING_FORMS[name]
    found = row(tmp_path, columns)
    assert found == expected
    assert row(tmp_path, to_object(found)) == expected  # as this project writes it


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_read_as_its_tool_means_it(tmp_path: Path, name: str) -> None:
    columns, turns = CHATS[name]
    found = row(tmp_path, columns)
    assert found == GenerativeRow(turns, None, "x") and row(tmp_path, to_object(found)) == found


@pytest.mark.parametrize("name", CHATS)
def test_any_chat_may_follow_documents(tmp_path: Path, name: str) -> None:
    columns, turns = CHATS[name]
    columns = {**columns, "documents": ["one", "two"]}
    if len(turns) == 1:
        with pytest.raises(DataError, match="documents: expected a conversation that follows them, got a text without"):
            row(tmp_path, columns)
        return
    found = row(tmp_path, columns)
    assert found == GenerativeRow(turns, None, "x", documents=("one", "two"))
    assert row(tmp_path, {**columns, "documents": []}) == GenerativeRow(turns, None, "x") != found
    assert row(tmp_path, to_object(found)) == found


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("one", "documents: expected a list of texts, got a string"),
        (["one", 2], r"documents\[1\]: expected a string, got a number"),
        (["one", " "], r"documents\[1\]: expected a text, got an empty one"),
        ([{"text": "one"}], r"documents\[0\]: expected a string, got an object"),
    ],
)
def test_documents_are_texts(tmp_path: Path, documents: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        row(tmp_path, {"text": ["a", "b"], "documents": documents})
    with pytest.raises(DataError, match="unknown column 'document': did you mean 'documents'"):
        row(tmp_path, {"text": ["a", "b"], "document": documents})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two instructions": ({**FLAG, "query": ["one", "text"], "prompt": "two"}, "expected one instruction"),
    "an unknown type": ({**FLAG, "type": "hard"}, "type: expected one of 'normal'"),
    "scores of another length": (
        {**FLAG, "pos_scores": [1], "neg_scores": [0]},
        "pos_scores: expected 2 finite numbers",
    ),
    "a score that is no number": ({**FLAG, "pos_scores": [1, "2"], "neg_scores": [0]}, "pos_scores: expected 2 finite"),
    "scores of one side": ({**FLAG, "pos_scores": [1, 2]}, "expected both or none"),
    "a column of another form": (
        {**FLAG, "negative": "x"},
        "column 'negative' has no meaning in this row's format 'grit'",
    ),
    "a score beside passages": ({**FLAG, "score": 0.5}, "column 'score' has no meaning"),
    "an instruction of the passages": (
        {**FLAG, "passage_instruction": "x"},
        "column 'passage_instruction' has no meaning",
    ),
    "a prompt by another name": ({**FLAG, "query_prompt": "x"}, "column 'query_prompt' has no meaning"),
    "scores by another name": ({**FLAG, "teacher_scores": [1, 2]}, "column 'teacher_scores' has no meaning"),
    "labels of passages": ({**FLAG, "labels": [1, 0]}, "column 'labels' has no meaning"),
    "a weight": ({**FLAG, "weight": 0.1}, "column 'weight' has no meaning"),
    "passages of a text": ({"text": "a", "pos": ["b"]}, "column 'pos' has no meaning in this row's format 'text'"),
    "messages to embed": (
        {**TALK, "positive_messages": [TALK["messages"]]},
        "column 'positive_messages' has no meaning in this row's format 'messages'",
    ),
    "messages that are not wanted": ({**TALK, "label": False}, "label: false: a reply that is not wanted"),
    "ShareGPT that is not wanted": ({**SHARED, "kto_tag": False}, "kto_tag: false: a reply that is not wanted"),
    "Alpaca that is not wanted": ({**ALPACA, "kto_tag": False}, "kto_tag: false: a reply that is not wanted"),
    "a label that is no flag": ({**ALPACA, "label": 2}, "label: expected true or false, got a number"),
    "two flags": ({**TALK, "label": True, "kto_tag": True}, "expected one of the columns label, kto_tag"),
    "a conversation with a weight": ({**TALK, "weight": 0.5}, "weight: a row that is weighted or not trained on"),
    "a conversation to be left out": ({**SHARED, "train": False}, "train: a row that is weighted or not trained on"),
    "two system texts": (
        {**TALK, "system": "a", "system_prompt": "b"},
        "expected one of the columns system, system_prompt",
    ),
    "a batch's setting as a column": (
        {**FLAG, "no_in_batch_neg": True},
        "no_in_batch_neg: expected it in the name of the file",
    ),
    "a misspelt column": ({**FLAG, "pos_score": [1, 2]}, "unknown column 'pos_score': did you mean 'pos_scores'?"),
    "a misspelt query": ({"qeury": "q", "pos": ["p"]}, "did you mean 'query' by 'qeury'?"),
    "a pair with a score": ({"sentence1": "a", "sentence2": "b", "score": 0.2}, "--positive-score"),
    "a passage without text": ({"query": "q", "positive_passages": [{"title": "t"}]}, "expected an object with 'text'"),
    "a turn of a tool": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
        "tool calls are not supported",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]},
        "expected parts of type 'text'",
    ),
    "messages that call a tool": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{}]}]},
        "messages[1]: tool calls are not supported",
    ),
    "a prompt of messages beside a text": (
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
        "completion: expected a list of messages, got null",
    ),
    "a prompt without a reply": ({"prompt": "a"}, "expected 'query', 'pos', 'neg', or 'text'"),
    "a prompt without a reply whose name is misspelt": ({"prompt": "a", "respones": "b"}, "did you mean 'response'"),
    "a message that is none": ({"messages": ["a"]}, "messages[0]: expected an object, got a string"),
    "earlier turns of three": (
        {"instruction": "a", "output": "b", "history": [["a", "b", "c"]]},
        "history: expected pairs [user, assistant]",
    ),
    "a query and a text": ({"query": "a", "text": "b"}, "got both 'query' and 'text'"),
    "passages without a list": ({"query": "q", "pos": "p"}, "pos: expected a list of passages, got a string"),
    "no positive": ({"query": "q", "pos": []}, "pos: expected at least one passage, got an empty list"),
    "a passage of three parts": (
        {"query": "q", "pos": [["a", "b", "c"]]},
        "pos[0]: expected a text or [instruction, text], got a list of 3",
    ),
    "a score of true": ({"sentence1": "a", "sentence2": "b", "score": True}, "score: expected a number"),
    "scores of true": ({**FLAG, "pos_scores": [1, True], "neg_scores": [0]}, "pos_scores: expected 2 finite"),
    "a turn too few": ({"text": ["a", "b", "c"]}, "text: expected an even number [user, assistant, ...], got 3 turns"),
    "two users": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        "expected a turn of the assistant, got one of 'user'",
    ),
    "no reply": ({"conversations": [{"from": "human", "value": "a"}]}, "expected an even number"),
    "an empty reply": ({"instruction": "a", "output": " "}, "expected a text, got an empty one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused(tmp_path: Path, name: str) -> None:
    columns, message = REFUSED[name]
    with pytest.raises(DataError) as caught:
        row(tmp_path, columns)
    assert str(caught.value).startswith(f"{tmp_path / 'x.jsonl'}:1: ") and message in str(caught.value)


def test_pairs_with_a_score_need_a_threshold(tmp_path: Path) -> None:
    pair = {"sentence1": "a", "sentence2": "b", "score": 4.2}
    assert row(tmp_path, pair, positive_score=4.0) == EmbeddingRow(PlainText("", "a"), plain("b"), dataset="x")
    with pytest.raises(DataError, match=r"score 4.2 is below 4.5: not a positive"):
        row(tmp_path, pair, positive_score=4.5)


def test_an_unknown_column_is_named_once_per_file(tmp_path: Path) -> None:
    index = index_file(write(tmp_path / "x.jsonl", *[{**FLAG, "lang": "en", "source": "web"}] * 3))
    assert index.report.notes == [f"{tmp_path / 'x.jsonl'}: column 'lang' is ignored"]


def test_a_prompt_beside_messages_is_named_where_it_says_something_else(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    for prompt, notes in (("hi", []), ("Be brief", [f"{tmp_path / 'x.jsonl'}: column 'prompt' is ignored"])):
        assert index_file(write(tmp_path / "x.jsonl", {**talk, "prompt": prompt})).report.notes == notes


def test_a_list_of_two_strings_is_settled_by_the_file_and_said(tmp_path: Path) -> None:
    two = {"query": "q", "pos": ["p", "r"]}
    for rows, passages, note in (
        ([two, {"query": "q", "pos": ["s", "t"]}], 2, "read as two passages"),  # nothing tells: passages, and said
        ([two], 2, "read as two passages"),
        ([two, {"query": "q", "pos": ["a", "b", "c"]}], 2, None),  # other lengths: passages
        (
            [{"query": "q", "pos": ["find", "r"]}, {"query": "q", "pos": ["find", "s"]}],
            1,
            "passage with that instruction",
        ),
        ([{"query": "q", "pos": ["", "r"]}], 1, "passage with that instruction"),
        ([{"query": "q", "pos": [["", "r"]]}], 1, None),
    ):
        file = write(tmp_path / "x.jsonl", *rows)
        (first, *_), _ = read_rows(file)
        assert len(first.pos) == passages
        notes = index_file(file).report.notes
        assert bool(notes) == (note is not None) and (note is None or note in notes[0])
    instructed = read_rows(write(tmp_path / "x.jsonl", {"query": "q", "pos": ["", "r"], "neg": ["", "n"]}))[0][0]
    assert instructed.pos == (InstructedText("", "r"),) and not isinstance(instructed.pos[0], PlainText)


def test_rows_that_were_written_are_never_taken_for_an_instruction_and_a_text(tmp_path: Path) -> None:
    rows = [EmbeddingRow(PlainText("", f"q {n}"), plain("yes", f"p {n}"), plain("yes", f"n {n}")) for n in range(3)]
    file = write(tmp_path / "x.jsonl", *map(to_object, rows))
    assert [found.pos for found in read_rows(file)[0]] == [row.pos for row in rows]
    assert index_file(file).report.notes == []


def test_containers_hold_the_same_rows_as_lines_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    rows = [{**FLAG, "query": f"naïve question {n}"} for n in range(5)]
    folder = tmp_path / "in"
    folder.mkdir()
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (folder / "c.json").write_text(lines, encoding="utf-8")
    (folder / "d.jsonl").write_text(lines, encoding="utf-16")
    (folder / "e.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    with gzip.open(folder / "f.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (folder / "g.json").write_text(json.dumps(rows), encoding="utf-16")
    expected = [r["query"] for r in rows]
    for path in data_files(folder):
        assert [r.query.text for r in read_rows(path)[0]] == expected, path
        index = index_file(path)
        assert len(index.facts) == 5 and index.facts["line"].tolist() == [1, 2, 3, 4, 5]
    assert [origin for origin, _ in read_objects(folder / "b.json")][1] == f"{folder / 'b.json'}:2"
    with pytest.raises(DataError, match="h.json: not a valid JSON array"):
        index_file(write(tmp_path / "h.json", '[{"query": 1'))
    for content, kind in ((b"\xff\xfea", "UTF-16"), (b'[{"query": "\xff"}]', "UTF-8")):
        (tmp_path / "i.json").write_bytes(content)
        with pytest.raises(DataError, match=f"i.json: not {kind} "):
            index_file(tmp_path / "i.json")


def test_a_broken_line_of_a_compressed_file_is_left_out_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(json.dumps(FLAG) + "\n{\n" + json.dumps(FLAG) + "\n")
    report = index_file(tmp_path / "x.jsonl.gz").report
    assert report.used == {"x": 2} and report.examples["broken"][0].startswith(f"{tmp_path / 'x.jsonl.gz'}:2: ")


def test_parquet_and_remote_paths_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://rows/x.jsonl", "w") as file:
        file.write(json.dumps(FLAG) + "\n")
    assert data_files("memory://rows") == ["memory:///rows/x.jsonl"]
    assert read_rows("memory://rows/x.jsonl")[0][0].dataset == "x"
    with pytest.raises(FileNotFoundError):
        data_files("memory://nothing")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist([FLAG, FLAG]), tmp_path / "y.parquet")
    rows = read_rows(tmp_path / "y.parquet")[0]
    assert len(rows) == 2 and rows[0].neg == plain("a cat sleeps")


def test_a_gzipped_file_that_ends_early_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    whole = gzip.compress((json.dumps(FLAG) + "\n").encode() * 50)
    for content in (whole[:-20], b"no gzip", whole[:30] + b"\xff" * 30 + whole[60:]):
        file = tmp_path / "x.jsonl.gz"
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"^.*x\.jsonl\.gz: cannot be read as gzip \("):
            index_file(file)


def test_strings_that_parquet_holds_as_bytes_are_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"query": "où?".encode(), "pos": ["là".encode()], "image": b"\xff\xd8"}, {"query": b"\xff", "pos": [b"a"]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "y.parquet")
    found, report = index_file(tmp_path / "y.parquet"), index_file(tmp_path / "y.parquet").report
    assert len(found.facts) == 1 and open_file(tmp_path / "y.parquet")[0][0][0].query == PlainText("", "où?")
    assert open_file(tmp_path / "y.parquet")[0][0][0].pos == (PlainText("", "là"),)
    assert report.examples["broken"] == [f"{tmp_path / 'y.parquet'}:2: query: expected a string, got null"]


def test_what_is_not_read_in_a_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    file = write(folder / "a.jsonl", FLAG)
    for name in ("b.csv", "c.jsonl.zst", ".hidden", "README.md"):
        (folder / name).write_text("")
    (note,) = unread_note(folder)
    assert note.startswith(f"{folder}: not read: b.csv, c.jsonl.zst, more/; only *.jsonl, ")
    report = DataReport()
    list(tolerant_rows(folder, report))
    assert note in report.notes
    for n in range(4):
        (folder / f"d{n}.txt").write_text("")
    assert "more/" not in unread_note(folder)[0] and "d2.txt and 2 more; only" in unread_note(folder)[0]
    assert unread_note(file) == unread_note("memory://rows") == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"anchor": "a", "query": "b", "positive": "c"}, "anchor, query, got anchor and query"),
        ({"query": "a", "query_text": "b", "positive_passages": [{"text": "c"}]}, "got query and query_text"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "got completion and response"),
        ({"sentence1": "a", "sentence2": "b", "score": 1, "label": 0}, "got score and label"),
    ],
)
def test_two_columns_for_one_thing_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"expected one of the columns .*{message}"):
        row(tmp_path, columns)
    second = message.split()[-1]
    assert second in columns
    if "score" not in columns:  # pairs with a score want a threshold
        row(tmp_path, {**columns, second: None})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "say hi", "completion": "get lost", "label": False}, "label: false: a reply that is not wanted"),
        ({"prompt": "say hi", "completion": "hello", "label": 0.5}, "label: expected true or false, got a number"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            r"messages\[1\]: a message that is weighted or not trained on",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": False}]},
            r"conversations\[1\]: a message that is weighted or not trained on",
        ),
    ],
)
def test_a_reply_that_a_tool_would_not_train_on_is_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        row(tmp_path, columns)


def test_a_wanted_reply_is_read_and_other_entries_of_its_messages_are_named(tmp_path: Path) -> None:
    wanted = {"prompt": "say hi", "completion": "hello", "label": True}
    assert row(tmp_path, wanted) == GenerativeRow(("say hi", "hello"), None, "x", f"{tmp_path / 'x.jsonl'}:1")
    turns = [
        {"role": "user", "content": "a", "weight": 0},  # of a question it says what is true anyway
        {"role": "assistant", "content": "b", "weight": 1, "reasoning_content": "hm", "name": "x", "id": 4},
    ]
    file = write(tmp_path / "y.jsonl", {"messages": turns})
    reader = file_reader(file)
    assert reader.row({"messages": turns}, "y:1") == GenerativeRow(("a", "b"), None, "y", "y:1")
    assert list(reader.notes) == ["messages: 'reasoning_content' of a message is ignored"]
