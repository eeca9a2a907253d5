"""Data sets on the disk: rows found by offset are those of the file, and what cannot be used is counted, named and left out."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import tracemalloc
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from python_model.data import datasets, files, index, sample_dir
from python_model.data.datasets import EachPositive, open_file
from python_model.data.index import index_file, index_files
from python_model.data.reading import read_embedding, read_generative
from python_model.data.report import DataReport
from python_model.data.rows import DataError, EmbeddingRow, GenerativeRow, PlainText
from python_model.support.processes import mapped
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
            for place in order[:40]:
                assert rows[place] == by_origin[rows[place].origin] and rows[place].dataset == rows.name


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
    reason = "empty" if "got an empty one" in message else "misspelt" if "did you mean" in message else "broken"
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


class Odd:
    """Refuses every third row by its facts, and of the rest the odd ones by their text."""

    def __init__(self, check_key: str = "") -> None:
        self.check_key, self.asked = check_key, 0

    def refused(self, facts: np.ndarray, generative: bool) -> tuple[np.ndarray, tuple[str, str]]:
        return facts["line"] % 3 == 0, ("third", "a third row")

    def doubtful(self, facts: np.ndarray, generative: bool) -> np.ndarray:
        return facts["line"] % 2 == 0

    def problem(self, row: Any) -> tuple[str, str] | None:
        self.asked += 1
        return ("odd", row.turns[1]) if int(row.turns[1].split()[1]) % 4 == 1 else None


def test_a_check_leaves_rows_out(tmp_path: Path) -> None:
    rows_of_b = [{"text": ["question", f"reply {n}"], "dataset": "b" if n > 30 else "a"} for n in range(60)]
    file = write(tmp_path / "data.jsonl", *rows_of_b)
    found, report = open_file(file, Odd())
    kept = [n for n in range(60) if (n + 1) % 3 and not ((n + 1) % 2 == 0 and n % 4 == 1)]
    assert [int(row.turns[1].split()[1]) for rows in found for row in rows] == kept
    assert [row.turns[1] for row in found[1][-3:]] == [f"reply {n}" for n in kept[-3:]] and found[1][
        -1
    ].origin == f"{file}:59"
    assert report.examples["third"][0] == f"{file}:3: a third row" and report.left_out["third"] == 20
    assert report.examples["odd"][0] == f"{file}:2: reply 1"
    assert report.used == {"a": sum(n <= 30 for n in kept), "b": sum(n > 30 for n in kept)}


class Asked(Odd):
    """Every row but the thirds is doubtful, and its problem is the process that was asked."""

    def doubtful(self, facts: np.ndarray, generative: bool) -> np.ndarray:
        return np.ones(len(facts), dtype=bool)

    def problem(self, row: Any) -> tuple[str, str]:
        return "asked", str(os.getpid())


def test_processes_share_the_rows_that_have_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "data.jsonl", *({**GENERATIVE, "dataset": f"d{n % 2}"} for n in range(20)))
    alone, mine = open_file(file, Asked())
    assert not alone and mine.examples["asked"][0] == f"{file}:1: {os.getpid()}"
    monkeypatch.setattr(datasets, "CHECKED", 3)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    _, shared = open_file(file, Asked())
    assert shared.left_out == mine.left_out

    def lines_and_processes(report: DataReport) -> tuple[list[str], set[str]]:
        found = [example.removeprefix(f"{file}:").split(": ") for example in report.examples["asked"]]
        return [line for line, _ in found], {process for _, process in found}

    lines, processes = lines_and_processes(shared)
    assert lines == lines_and_processes(mine)[0] and str(os.getpid()) not in processes


def test_what_was_found_out_about_rows_is_kept_for_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "CACHED_BYTES", 0)
    file = write(tmp_path / "data.jsonl", *({"text": ["question", f"reply {n}"]} for n in range(20)))
    checks = [Odd("a"), Odd("a"), Odd("b")]
    results = [open_file(file, check) for check in checks]
    assert [check.asked for check in checks] == [checks[0].asked, 0, checks[0].asked] and checks[0].asked > 0
    first, *others = [([row for rows in found for row in rows], report) for found, report in results]
    assert all(other == first for other in others) and first[1].left_out["odd"] > 0


def test_an_empty_file_is_a_note_and_a_missing_one_an_error(tmp_path: Path) -> None:
    for content in ("", "  "):
        found, report = open_file(write(tmp_path / "empty.jsonl", content))
        assert found == [] and report.notes == [f"{tmp_path / 'empty.jsonl'}: no rows, the file is empty"]
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        open_file(tmp_path / "missing.jsonl")
    assert open_file(write(tmp_path / "bad.jsonl", "{"))[0] == []


def test_parts_read_by_several_processes_give_the_index_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [
        {**EMBEDDING, "query": f"question {n} " + "x" * (n % 7), "dataset": f"d{n % 3}"} for n in range(60)
    ]
    rows[7], rows[33], rows[41] = "{", GENERATIVE, {**EMBEDDING, "what": 1}
    file = write(tmp_path / "data.jsonl", *rows)
    whole = index_file(file)
    assert whole.report.left_out == {"broken": 1, "another kind": 1}
    assert whole.report.examples["broken"][0].startswith(f"{file}:8: ") and len(whole.facts) == 58
    assert whole.report.notes == [f"{file}: column 'what' is ignored"]
    for size, processes in ((50, 1), (333, 1), (4096, 1), (1000, 2)):
        monkeypatch.setattr(index, "PART_BYTES", size)
        monkeypatch.setattr("os.cpu_count", lambda processes=processes: processes)
        parts = index_file(file)
        assert (parts.facts == whole.facts).all() and parts.names == whole.names
        assert (parts.report, parts.kind) == (whole.report, whole.kind)


def test_files_share_the_processes_and_keep_their_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small each is: what counts is their size together."""
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    rows = [{**EMBEDDING, "query": f"question {n}", "dataset": f"d{n % 2}"} for n in range(12)]
    paths = [write(tmp_path / f"{n}.jsonl", *rows[n : n + 2], "{") for n in range(6)]
    alone = [index_file(file) for file in paths]
    assert not any(each.kept for each in alone)
    size = sum(file.stat().st_size for file in paths)
    monkeypatch.setattr(index, "CACHED_BYTES", size)
    monkeypatch.setattr(index, "PART_BYTES", size // 4)
    monkeypatch.setattr(index, "LOCKED", 4)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    limits = []
    monkeypatch.setattr(index, "mapped", lambda limit: limits.append(limit) or mapped(limit))
    with monkeypatch.context() as here:
        here.setattr(index, "Reader", None)  # whose use in this process would fail: others read the files
        found = index_files(paths)
    again = index_files(paths)
    assert limits == [2, 0]
    for one, many, kept in zip(alone, found, again, strict=True):
        assert many.kept and (many.facts == one.facts).all() and isinstance(kept.facts, np.memmap)
        for each in (many, kept):
            assert (each.report, each.names, each.kind, each.digest) == (one.report, one.names, one.kind, one.digest)


def test_several_processes_convert_files_and_the_caller_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SHARED_BYTES", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    paths = []
    for n in range(3):
        paths.append(tmp_path / f"{n}.jsonl.gz")
        with gzip.open(paths[-1], "wt") as file:
            file.write(json.dumps({**EMBEDDING, "query": f"q{n}"}) + "\n")
    with monkeypatch.context() as here:
        here.setattr(files, "_lines", None)
        found = files.files_as_lines(paths)
    assert [json.loads(path.read_text())["query"] for path in found] == ["q0", "q1", "q2"]
    wrong = [write(tmp_path / name, '[{"query": 1') for name in ("x.json", "y.json")]
    with pytest.raises(DataError, match="x.json: not a valid JSON array"):
        files.files_as_lines([*paths, *wrong])


def test_a_negative_count_and_lengths_in_bytes_are_kept_for_any_settings(tmp_path: Path) -> None:
    file = write(
        tmp_path / "e.jsonl",
        {"query": ["naïve", "q"], "pos": [["", "p"], ["ab", "r"]], "neg": ["n", ["abcd", "m"], "o"]},
        {"query": "q", "pos": ["p"]},
        {"query": ["naïve", "q"], "pos": ["p"]},
    )
    facts = index_file(file).facts
    assert facts["first"].tolist() == [6, 0, 6] and facts["passage"].tolist() == [4, 0, 0]
    assert facts["negatives"].tolist() == [3, 0, 0] and facts["positives"].tolist() == [2, 1, 1]
    assert facts["query"][0] == facts["query"][2] != facts["query"][1]
    talks = index_file(write(tmp_path / "g.jsonl", {"text": ["naïve", "b"]}, {"text": "no roles"})).facts
    assert talks["first"].tolist() == [6, 0]


class Thirds(Odd):
    """Refuses every third row."""

    def doubtful(self, facts: np.ndarray, generative: bool) -> np.ndarray:
        return np.zeros(len(facts), dtype=bool)


@pytest.mark.parametrize("block", [1, 2, 256])
def test_each_positive_is_a_row_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Also behind rows that are left out and of a random choice of the rows."""
    monkeypatch.setattr(EachPositive, "BLOCK", block)
    content = [
        {"query": f"q{n}", "pos": [[f"i{n}", f"p{n}.{k}"] for k in range(1 + n % 3)], "neg": ["n"], "pos_scores": None}
        for n in range(1, 8)
    ]
    for row in content[::2]:
        row |= {"pos_scores": [float(k) for k in range(len(row["pos"]))], "neg_scores": [-1.0]}
    ((rows,), _) = open_file(write(tmp_path / "e.jsonl", *content), Thirds())
    for chosen in (rows, rows.choice(2, seed=1)):
        each = EachPositive(chosen)
        expected = [(row.query, pos, scores) for row in chosen for pos, scores in zip_longest(row.pos, row.pos_scores)]
        assert [(row.query, row.pos[0], row.pos_scores[0] if row.pos_scores else None) for row in each] == expected
        assert len(each) == len(expected) and all(len(row.pos) == 1 and row.neg for row in each)
        hashes = [chosen.query_hash(i) for i, row in enumerate(chosen) for _ in row.pos]
        assert [each.query_hash(i) for i in range(len(each))] == hashes
        scored = [bool(row.pos_scores) for row in chosen]
        assert chosen.facts("scored").tolist() == scored and chosen.facts("scored", 1, 2).tolist() == scored[1:2]
    with pytest.raises(IndexError):
        each[len(each)]


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


def test_links_to_one_file_are_data_sets_of_their_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "CACHED_BYTES", 0)
    file = write(tmp_path / "blob", GENERATIVE)
    for name in ("first.jsonl", "second.jsonl"):
        (tmp_path / name).symlink_to(file)
        assert [rows.name for rows in open_file(tmp_path / name)[0]] == [name.partition(".")[0]]
    both = index_files([tmp_path / "first.jsonl", tmp_path / "second.jsonl"])
    assert [each.names for each in both] == [["first"], ["second"]]


def test_an_index_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "CACHED_BYTES", 0)
    built = []
    read = index._read_part
    monkeypatch.setattr(index, "_read_part", lambda task: built.append(1) or read(task))
    file = write(tmp_path / "data.jsonl", GENERATIVE, "{", {**GENERATIVE, "dataset": "b"})
    first, report = open_file(file)
    again, same = open_file(file)
    assert len(built) == 1 and same == report and report.left_out == {"broken": 1}
    assert [[row for row in rows] for rows in again] == [[row for row in rows] for rows in first]
    assert [rows.name for rows in again] == ["data", "b"]
    travelled = pickle.loads(pickle.dumps(again[0]))
    assert isinstance(travelled._index.facts, np.memmap) and travelled[0] == first[0][0]
    assert len(pickle.dumps(again[0])) < 2000  # the index itself stays on the disk
    write(file, GENERATIVE, "{", GENERATIVE, GENERATIVE)
    assert len(open_file(file)[0][0]) == 3 and len(built) == 2
    assert not [path for path in (tmp_path / "cache" / "index").iterdir() if path.name.startswith(".")]


def test_a_digest_tells_files_apart_by_content(tmp_path: Path) -> None:
    one, same = (index_file(write(tmp_path / name, EMBEDDING)) for name in ("a.jsonl", "b.jsonl"))
    other = index_file(write(tmp_path / "c.jsonl", {**EMBEDDING, "query": "x"}))
    assert one.digest == same.digest != other.digest


def test_a_data_set_travels_to_other_processes_without_its_file(tmp_path: Path) -> None:
    (rows,), _ = open_file(write(tmp_path / "data.jsonl", EMBEDDING))
    expected: EmbeddingRow = rows[0]
    assert pickle.loads(pickle.dumps(rows))[0] == expected


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_indexed_in_flat_memory(tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    row = (
        json.dumps({"query": ["find", "a question"], "pos": [["", "word " * 60]], "neg": [["", "other " * 60]]}) + "\n"
    )
    with file.open("w") as out:
        for _ in range(100):
            out.write(row * 1000)
    tracemalloc.start()
    try:
        (rows,), _ = open_file(file)
        assert len(rows) == 100_000 and rows[99_999].origin == f"{file}:100000"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert file.stat().st_size > 70e6 and peak < 40e6  # 36 bytes a row, more while it is built, and one row's text
