"""Documents from files and folders, and their division into chunks of a given number of tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from python_model.rag.formats import FAULTS, SUFFIXES, UnreadableFileError, read_file
from python_model.rag.modes import Document
from python_model.support.arguments import check_path
from python_model.support.files import reason_of
from python_model.support.optional import find

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|(?<=[\u3002\uff01\uff1f])")
SMALLEST_SHARE = 4
"""A chunk smaller than the allowed tokens divided by this takes text from its neighbours if possible."""


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted by name, except hidden ones and those in hidden folders. Links to nothing and folders
    that cannot be listed are among them: whoever reads them is told why it fails."""
    found: list[Path] = []

    def closed(error: OSError) -> None:
        found.append(Path(error.filename))

    for parent, folders, names in os.walk(folder, onerror=closed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(parent, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.is_file() or not file.exists()]
    return sorted(found)


def read_documents(path: str | os.PathLike[str], skip: Callable[[Path, str], None] | None = None) -> Iterator[Document]:
    """The documents of a file, or of all files below a folder, see :func:`python_model.rag.formats.read_file`.

    ``skip`` is called with each file below a folder that cannot be read, and the reason. Without it, files of unknown kinds
    are left out and other faults are errors, as they always are in a file that was named itself.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: a row is broken (the message has file and line), a file is empty, no UTF-8, or of another kind, or no file of
            a folder can be read.
    """
    check_path("path", path)
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"documents: there is no file or folder {root}")
    if root.is_file():
        files, skip = [root], None
    else:
        files = [f for f in files_below(root) if skip is not None or f.suffix.lower() in SUFFIXES]
    nothing = True
    for file in files:
        try:
            documents = read_file(file, root.name if file == root else file.relative_to(root).as_posix())
        except FAULTS as error:
            if skip is not None:
                skip(file, reason_of(error))
                continue
            if isinstance(error, UnreadableFileError):
                raise ValueError(f"documents: {file} {error}") from error
            raise
        nothing = False
        yield from documents
    if nothing:
        raise ValueError(f"documents: {root} holds no {', '.join(SUFFIXES)} file that can be read")


def splitter_name() -> str:
    """How :func:`chunk` splits, since this affects the chunks."""
    return "white space" if find("semantic_text_splitter") is None else "sentences"


def chunk(document: Document, tokenizer: Any, max_tokens: int, overlap: int = 0) -> list[Document]:
    """Split ``document`` into pieces whose text has at most ``max_tokens`` tokens.

    semantic-text-splitter (extra ``files``) splits at headings, paragraphs or sentences, whichever is the coarsest that fits;
    without it, text is split at white space. Consecutive pieces share up to ``overlap`` tokens, in whole sentences; with 0 they
    are the text without the white space between pieces. A piece that would be tiny takes some of its neighbour's text. A document
    that fits keeps its key; pieces are called ``key#0``, ``key#1``, ..; all keep the title, and each records the line where it
    begins.

    Raises:
        ValueError: ``max_tokens`` < 1, or ``overlap`` is not below half of it.
    """
    if max_tokens < 1 or not 0 <= 2 * overlap < max(max_tokens, 1):
        raise ValueError(
            f"max_tokens, overlap: expected max_tokens >= 1 and overlap below half of it, got {max_tokens}, {overlap}"
        )
    text = document.text
    spans = _spans(text, document.source or document.key, tokenizer, max_tokens, overlap)
    pieces = []
    for index, (start, end) in enumerate(spans):
        key = document.key if len(spans) == 1 else f"{document.key}#{index}"
        place = document.place or f"line {text.count(chr(10), 0, start) + 1}"
        pieces.append(replace(document, key=key, text=text[start:end], place=place))
    return pieces


Span = tuple[int, int]


def _spans(text: str, name: str, tokenizer: Any, max_tokens: int, overlap: int) -> list[Span]:
    def count(span: Span) -> int:
        return len(_ends(tokenizer, text[slice(*span)]))

    if count((0, len(text))) <= max_tokens:
        return [s for s in [_trimmed(text, (0, len(text)))] if s[0] < s[1]]
    library = find("semantic_text_splitter")
    if library is None:
        return _at_white_space(text, tokenizer, max_tokens, overlap)
    kind = library.MarkdownSplitter if name.lower().endswith(".md") else library.TextSplitter

    splitter = kind.from_callback(lambda piece: len(_ends(tokenizer, piece)), max_tokens, overlap=overlap)
    spans = [_trimmed(text, (start, start + len(piece))) for start, piece in splitter.chunk_indices(text)]
    spans = [s for s in spans if s[0] < s[1]]
    done: list[Span] = []
    for span in spans:
        # the last piece may be tiny, and so may one before a heading: redistribute text with the neighbour
        if done and min(count(done[-1]), count(span)) * SMALLEST_SHARE < max_tokens:
            done[-1:] = _shared(text, (done[-1][0], span[1]), max_tokens, overlap, count) or [done[-1], span]
        else:
            done.append(span)
    pieces = [
        (span[0] + start, span[0] + end)
        for span in done
        # a single "word" may be longer than allowed
        for start, end in (
            [(0, span[1] - span[0])]
            if count(span) <= max_tokens
            else _at_white_space(text[slice(*span)], tokenizer, max_tokens, 0)
        )
    ]
    return _overlapping(text, pieces, max_tokens, overlap, count, headings=kind is library.MarkdownSplitter)


