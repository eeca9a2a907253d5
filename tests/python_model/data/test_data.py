"""Training rows: a malformed one is refused with its file and line; the bundled sample keeps what its README promises."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from python_model.corpora import sample
from python_model.corpora.sample import (
    CORPUS_PASSAGES,
    COUNTS,
    HELD_OUT_PERCENT,
    NEGATIVES,
    WordNetRows,
)
from python_model.corpora.sources.packages import SourceError
from python_model.corpora.sources.python_functions import WHEELS, read_functions
from python_model.corpora.sources.wordnet import UNSUITABLE, WORDNET_SHA256, Synset, read_wordnet
from python_model.corpora.split import held_out
from python_model.data import sample_dir
from python_model.data.reading import read_corpus, read_embedding, read_generative, read_rows
from python_model.data.rows import DataError, EmbeddingRow, GenerativeRow, InstructedText, Passage

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
    file = write(tmp_path / "chat.jsonl", {"text": [" a\n", "b", "c", "d"], "dataset": "other", "whatever": 1})
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
    "no known column": ({"phrase": "a"}, "['phrase']"),
    "both kinds": ({**EMBEDDING, **GENERATIVE}, "both 'query' and 'text'"),
    "no pos": ({"query": "a", "neg": []}, "'pos' is missing"),
    "misspelt neg": ({"query": "a", "pos": ["b"], "negs": []}, "unknown column 'negs': did you mean 'neg'?"),
    "empty pos": ({**EMBEDDING, "pos": []}, "pos: expected at least one passage, got an empty list"),
    "pos not a list": ({**EMBEDDING, "pos": "b"}, "pos: expected a list of passages, got a string"),
    "neg a string": ({**EMBEDDING, "neg": "b"}, "neg: expected a list of passages, got a string"),
    "query null": ({**EMBEDDING, "query": None}, "query: expected a string, got null"),
    "query a number": ({**EMBEDDING, "query": 1.5}, "query: expected a string, got a number"),
    "empty query": ({**EMBEDDING, "query": ["i", " \n"]}, "query[1]: expected a text, got an empty one"),
    "instruction null": ({**EMBEDDING, "query": [None, "a"]}, "query[0]: expected a string, got null"),
    "three parts": ({**EMBEDDING, "query": ["a", "b", "c"]}, "got a list of 3"),
    "empty passage": ({**EMBEDDING, "neg": ["a", ""]}, "neg[1]: expected a text, got an empty one"),
    "passage null": ({**EMBEDDING, "pos": ["a", None]}, "pos[1]: expected a string, got null"),
    "text a number": ({"text": 1}, "text: expected a text or a list [user, assistant, ...], got a number"),
    "text null": ({"text": None}, "text: expected a text or a list [user, assistant, ...], got null"),
    "one turn": ({"text": ["a"]}, "got 1 turns"),
    "odd turns": ({"text": ["a", "b", "c"]}, "got 3 turns"),
    "empty reply": ({"text": ["a", ""]}, "text[1]: expected a text, got an empty one"),
    "turn a boolean": ({"text": ["a", True]}, "text[1]: expected a string, got true or false"),
    "lone surrogate": ('{"text": ["a", "\\ud800"]}', "lone surrogate"),
    "key a number": ({**GENERATIVE, "key": 3}, "key: expected a string, got a number"),
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
    with pytest.raises(DataError, match=r"data.jsonl:2: expected a row of the same kind as .*data.jsonl:1"):
        read_rows(write(tmp_path / "data.jsonl", EMBEDDING, GENERATIVE))


def test_the_other_kind_and_nothing_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got only generative rows"):
        read_embedding(write(tmp_path / "g.jsonl", GENERATIVE))
    with pytest.raises(DataError, match="got only embedding rows"):
        read_generative(write(tmp_path / "e.jsonl", EMBEDDING))
    with pytest.raises(DataError, match="empty.jsonl: no rows"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"has no \*.jsonl, "):
        read_rows(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="no file or folder .*missing"):
        read_rows(tmp_path / "missing")


def test_a_corpus_has_unique_keys_and_texts(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus.jsonl", {"key": "a", "text": "one"}, {"key": "b", "text": "one"})
    assert read_corpus(file) == [Passage("a", "one"), Passage("b", "one")]
    titled = [{"key": "a", "title": "Book", "text": "one"}, {"key": "b", "title": None, "text": "two"}]
    assert [passage.text for passage in read_corpus(write(tmp_path / "t.jsonl", *titled))] == ["Book one", "two"]
    with pytest.raises(DataError, match=r"c.jsonl:2: duplicate key 'a', also at .*c.jsonl:1"):
        read_corpus(write(tmp_path / "c.jsonl", {"key": "a", "text": "one"}, {"key": "a", "text": "two"}))
    with pytest.raises(DataError, match=r"d.jsonl:1: the column 'key' is missing"):
        read_corpus(write(tmp_path / "d.jsonl", {"text": "one"}))


def sample_texts(part: str) -> tuple[set[str], set[str]]:
    """Keys and texts (instructions and templates aside) of one side of the bundled sample."""
    embedding, generative = read_rows(sample_dir() / part)
    texts = {text for row in embedding for _, text in (row.query, *row.pos, *row.neg)}
    texts |= {turn for row in generative for turn in row.turns if turn != "Use it in a sentence."}
    keys = {str(row.key) for row in (*embedding, *generative)}
    if part == "test":
        corpus = read_corpus(sample_dir() / "corpus.jsonl")
        texts |= {passage.text for passage in corpus}
        keys |= {passage.key for passage in corpus}
    return keys, texts


def test_the_sample_has_the_counts_of_its_readme() -> None:
    rows = {part: read_rows(sample_dir() / part) for part in ("train", "test")}
    counts = {part: (len(embedding), len(generative)) for part, (embedding, generative) in rows.items()}
    assert counts == {"train": (720, 210), "test": (96, 60)}
    assert len(read_corpus(sample_dir() / "corpus.jsonl")) == sum(CORPUS_PASSAGES.values()) == 700
    for index, part in enumerate(("train", "test")):
        found = Counter(row.dataset for kind in rows[part] for row in kind)
        assert found == {name: wanted[index] for name, wanted in COUNTS.items()}


def test_no_key_and_no_text_of_the_sample_is_on_both_sides() -> None:
    train_keys, train_texts = sample_texts("train")
    test_keys, test_texts = sample_texts("test")
    assert not train_keys & test_keys
    assert not train_texts & test_texts
    assert all(held_out(key, HELD_OUT_PERCENT) for key in test_keys) and not any(
        held_out(key, HELD_OUT_PERCENT) for key in train_keys
    )


def test_every_test_query_of_the_sample_finds_its_positive_and_negatives_in_the_corpus_once() -> None:
    corpus = read_corpus(sample_dir() / "corpus.jsonl")
    texts = {passage.key: passage.text for passage in corpus}
    assert len(set(texts.values())) == len(corpus)
    for row in read_embedding(sample_dir() / "test"):
        assert texts[str(row.key)] == row.pos[0].text
        assert {text for _, text in row.neg} <= set(texts.values())


def test_no_negative_of_the_sample_is_the_positive() -> None:
    for part in ("train", "test"):
        for row in read_embedding(sample_dir() / part):
            assert len(row.neg) == NEGATIVES and not set(row.pos) & set(row.neg)


def test_the_sample_is_free_of_unsuitable_words_and_comes_with_its_notices() -> None:
    for part in ("train", "test"):
        embedding, generative = read_rows(sample_dir() / part)
        words = [row for row in embedding if row.dataset.startswith("wordnet")]
        prose = [text for row in words for _, text in (row.query, *row.pos, *row.neg)]
        prose += [turn for row in generative if row.dataset.startswith("wordnet") for turn in row.turns]
        assert not [text for text in prose if UNSUITABLE.search(text)]
    notice = (sample_dir() / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for needed in (
        "WordNet 3.0 Copyright 2006 by Princeton University",
        *(wheel.requirement.split("==")[0] for wheel in WHEELS),
    ):
        assert needed in notice


def test_the_sample_is_small() -> None:
    assert sum(file.stat().st_size for file in sample_dir().rglob("*") if file.is_file()) < 600_000


SYNSETS = """\
  1 a line of the licence
