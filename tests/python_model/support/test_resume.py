"""What a killed run has written is kept, and the next run goes on behind it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from python_model.support.files import new_file, new_folder, reason_of
from python_model.support.optional import require
from python_model.support.resume import JsonLines, ResumableArray, ResumableRows


def test_a_log_keeps_the_whole_leading_lines_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    log = JsonLines(path)
    log.append({"n": 1}, {"n": 2})
    log.append({"n": 3})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"n": 4')  # the kill came here
    log = JsonLines(path)
    assert [row["n"] for row in log.rows] == [1, 2, 3]
    log.append({"n": 5})
    log.close()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2, 3, 5]
    log = JsonLines(path, lambda row: row["n"] < 3)
    log.append({"n": 9})
    log.close()
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n{"n": 9}\n'


def test_what_grows_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written into a map of the file instead would end the process, by SIGBUS."""
    log, vectors = JsonLines(tmp_path / "log.jsonl"), ResumableArray(tmp_path / "v.npy", 2, "key")
    vectors.append(np.ones((1, 4), np.float32))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name, append in (
        ("log.jsonl", lambda: log.append({"n": 1})),
        ("v.npy", lambda: vectors.append(np.ones((1, 4), np.float32))),
    ):
        with pytest.raises(OSError) as caught:
            append()
        assert reason_of(caught.value, with_path=True) == f"{tmp_path / name}: there is no space left"
    assert vectors.done == 1
    log.close()


def test_rows_of_another_run_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    inputs = [{"q": "a"}, {"q": "b"}, {"q": "c"}]
    with ResumableRows(path, inputs) as rows:
        rows.write([(1, {"reply": "x"})])
    with ResumableRows(path, inputs) as rows:
        assert rows.missing == [0, 2]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: a result for another input \(row 1\)"):
        ResumableRows(path, [{"q": "a"}, {"q": "other"}])
    path.write_text('{"row": 0, "q": "a"}\n[]\n')
    with pytest.raises(ValueError, match="rows.jsonl:2: not a row of an earlier run"):
        ResumableRows(path, inputs)


def test_an_array_is_there_whole_or_not_at_all_and_goes_on(tmp_path: Path) -> None:
    path, values = tmp_path / "v.npy", np.arange(12, dtype=np.float32).reshape(6, 2)
    first = ResumableArray(path, 6, "key")
    first.append(values[:2])
    first.append(values[2:3])
    del first
    assert not path.exists()
    with pytest.raises(ValueError, match="output: .*holds an interrupted run with other texts"):
        ResumableArray(path, 6, "other")
    second = ResumableArray(path, 6, "key")
    assert second.done == 3
    second.append(values[3:])
    assert second.finish() == (6, 2)
    assert (np.load(path) == values).all() and [file.name for file in tmp_path.iterdir()] == ["v.npy"]
    again = ResumableArray(path, 6, "key")  # a finished file is replaced by a new one
    again.append(values + 1)
    again.finish()
    assert (np.load(path) == values + 1).all()


def test_files_and_folders_are_on_the_disk_before_they_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = __import__("os").fsync, __import__("os").replace
    monkeypatch.setattr("os.replace", lambda a, b: events.append(f"replace {Path(b).name}") or replace(a, b))
    sizes: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    with new_file(tmp_path / "f") as file:
        file.write(b"xyz")
        assert not sizes and not events
    assert sizes[0] == 3 and events == ["replace f"], "what is written is buffered until then"
    events.clear()
    monkeypatch.setattr("os.fsync", lambda descriptor: events.append("sync") or sync(descriptor))
    with new_folder(tmp_path / "d") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        (folder / "b").write_text("b")
    assert events[: events.index("replace d")].count("sync") >= 4  # two files, two folders
    assert (tmp_path / "d" / "sub" / "a").read_text() == "a"


def test_a_row_is_on_the_disk_when_it_is_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    log = JsonLines(tmp_path / "log.jsonl")
    log.append({"n": 1})
    log.append({"n": 2})
    log.close()
    assert synced == [len(b'{"n": 1}\n'), 2 * len(b'{"n": 1}\n')]


def test_a_missing_package_names_the_extra() -> None:
    assert require("json.decoder", "train") is json.decoder
    with pytest.raises(ImportError, match=r"no_such_package is missing .*pip install 'grit-kernels\[rag\]'"):
        require("no_such_package.sub", "rag")