def _overlapping(
    text: str, spans: list[Span], max_tokens: int, overlap: int, count: Callable[[Span], int], *, headings: bool
) -> list[Span]:
    """``spans``, of which those that share nothing with the one before begin with its last sentences, as many as are allowed. The
    library overlaps by whole sections of the level where it split, so mostly not at all between paragraphs. A piece that begins
    with a heading is left alone."""
    found = spans[:1]
    for before, span in zip(spans, spans[1:], strict=False):
        start = span[0]
        if before[1] <= start and not (headings and text.startswith("#", start)):
            ends = [before[0] + match.end() for match in _SENTENCE_END.finditer(text[slice(*before)])]
            for end in reversed([end for end in ends if end < before[1]]):
                if count((end, before[1])) > overlap or count((end, span[1])) > max_tokens:
                    break
                start = end
        found.append((start, span[1]))
    return found


def _shared(text: str, span: Span, max_tokens: int, overlap: int, count: Callable[[Span], int]) -> list[Span] | None:
    """``span``, covered by two neighbours, in one piece or in two, split at the sentence end closest to its middle; None if no
    split gives two pieces that are neither too long nor tiny."""
    if count(span) <= max_tokens:
        return [span]
    part, middle = text[slice(*span)], (span[1] - span[0]) // 2
    cuts = [match.end() for match in _SENTENCE_END.finditer(part)]
    # a heading stays with its text
    cuts = [cut for cut in cuts if not part[:cut].rstrip().rpartition("\n")[2].startswith("#")]
    for cut in sorted(cuts, key=lambda end: abs(end - middle)):
        first, second = (_trimmed(text, s) for s in ((span[0], span[0] + cut), (span[0] + cut, span[1])))
        sizes = count(first), count(second)
        if max(sizes) <= max_tokens and min(sizes) * SMALLEST_SHARE >= max_tokens:
            for earlier in (span[0] + end for end in cuts if end < cut):
                longer = (earlier, second[1])
                if count((earlier, first[1])) <= overlap and count(longer) <= max_tokens:
                    return [first, longer]
            return [first, second]
    return None


def _at_white_space(text: str, tokenizer: Any, max_tokens: int, overlap: int) -> list[Span]:
    spans: list[Span] = []
    start = 0
    while start < len(text):
        # a token is rarely longer than 16 characters; a bounded window keeps long documents linear
        window = text[start : start + 16 * max_tokens]
        ends = _ends(tokenizer, window)
        if len(ends) <= max_tokens:
            end = start + len(window)
            if end == len(text):
                spans.append((start, end))
                break
        else:
            end = start + max(_cut(window, ends[max_tokens - 1]), 1)
        # a piece may have more tokens alone than within its text
        while end - start > 1 and len(_ends(tokenizer, text[start:end].strip())) > max_tokens:
            end = start + max(_cut(text[start:end], (end - start) * 9 // 10), 1)
        spans.append((start, end))
        start = max(end - _tail(tokenizer, text[start:end], overlap), start + 1)
    return [s for s in (_trimmed(text, s) for s in spans) if s[0] < s[1]]


def _trimmed(text: str, span: Span) -> Span:
    part = text[slice(*span)]
    start = span[0] + len(part) - len(part.lstrip())
    return start, start + len(part.strip())


def _ends(tokenizer: Any, text: str) -> list[int]:
    """Where each token of ``text`` ends."""
    offsets = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    return [end for _, end in offsets["offset_mapping"]]


def _cut(text: str, end: int) -> int:
    """The last white space in the second half of ``text[:end]``, otherwise ``end``."""
    for position in range(end, end // 2, -1):
        if position == len(text) or text[position].isspace():
            return position
    return end


def _tail(tokenizer: Any, piece: str, overlap: int) -> int:
    """Number of characters of the last ``overlap`` tokens of a piece."""
    if overlap == 0:
        return 0
    ends = _ends(tokenizer, piece)
    return len(piece) - ends[-overlap - 1] if len(ends) > overlap else 0
