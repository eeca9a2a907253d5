"""``grit convert`` shows what training reads in a file, writes it, and says what it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from python_model.commands.convert import COMMAND as main
from python_model.data.reading import read_embedding
from tests.python_model.data.test_data import write


def test_a_file_of_another_tool_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"anchor": f"q {n}", "positive": "p " * 80, "negative": "n", "lang": "en"} for n in range(5)]
    file = write(tmp_path / "x.jsonl", *rows[:3], "{", {"anchor": "q", "positiv": "p"}, *rows[3:])
    main([str(file), str(tmp_path / "out.jsonl"), "--show", "2"])
    printed = capsys.readouterr().out
    assert f"{file}:1\n  query    q 0\n  pos      p p" in printed and f"{file}:3" not in printed
    assert all(len(line) <= 80 for line in printed.split("\n") if line.startswith("  query"))
    assert "data: 5 rows (x 5)" in printed and "left out, broken: 2 row(s)" in printed
    assert f"note: {file}: rows read: 5 as sentence-transformers" in printed and "column 'lang' is ignored" in printed
    assert [row.query.text for row in read_embedding(tmp_path / "out.jsonl")] == [f"q {n}" for n in range(5)]


def test_an_instruction_stands_before_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write(tmp_path / "x.jsonl", {"query": "a dog", "pos": [["as", "an animal"]], "prompt": "Find"}))])
    assert "  query    [Find] a dog\n  pos      [as] an animal\n" in capsys.readouterr().out


def test_letters_of_any_script_are_written_and_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "x.jsonl", {"query": "wo fließt er?", "pos": ["長江 nach Süden"]})
    main([str(file), str(tmp_path / "out.jsonl")])
    assert "  query    wo fließt er?\n  pos      長江 nach Süden\n" in capsys.readouterr().out
    assert "wo fließt er?" in (written := (tmp_path / "out.jsonl").read_text(encoding="utf-8")) and "長江" in written


def test_scored_pairs_are_refused_until_a_threshold_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "sts.jsonl", *({"sentence1": "a", "sentence2": f"b{n}", "score": n} for n in range(6)))
    with pytest.raises(SystemExit, match="no usable rows"):
        main([str(file), str(tmp_path / "out.jsonl")])
    assert "which are positives?" in capsys.readouterr().out
    main([str(file), str(tmp_path / "out.jsonl"), "--positive-score", "4"])
    assert [json.loads(line)["pos"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [["b4"], ["b5"]]
    assert "left out, no positive: 4 row(s)" in capsys.readouterr().out


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="grit convert: there is no file or folder"):
        main([str(tmp_path / "missing.jsonl")])
