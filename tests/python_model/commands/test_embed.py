"""``grit embed`` keeps what a killed run has embedded, and says which texts it cuts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from python_model import GritLM
from python_model.commands import embed, index, mine, rerank
from python_model.generate.rerank import on_one_line, query_likelihoods
from python_model.rag.answer import RAG
from python_model.rag.documents import chunk, read_documents


def test_options_that_a_cluster_would_ignore_are_refused(tmp_path: Path) -> None:
    base = ["--ray", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    for option in (["--truncate-dim", "8"], ["--device", "cpu"], ["--batch-size", "8"]):
        with pytest.raises(SystemExit, match=f"--ray: expected no {option[0]}, got it"):
            embed.COMMAND([*base, *option])


@pytest.mark.parametrize("option", [["--workers", "2"], ["--gpus", "0"], ["--dtype", "float16"]])
def test_options_of_a_cluster_are_refused_without_one(option: list[str]) -> None:
    with pytest.raises(SystemExit, match=f"{option[0]}: expected --ray beside it, got none"):
        embed.COMMAND(["--text", "a", "--json", *option])


def test_texts_beside_a_file_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--text, --input: expected at most one of them, got both"):
        embed.COMMAND(["--text", "a", "--input", str(tmp_path), "--json"])


def test_vectors_need_a_place() -> None:
    with pytest.raises(SystemExit, match="output: expected --output FILE.npy or --json, got neither"):
        embed.COMMAND(["--text", "a"])


def test_an_index_is_synchronised_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--sync: expected --add with the folder to synchronise with, got none"):
        index.COMMAND([str(tmp_path / "i"), "--sync"])


def test_an_overlap_of_no_chunks_is_refused() -> None:
    with pytest.raises(SystemExit, match="--overlap: expected --chunk-tokens beside it, got none"):
        embed.COMMAND(["--text", "a", "--json", "--overlap", "3"])


def test_long_texts_are_embedded_in_chunks_when_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(f"river {number}." for number in range(40))
    base = ["--model", str(checkpoint), "--device", "cpu", "--max-length", "64", "--chunk-tokens", "40"]
    embed.COMMAND([*base, "--text", text, "--text", "short", "--output", str(tmp_path / "v.npy")])
    assert "longer" not in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    vectors = np.load(tmp_path / "v.npy")
    assert len(rows) == len(vectors) > 4 and rows[0]["key"] == "text 1#0" and rows[-1]["key"] == "text 2"
    assert "".join(row["text"] for row in rows[:-1]).replace(" ", "") == text.replace(" ", "")
    model = GritLM(checkpoint, device="cpu", mode="embedding")
    want = model.encode([row["text"] for row in rows], instruction=model.formatter.embed_instruction(""))
    np.testing.assert_allclose(vectors, want, atol=1e-6)
    embed.COMMAND([*base, "--text", text, "--json"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in printed] == [row["text"] for row in rows[:-1]]


def test_commands_that_compare_texts_say_when_they_cut_some(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passages = tmp_path / "passages.txt"
    passages.write_text("river\n" * 60)
    model = ["--model", str(checkpoint), "--device", "cpu"]
    rerank.COMMAND([*model, "--query", "river", "--passages", str(passages), "--passage-tokens", "20"])
    printed, said = capsys.readouterr()
    assert printed.endswith(f"[0] {'passages ' + 'river ' * 15}r\n") and printed.count("\n") == 1
    assert "grit rerank: 1 text is longer than --passage-tokens 20 tokens" in said
    assert said.endswith("(--chunk-tokens splits them instead)\n")
    rerank.COMMAND([*model, "--query", "river", "--passages", str(passages), "--passage-tokens", "400"])
    assert "longer" not in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    row = {"query": ["", "river"], "pos": [["", "river " * 60]], "neg": [["", "a"], ["", "b"]]}
    rows.write_text(json.dumps(row) + "\n")
    options = ["--negatives", "1", "--max-length", "24"]
    mine.COMMAND([str(rows), str(tmp_path / "mined.jsonl"), *model, *options])
    assert "grit mine: 1 text is longer than --max-length 24 tokens" in capsys.readouterr().err
    index.COMMAND([str(tmp_path / "index"), *model, "--add", str(passages)])
    assert "longer" not in capsys.readouterr().err
    index.COMMAND([str(tmp_path / "index"), *model, "--search", "river " * 600])
    assert "grit index: 1 text is longer than the model's 512 tokens" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_stopped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "river number {n}"}}\n' for n in range(10)))
    base = ["--model", str(checkpoint), "--device", "cpu", "--input", str(texts)]
    embed.COMMAND([*base, "--output", str(tmp_path / "whole.npy")])
    monkeypatch.setattr(embed, "BLOCK", 3)
    embedded: list[int] = []
    encode = GritLM.encode

    def killed(self: GritLM, part: list[str], **options: Any) -> Any:
        if sum(embedded) >= 6:
            raise KeyboardInterrupt
        embedded.append(len(part))
        return encode(self, part, **options)

    arguments = [*base, "--output", str(tmp_path / "v.npy")]
    with monkeypatch.context() as stopping:
        stopping.setattr(GritLM, "encode", killed)
        with pytest.raises(SystemExit, match="130"):
            embed.COMMAND(arguments)
    assert not (tmp_path / "v.npy").exists()
    with pytest.raises(SystemExit, match="interrupted run with other texts or settings"):
        embed.COMMAND([*arguments, "--instruction", "other"])
    capsys.readouterr()
    embed.COMMAND(arguments)
    printed = capsys.readouterr()
    assert "resuming after 6 of 10 texts" in printed.err and "10 vectors of size" in printed.out
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), np.load(tmp_path / "whole.npy"), atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", "v.npy", "whole.npy"]


KILLED = """
import os, signal, sys
from python_model import GritLM
from python_model.commands import embed
embed.BLOCK = 3
encode, blocks = GritLM.encode, []
def killed(self, part, **options):
    if len(blocks) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    blocks.append(part)
    return encode(self, part, **options)
