"""The grit command lists its subcommands, each explains itself, and those that need a model work together."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grit_kernels
from python_model import cli
from python_model.cli import COMMANDS, main
from python_model.commands import completion, demo_report
from python_model.commands.doctor import report
from python_model.support.files import new_folder, write_json

TEXTS = ["A river flows.", "Paris is the capital of France.", "def add(first, second):", "x", "blank lines"]


def test_grit_alone_lists_every_command(capsys: Any) -> None:
    main([])
    out = capsys.readouterr().out
    assert all(name in out and text in out for name, (_, text) in COMMANDS.items())


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and f"grit {name}" in printed
    assert not re.search(r":\w+:`", printed), "a reference of Sphinx, which a terminal shows as it is"


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_grit_tells_its_version(option: str, capsys: Any) -> None:
    main([option])
    assert capsys.readouterr().out == f"grit_kernels {grit_kernels.__version__}\n"


def test_an_unknown_command_lists_the_known_ones() -> None:
    with pytest.raises(SystemExit, match="unknown command 'fly'(.|\n)*doctor"):
        main(["fly"])


def test_doctor_names_a_choice_and_a_reason_for_every_op(capsys: Any) -> None:
    main(["doctor", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(report()))
    for backend in printed["backends"]["available"]:
        assert backend["reason"]
    for devices in printed["backends"]["ops"].values():
        assert set(devices) == {"cpu", "cuda"} and all(devices.values())
    main(["doctor"])
    assert "attention_forward" in capsys.readouterr().out


def test_generate_refuses_a_missing_model() -> None:
    with pytest.raises(SystemExit, match="no folder ./nowhere"):
        main(["generate", "--model", "./nowhere", "--prompt", "hi"])


def test_generate_prints_a_reply(checkpoint: Path, capsys: Any) -> None:
    main(["generate", "--model", str(checkpoint), "--prompt", "What?", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.strip()


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with new_folder(tmp_path / "f") as folder:
        (folder / "one").write_text("1")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "f") as folder:
        (folder / "two").write_text("2")
        raise RuntimeError
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["one"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "f"]


def test_completion_knows_commands_options_and_files(tmp_path: Path) -> None:
    """In a real bash: what it offers for a prefix."""
    script = tmp_path / "completion.bash"
    script.write_text(completion.script("bash"))
    (tmp_path / "corpus.jsonl").touch()

    def offers(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in ("grit", *words))
        code = f"source '{script}'; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_grit"
        code += "; printf '%s\\n' \"${COMPREPLY[@]}\""
        run = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        return run.stdout.split()

    assert offers("re") == ["rerank"]
    assert offers("index", "--chunk") == ["--chunk-tokens"]
    assert offers("rerank", "--method", "list") == ["listwise"]
    assert "corpus.jsonl" in offers("rerank", "--passages", "corp")
    assert completion.script("zsh").startswith("#compdef grit")


def test_the_commands_embed_index_answer_and_rerank(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    base = ["--model", str(checkpoint), "--json"]
    rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "A river flows.", "answers": ["water"]}))
    folder, store = str(tmp_path / "i"), str(tmp_path / "s")

    def run(*arguments: str) -> list[Any]:
        main(list(arguments))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    first, second = run("embed", *base, "--text", "a", "--text", "b", "--output", str(tmp_path / "v.npy"))
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), [first["embedding"], second["embedding"]], atol=1e-7)
    run("embed", *base, "--text", "a", "--output", str(tmp_path / "new" / "vectors"))
    assert np.load(tmp_path / "new" / "vectors").shape == (1, 64)  # the file that was named, in a folder that is made
    (made,) = run("index", folder, *base, "--add", str(tmp_path / "d.jsonl"), "--store", store)
    assert (made["documents"], made["added"], made["deleted"], made["skipped"]) == (5, 5, 0, [])
    (found,) = run("index", folder, *base, "--search", TEXTS[0], "--k", "2", "--delete", "3")
    assert found["documents"] == 4 and found["hits"][0]["key"] == "0" and len(found["hits"]) == 2
    words = TEXTS[1].split()[-1]
    (found,) = run("index", folder, *base, "--search", words, "--hybrid", "--where", "source=d.jsonl", "--compact")
    assert len(found["hits"]) == 4 and max(hit["score"] for hit in found["hits"]) == found["hits"][0]["score"]
    (found,) = run("index", folder, *base, "--search", words, "--where", "source=other")
    assert found["hits"] == []
    with pytest.raises(SystemExit, match="approximate: expected at least 256 documents, got 4|faiss is missing"):
        main(["index", folder, "--approximate", "ivf-sq8"])
    options = ["--max-new-tokens", "3", "--mode", "document_cache", "--store", store]
    answer, scores = run("rag", folder, *base, "--questions", str(tmp_path / "q.jsonl"), *options)
    assert answer["documents"][0]["key"] == "0" and answer["cached_tokens"] > 0 and scores["questions"] == 1
    (ranked,) = run("rerank", *base, "--query", "river?", "--passages", str(tmp_path / "d.jsonl"), "--top", "3")
    assert len(ranked["passages"]) == 3 and ranked["method"] == "likelihood"
    assert ranked["passages"][0]["score"] >= ranked["passages"][1]["score"]
    for command in (["rag", str(tmp_path / "nowhere"), "--question", "x"], ["index", str(tmp_path / "nowhere")]):
        with pytest.raises(SystemExit, match="there is no index in"):
            main([*command, "--model", str(checkpoint)])
    with pytest.raises(SystemExit, match="no file or folder"):
        main(["rerank", "--query", "x", "--passages", str(tmp_path / "nowhere"), "--model", str(checkpoint)])


def test_the_first_steps_name_options_that_exist(tmp_path: Path) -> None:
    from python_model.commands.train import COMMAND as grit_train

    rows = tmp_path / "rows.jsonl"
    rows.touch()
    lines = [*cli.FIRST_STEPS.splitlines(), *demo_report.next_steps("folder")]
    shown = [re.sub(r"^.*grit train|   .*$", "", line.strip()).split() for line in lines if "grit train " in line]
    assert len(shown) == 2
    for words in shown:
        assert grit_train.arguments(
            [str(rows) if word == "rows.jsonl" else word for word in words]
        ).data.train_data == str(rows)
