"""Data sets on the disk: rows found by offset are those of the file, and what cannot be used is counted, named and left out."""

from __future__ import annotations

import json
import pickle
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from python_model.data import datasets, sample_dir
from python_model.data.datasets import DataReport, open_file
from python_model.data.jsonl import DataError, EmbeddingRow, GenerativeRow, PlainText, read_embedding, read_generative
from tests.python_model.data.test_data import BROKEN, EMBEDDING, GENERATIVE, write


def test_rows_are_those_of_the_file_in_any_order() -> None:
    for name, read in (("embedding", read_embedding), ("generative", read_generative)):
        file = sample_dir() / "train" / f"{name}.jsonl"
        found, report = open_file(file)
        expected = read(file)
        assert sum(map(len, found)) == len(expected) == sum(report.used.values()) and not report.left_out
        by_origin = {row.origin: row for row in expected}
        for rows in found:
            order = list(range(len(rows)))
            random.Random(0).shuffle(order)
            for index in order[:40]:
                assert rows[index] == by_origin[rows[index].origin] and rows[index].dataset == rows.name


def test_unicode_empty_lines_byte_order_mark_and_no_last_newline(tmp_path: Path) -> None:
    line = json.dumps({"text": ["naïve\u2028line", "日本語 😀"]}, ensure_ascii=False).encode()
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    (rows,), _ = open_file(file)
    assert [row.turns for row in rows] == [("naïve\u2028line", "日本語 😀")] * 2
    assert [row.origin for row in rows] == [f"{file}:1", f"{file}:4"]
    assert rows[0:2] == [rows[0], rows[1]] and rows[-1] == rows[1]
    with pytest.raises(IndexError):
        rows[2]


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "text a string"])
def test_a_broken_row_is_left_out_with_its_file_and_line(tmp_path: Path, name: str) -> None:
    row, message = BROKEN[name]
    good = GENERATIVE if isinstance(row, dict) and "text" in row and "query" not in row else EMBEDDING
    file = write(tmp_path / "data.jsonl", good, b"", row, good)
    (rows,), report = open_file(file)
    assert len(rows) == 2 and rows[1].origin == f"{file}:4"
    reason = "empty" if "got an empty text" in message else "broken"
    assert report.left_out == {reason: 1} and report.used == {"data": 2}
    (what,) = report.examples[reason]
    assert what.startswith(f"{file}:3: ") and message in what