GritLM.encode = killed
embed.COMMAND(sys.argv[1:])
"""


def test_a_run_ended_by_sigkill_loses_one_block_at_most(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "river number {n}"}}\n' for n in range(10)))
    arguments = [
        "--model",
        str(checkpoint),
        "--device",
        "cpu",
        "--input",
        str(texts),
        "--output",
        str(tmp_path / "v.npy"),
    ]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "v.npy").exists()
    monkeypatch.setattr(embed, "BLOCK", 3)
    embed.COMMAND(arguments)
    assert "resuming after 6 of 10 texts" in capsys.readouterr().err
    whole = GritLM(checkpoint, device="cpu")
    expected = whole.encode([f"river number {n}" for n in range(10)], instruction=whole.formatter.embed_instruction(""))
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", "v.npy"]


def test_progress_is_shown_from_the_second_batch_on(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count, shown in ((1, False), (2, False), (3, True)):
        texts = [part for letter in "abc"[:count] for part in ("--text", letter)]
        embed.COMMAND(["--model", str(checkpoint), "--device", "cpu", "--json", "--batch-size", "2", *texts])
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == count and (f"{count}/{count}" in printed.err) == shown


def test_texts_that_are_cut_are_counted(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", str(checkpoint), "--device", "cpu", "--output", str(tmp_path / "v.npy"), "--max-length", "16"]
    embed.COMMAND([*base, "--text", "river " * 40, "--text", "a", "--text", "code " * 30])
    assert "2 of 3 texts are longer than --max-length 16 tokens" in capsys.readouterr().err
    embed.COMMAND([*base, "--text", "a"])
    assert capsys.readouterr().err.count("longer") == 0


def test_files_of_a_folder_that_cannot_be_read_are_named_and_skipped(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    model = ["--model", str(checkpoint), "--device", "cpu"]
    query = ["--query", "What flows?", "--passages", str(folder), "--json"]
    with pytest.raises(SystemExit, match="holds no .* file that can be read"):
        rerank.COMMAND([*model, *query])
    capsys.readouterr()
    (folder / "good.md").write_text("A river flows.")
    rerank.COMMAND([*model, *query])
    printed = capsys.readouterr()
    assert [row["passage"] for row in json.loads(printed.out)["passages"]] == ["good A river flows."]
    embed.COMMAND([*model, "--input", str(folder), "--json"])
    also = capsys.readouterr()
    assert [json.loads(line)["text"] for line in also.out.splitlines()] == ["good A river flows."]
    for name, said in (("rerank", printed.err), ("embed", also.err)):
        assert f"grit {name}: skipped {folder / 'bad.txt'}: is not UTF-8" in said
        assert f"grit {name}: skipped {folder / 'picture.png'}: is of no known kind (.png)" in said
    with pytest.raises(SystemExit, match=r"bad.txt is not UTF-8"):  # named itself
        embed.COMMAND([*model, "--input", str(folder / "bad.txt"), "--json"])


def test_reranking_in_chunks_cuts_nothing_and_takes_the_best_chunk_of_each_passage(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["A river flows.\n" * 12 + "Paris is a city.\n" * 12, "A word is short.", "Code is text. " * 30]
    passages = tmp_path / "passages.jsonl"
    passages.write_text("".join(json.dumps({"text": text, "title": "Notes"}) + "\n" for text in texts))
    base = [
        "--model",
        str(checkpoint),
        "--device",
        "cpu",
        "--query",
        "What flows?",
        "--passages",
        str(passages),
        "--json",
    ]
    rerank.COMMAND([*base, "--chunk-tokens", "24", "--overlap", "4"])
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["passages"]
    assert "longer" not in printed.err
    model = GritLM(checkpoint, device="cpu")
    owners, parts = [], []
    for owner, document in enumerate(read_documents(passages)):
        for part in chunk(document, model.tokenizer, 24, 4):
            owners.append(owner)
            parts.append(part)
    assert owners.count(0) > 4 and owners.count(1) == 1
    scores = query_likelihoods(model, "What flows?", [on_one_line(part.content) for part in parts])
    best = {owner: max(s for s, o in zip(scores, owners, strict=True) if o == owner) for owner in range(3)}
    assert [row["index"] for row in rows] == sorted(best, key=lambda owner: -best[owner])
    for row in rows:
        assert row["score"] == pytest.approx(best[row["index"]], abs=1e-5)
        shown = parts[min(range(len(parts)), key=lambda i: abs(scores[i] - row["score"]))]
        assert (row["passage"], row["place"]) == (shown.content, shown.place)
    rerank.COMMAND([*base, "--chunk-tokens", "24", "--top", "1"])
    assert len(json.loads(capsys.readouterr().out)["passages"]) == 1
    with pytest.raises(SystemExit, match="--overlap: expected --chunk-tokens beside it, got none"):
        rerank.COMMAND([*base, "--overlap", "4"])
    with pytest.raises(SystemExit, match="--passage-tokens: expected no --chunk-tokens beside it, got both"):
        rerank.COMMAND([*base, "--chunk-tokens", "24", "--passage-tokens", "24"])


def test_a_model_without_a_limit_of_its_own_indexes_and_reranks_whole_texts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MistralConfig

    model = GritLM(checkpoint, device="cpu")
    monkeypatch.delattr(MistralConfig, "max_position_embeddings")  # a default
    del model.model.config.max_position_embeddings
    for command in (index, rerank):
        monkeypatch.setattr(command, "load", lambda *arguments, **options: model)
    passages = tmp_path / "passages.txt"
    passages.write_text("A river flows. " * 200)
    base = ["--query", "What flows?", "--passages", str(passages), "--json"]
    rerank.COMMAND([*base, "--chunk-tokens", "24"])
    index.COMMAND(
        [str(tmp_path / "index"), "--add", str(passages), "--chunk-tokens", "0", "--search", "river", "--json"]
    )
    (ranked, found) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "river" in ranked["passages"][0]["passage"]
    assert found["hits"][0]["text"] == passages.read_text().strip()
    assert RAG(model).max_length == 2**31 - 1
