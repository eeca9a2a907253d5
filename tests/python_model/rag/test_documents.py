"""Files become chunks that end with sentences and begin at headings, each with its place in its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from python_model.rag import documents
from python_model.rag.documents import chunk
from python_model.rag.formats import UnreadableFileError, read_file
from python_model.rag.modes import Document

LONG = "\n\n".join(f"Paragraph {i}. A river flows through the city." for i in range(12))


def test_chunks_follow_sentences_and_headings_without_tiny_ones(tokenizer: Any) -> None:
    pytest.importorskip("semantic_text_splitter")
    text = (
        "# Rivers\n\nShort.\n\n"
        + "A river flows through the city. " * 30
        + "\n\n# Code\n\n"
        + "Blank lines are common. " * 20
    )
    text += "\n\nThe end."
    pieces = chunk(Document("k", text, "T", "k.md"), tokenizer, 80, overlap=16)
    counts = [len(tokenizer(p.text, add_special_tokens=False)["input_ids"]) for p in pieces]
    assert max(counts) <= 80 and min(counts) >= 20 and "The end." in pieces[-1].text
    last = [piece.text.splitlines()[-1] for piece in pieces]
    assert [line for line in last if not line.endswith(".") and not line.startswith("#")] == []  # no sentence is cut
    assert all(text.splitlines()[int(p.place.split()[1]) - 1].find(p.text.splitlines()[0][:20]) >= 0 for p in pieces)


def test_white_space_is_no_chunk(tokenizer: Any) -> None:
    text = "A river." + " \n\t" * 400 + "The city."
    spans = documents._at_white_space(text, tokenizer, 8, 0)
    assert all(text[slice(*span)].strip() for span in spans)
    assert " ".join(text[slice(*span)] for span in spans) == "A river. The city."


def test_paragraphs_in_different_chunks_share_whole_sentences(tokenizer: Any) -> None:
    pytest.importorskip("semantic_text_splitter")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    parts = [
        f"Part {i} tells of a river in the city. It flows on. It is long, and it flows to the sea." for i in range(9)
    ]
    text = "\n\n".join(parts)
    one, last = count(parts[0]), count("It is long, and it flows to the sea.")
    pieces = chunk(Document("k", text, "T", "k.txt"), tokenizer, 2 * one + last + 10, overlap=last)
    assert len(pieces) > 3 and all(count(piece.text) <= 2 * one + last + 10 for piece in pieces)
    for first, second in zip(pieces, pieces[1:], strict=False):
        assert first.text.endswith("to the sea.") and second.text.startswith(
            "It is long, and it flows to the sea.\n\nPart"
        )
    whole = chunk(Document("k", text, "T", "k.txt"), tokenizer, 2 * one + last + 10, overlap=0)
    assert all(piece.text.startswith("Part") for piece in whole)
    headed = "\n\n".join(f"## {i}\n\n{part}" for i, part in enumerate(parts))
    pieces = chunk(Document("k", headed, "T", "k.md"), tokenizer, 2 * one, overlap=last)
    assert len(pieces) > 3 and all(piece.text.startswith("##") for piece in pieces)


@pytest.mark.parametrize("before", ["", "\n\n", "\ufeff\n \n\t\n"])
def test_a_chunk_tells_the_line_of_its_file_where_it_begins(before: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(before + LONG, encoding="utf-8")
    (document,) = read_file(tmp_path / "a.txt", "a.txt")
    lines = (before + LONG).splitlines()
    for size in (20, 500):  # in several pieces, and in one
        for piece in chunk(document, tokenizer, size):
            number = int(piece.place.removeprefix("line "))
            assert lines[number - 1].startswith(piece.text.splitlines()[0][:12])


def test_pages_and_documents_are_read_by_their_libraries(tmp_path: Path) -> None:
    docx, _ = pytest.importorskip("docx"), pytest.importorskip("bs4")
    made = docx.Document()
    made.add_paragraph("A river flows.")
    made.add_table(1, 2).cell(0, 1).text = "Paris"
    made.save(str(tmp_path / "a.docx"))
    (document,) = read_file(tmp_path / "a.docx", "a.docx")
    assert document.text.startswith("A river flows.") and "Paris" in document.text
    (tmp_path / "b.html").write_text("<title>\n T </title><script>x()</script><h1>Head</h1><p>A <b>river</b>.")
    (document,) = read_file(tmp_path / "b.html", "b.html")
    assert document.title == "T" and "Head" in document.text and "river" in document.text and "x()" not in document.text
    for name in ("c.pdf", "c.docx"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(UnreadableFileError, match="cannot be read"):
            read_file(tmp_path / name, name)
