"""The folder benchmark kills, resumes and synchronises a real run, and notices what is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import folder


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("folder") / "notes"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.txt").write_text(
            "\n".join(f"Line {line} of note {number}." for line in range(12 + number))
        )
    (source / "image.bin").write_bytes(b"\x00\xff")
    return source


@pytest.mark.slow  # five processes that each load a model
def test_a_killed_run_is_resumed_changes_are_followed_and_stale_text_is_noticed(
    notes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in notes.iterdir()}
    rows = {row["variant"]: row for row in folder.trial(notes, str(checkpoint), tmp_path / "work", "cpu")}
    assert list(rows) == ["killed", "resumed", "unchanged", "synced"] and {row["files"] for row in rows.values()} == {9}
    done = rows["resumed"]["files_added"] + rows["resumed"]["unchanged"] + rows["resumed"]["changed"]
    assert done == 8 and rows["resumed"]["skipped"] == 1
    assert rows["unchanged"]["unchanged"] == 8 and rows["unchanged"]["files_added"] == 0
    assert (rows["synced"]["changed"], rows["synced"]["removed"], rows["synced"]["unchanged"]) == (1, 1, 6)
    assert 0 < rows["synced"]["chunks"] < rows["resumed"]["chunks"] and rows["resumed"]["store_mib"] > 0
    assert {file.name: file.read_bytes() for file in notes.iterdir()} == before  # only the copy is changed
    files, index, store = (tmp_path / "work" / name for name in ("files", "index", "store"))
    (files / "3.txt").unlink()
    with pytest.raises(ValueError, match="index: expected nothing stale, got chunks .*3.txt"):
        folder.check(files, index, store)


def test_a_folder_with_too_few_files_and_a_run_that_fails_are_errors(tmp_path: Path, notes: Path) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="folder: expected at least 3 files, got 1"):
        folder.trial(tmp_path / "few", "x", tmp_path / "w", "cpu")
    with pytest.raises(RuntimeError, match="grit index ended with 1: .*nowhere"):
        folder.trial(notes, str(tmp_path / "nowhere"), tmp_path / "w2", "cpu")