00000001 05 n 02 hound 0 bow_wow 1 001 @ 00000003 n 0000 | an animal that is kept for hunting; "the hound barks at us"
00000002 05 n 01 Pluto 0 001 @i 00000003 n 0000 | a character; "Pluto sleeps"- A. Author; "Pluto and a friend slept"
00000003 05 n 01 beast(a) 0 000 | a living being that moves about
"""
INDEX = "  1 a line\nhound n 1 1 @ 1 1 00000001\npluto n 1 1 @ 1 1 00000002\nbeast n 1 0 1 0 00000003\n"


def test_wordnet_files_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WORDNET_SHA256:
        (tmp_path / name).write_text({"data.noun": SYNSETS, "index.noun": INDEX}.get(name, ""))
        sha = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        monkeypatch.setitem(WORDNET_SHA256, name, sha)
    synsets = read_wordnet(tmp_path)
    hound, pluto, beast = synsets["n00000001"], synsets["n00000002"], synsets["n00000003"]
    assert hound.words == ("hound", "bow wow") and hound.gloss == "an animal that is kept for hunting"
    assert hound.examples == ("the hound barks at us",) and hound.groups == ("n00000003",) and hound.common
    assert pluto.examples == ("Pluto and a friend slept",) and not pluto.common  # the quotation is dropped
    assert pluto.instance_of == ("n00000003",) and pluto.known_name and not hound.known_name
    assert beast.words == ("beast",) and not beast.common
    (tmp_path / "data.verb").write_text("changed")
    with pytest.raises(SourceError, match=r"data\.verb: expected SHA-256"):
        read_wordnet(tmp_path)


@pytest.mark.parametrize(
    ("gloss", "suitable"),
    [
        ("a natural stream of water", True),
        ("a stream of water (natural) that flows", True),
        ("a natural stream (of water", False),
        ("a stream in Africa and Asia", False),
        ("a stream of water: 'the \"Nile\"'", False),
        ("a stream of wäter that flows", False),
        ("the stream of a church", False),
        ("water that flows far", True),
        ("running streamwaters", False),
        ("water in a stream x", False),
        ("a stream " + 38 * "and " + "so", False),
    ],
)
def test_a_definition_is_taken_if_it_is_plain_whole_and_names_nobody(gloss: str, suitable: bool) -> None:
    synset = Synset("1", "n", ("stream",), gloss, (), (), True)
    assert WordNetRows.is_suitable(synset) == suitable


def test_the_sample_is_written_or_compared_and_a_missing_source_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("fetch_wordnet", tmp_path), ("read_wordnet", {}), ("read_functions", [])):
        monkeypatch.setattr(sample, name, lambda *_, value=value: value)
    monkeypatch.setattr(sample, "build", lambda *_: {"train/embedding.jsonl": '{"ü": 1}\n{}\n'})
    output = ["--output", str(tmp_path / "made")]
    file = tmp_path / "made/train/embedding.jsonl"
    with pytest.raises(SystemExit, match="embedding.jsonl differs from what is built"):
        sample.main([*output, "--check"])
    assert not file.exists()
    sample.main(output)
    assert file.read_text(encoding="utf-8") == '{"ü": 1}\n{}\n'
    sample.main([*output, "--check"])
    assert capsys.readouterr().out == 2 * f"{file}: 2 rows, 13 bytes\n"
    file.write_text("{}\n")
    with pytest.raises(SystemExit, match="embedding.jsonl differs from what is built"):
        sample.main([*output, "--check"])

    def fetch(folder: Path) -> Path:
        raise SourceError(f"wordnet: not in {folder}")

    monkeypatch.setattr(sample, "fetch_wordnet", fetch)
    with pytest.raises(SystemExit, match="wordnet: not in .*packages"):
        sample.main(output)


def test_functions_are_read_without_docstring_and_only_where_described(tmp_path: Path) -> None:
    source = '''
def double(x):
    """Return twice the number that is given.

    More about it.
    """

    # why
    return 2 * x


def _private(x):
    """Return twice the number that is given here."""
    y = x
    return 2 * y


def short(x):
    """Too short."""
    y = x
    return y
'''
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as archive:
        archive.writestr("p/m.py", source)
        archive.writestr("p/tests/t.py", source.replace("double", "hidden"))
    functions = read_functions([(tmp_path / "p.whl").read_bytes()])
    assert [(f.key, f.description, f.code) for f in functions] == [
        (
            "python:p/m.py:double",
            "Return twice the number that is given.",
            "def double(x):\n    # why\n    return 2 * x",
        )
    ]