def test_a_broken_first_row_does_not_decide_the_kind(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", "{", GENERATIVE, EMBEDDING, GENERATIVE)
    (rows,), report = open_file(file)
    assert rows.generative and len(rows) == 2
    assert report.left_out == {"broken": 1, "another kind": 1}


def test_bare_strings_are_rows_too(tmp_path: Path) -> None:
    (texts,), _ = open_file(write(tmp_path / "g.jsonl", {"text": "a plain text"}))
    (queries,), _ = open_file(write(tmp_path / "e.jsonl", {"query": "q", "pos": ["p"], "neg": [["", "n"]]}))
    assert texts[0] == GenerativeRow(("a plain text",), None, "g")
    row = queries[0]
    assert [isinstance(text, PlainText) for text in (row.query, *row.pos, *row.neg)] == [True, True, False]


def test_the_column_dataset_splits_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", {**EMBEDDING, "dataset": "b"}, EMBEDDING, {**EMBEDDING, "dataset": "b"})
    found, report = open_file(file)
    assert {rows.name: [row.origin for row in rows] for rows in found} == {
        "b": [f"{file}:1", f"{file}:3"],
        "data": [f"{file}:2"],
    }
    assert report.used == {"b": 2, "data": 1}


def test_a_report_counts_all_and_shows_the_first(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", EMBEDDING, *["{"] * 8)
    report = open_file(file)[1]
    total = DataReport()
    total.add(report)
    total.add(open_file(write(tmp_path / "more.jsonl", EMBEDDING, "{"))[1])
    assert total.left_out == {"broken": 9} and total.used == {"data": 1, "more": 1}
    lines = total.lines()
    assert lines[0] == "data: 2 rows (data 1, more 1)" and lines[1] == "left out, broken: 9 row(s)"
    assert lines[2].startswith(f"  {file}:2: not valid JSON") and lines[-1] == "  and 4 more" and len(lines) == 8


def test_a_check_leaves_rows_out_and_an_unwanted_kind_is_not_read(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", *({"text": ["question", f"reply {n}"]} for n in range(10)))
    check: Any = lambda row: ("odd", row.turns[1]) if int(row.turns[1][-1]) % 2 else None  # noqa: E731
    (rows,), report = open_file(file, check)
    assert [row.turns[1] for row in rows] == [f"reply {n}" for n in range(0, 10, 2)]
    assert report.examples["odd"][0] == f"{file}:2: reply 1"
    assert open_file(file, check, wanted=lambda generative: not generative) == ([], DataReport())


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty.jsonl: no rows"):
        open_file(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        open_file(tmp_path / "missing.jsonl")
    assert open_file(write(tmp_path / "bad.jsonl", "{"))[0] == []


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", GENERATIVE, GENERATIVE)
    (rows,), _ = open_file(file)
    write(file, {"text": ["longer than before", "a"]}, GENERATIVE)
    for _ in range(2):
        with pytest.raises(DataError, match="data.jsonl: the file has changed since it was indexed"):
            rows[0]


def test_a_random_choice_keeps_the_order_and_depends_on_the_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", *({"text": ["q", str(n)]} for n in range(100)))
    (rows,), _ = open_file(file)
    chosen = [int(row.turns[1]) for row in rows.choice(20, seed=0)]
    assert len(set(chosen)) == 20 and chosen == sorted(chosen) and chosen != list(range(20))
    assert [int(row.turns[1]) for row in rows.choice(20, seed=1)] != chosen
    assert rows.choice(100, seed=0) is rows


def test_an_index_is_kept_until_the_file_or_the_check_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "CACHED_BYTES", 0)
    file = write(tmp_path / "data.jsonl", GENERATIVE, "{", {**GENERATIVE, "dataset": "b"})
    seen = []

    def check(row: Any) -> None:
        seen.append(row.origin)

    first, report = open_file(file, check, check_key="a")
    assert len(seen) == 2
    again, same = open_file(file, check, check_key="a")
    assert len(seen) == 2 and same == report and report.left_out == {"broken": 1}
    assert [[row for row in rows] for rows in again] == [[row for row in rows] for rows in first]
    assert [rows.name for rows in again] == ["data", "b"]
    open_file(file, check, check_key="b")
    assert len(seen) == 4
    write(file, GENERATIVE, "{", GENERATIVE, GENERATIVE)
    assert len(open_file(file, check, check_key="a")[0][0]) == 3 and len(seen) == 7
    assert not [path for path in (tmp_path / "cache" / "index").iterdir() if path.name.startswith(".")]


def test_a_data_set_travels_to_other_processes_without_its_file(tmp_path: Path) -> None:
    (rows,), _ = open_file(write(tmp_path / "data.jsonl", EMBEDDING))
    expected: EmbeddingRow = rows[0]
    assert pickle.loads(pickle.dumps(rows))[0] == expected


def test_a_hundred_thousand_rows_are_indexed_quickly_in_flat_memory(tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    row = (
        json.dumps({"query": ["find", "a question"], "pos": [["", "word " * 60]], "neg": [["", "other " * 60]]}) + "\n"
    )
    with file.open("w") as out:
        for _ in range(100):
            out.write(row * 1000)
    tracemalloc.start()
    start = time.process_time()
    try:
        (rows,), _ = open_file(file)
        seconds = time.process_time() - start
        assert len(rows) == 100_000 and rows[99_999].origin == f"{file}:100000"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 20  # 1 s without the tracing of memory
    assert file.stat().st_size > 70e6 and peak < 10e6  # 24 bytes a row and one row's text
