"""A file or folder exists completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from python_model.support.files import cache_folder, new_file, new_folder, reason_of, write_json, write_text


def test_a_folder_appears_whole_with_its_parents_and_replaces_another(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "model"
    for text in ("first", "second"):
        with new_folder(target) as folder:
            (folder / text).mkdir()
            (folder / text / "weights").write_text(text)
            assert not (target / text).exists()
        assert [path.name for path in target.rglob("*")] == [text, "weights"]
    assert list(target.parent.iterdir()) == [target]


def test_a_file_appears_whole_with_its_parents_and_replaces_another(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "text"
    for text in ("first", "zweite Fassung: ü"):
        write_text(target, text)
        assert target.read_text(encoding="utf-8") == text
    write_json(target, {"ü": [1, None]})
    assert json.loads(target.read_text(encoding="utf-8")) == {"ü": [1, None]}
    assert target.read_text(encoding="utf-8").startswith('{\n  "ü"')
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(RuntimeError, match="half"), new_file(file) as opened:
        opened.write(b"new")
        raise RuntimeError("half")
    with pytest.raises(RuntimeError, match="half"), new_folder(folder) as filled:
        (filled / "new").touch()
        raise RuntimeError("half")
    assert file.read_text() == "old" and [path.name for path in folder.iterdir()] == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path, new: Any) -> None:
    """Not before an hour, as locks do not reach other machines everywhere."""
    pytest.importorskip("fcntl")
    write = f"with {new.__name__}({str(tmp_path / 'x')!r}): print(flush=True); time.sleep(100)"
    code = f"import time; from python_model.support.files import new_file, new_folder\n{write}"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        (left,) = tmp_path.iterdir()
        others = [tmp_path / name for name in (".x.0", f".xy.{'0' * 32}", "x." + "0" * 32)]
        for other in others:
            other.touch()
        for path in (left, *others):
            os.utime(path, (0, 0))
        with new(tmp_path / "x"):
            assert left.exists()
        process.kill()
    now = time.time()
    os.utime(left, (now, now))
    with new(tmp_path / "x"):
        assert left.exists()
    os.utime(left, (now - 3601, now - 3601))
    with new(tmp_path / "x"):
        assert not left.exists()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x", *others])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_in_words_with_the_name_that_was_asked_for(tmp_path: Path, number: int) -> None:
    """The system names no file when it refuses to write to an open one; an error about anything else has none, either."""
    for new in (new_file, new_folder):
        with pytest.raises(OSError) as caught, new(tmp_path / "x"):
            raise OSError(number, "No space left on device")
        assert reason_of(caught.value, with_path=True).startswith(f"{tmp_path / 'x'}: there is no space left")
        with pytest.raises(OSError) as caught, new(tmp_path / "x"):
            raise OSError(errno.ECONNRESET, "Connection reset by peer")
        assert caught.value.filename is None
        assert list(tmp_path.iterdir()) == []
    assert reason_of(OSError(number, "No space left on device")).startswith("there is no space left")


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRIT_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "grit_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "shared" / "grit_kernels"
    monkeypatch.setenv("GRIT_KERNELS_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
