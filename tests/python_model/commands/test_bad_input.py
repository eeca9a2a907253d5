"""What a user gets wrong ends a command with one line that names it, before anything is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model.cli import main

ROWS = {"query": "a river", "pos": ["Water that flows."], "neg": ["A stone."]}


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with what is no model, no settings, no rows."""
    made = tmp_path_factory.mktemp("folder")
    for name in ("model", "damaged"):
        shutil.copytree(checkpoint, made / name)
    (made / "damaged" / "model.safetensors").write_text("no weights")
    (made / "rows.jsonl").write_text(json.dumps(ROWS))
    (made / "prompts.jsonl").write_text('{"prompt": "Hi"}')
    (made / "questions.jsonl").write_text('{"question": "no answers?"}')
    (made / "broken.yaml").write_text("a: [1\n  b: :")
    (made / "empty.yaml").write_text("# nothing yet\n")
    (made / "empty.jsonl").touch()
    (made / "file").touch()
    (made / "made").mkdir()
    (made / "folder").mkdir()
    (made / "folder" / "notes.txt").write_text("not to be lost")
    return made


def fails(folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    return str(stop.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("embed --model nowhere --text a --json", "grit embed: model: there is no folder nowhere, and no such model"),
        ("embed --model damaged --text a --json", "grit embed: model: expected a checkpoint, got damaged with weights"),
        (
            "embed --model model --text a --json --device tpu",
            "device: expected a device such as cpu or cuda:1, got 'tpu'",
        ),
        ("embed --model model --text a --output made", "made: expected a file to write, got a folder"),
        ("embed --model model --text a --output file/v.npy", "file: expected a folder or a new name, got a file"),
        ("generate --model model --input prompts.jsonl --output made", "made: expected a file to write, got a folder"),
        ("rag INDEX --question=", "--question: expected a non-empty text, got ''"),
        ("generate --prompt=", "--prompt: expected a non-empty text, got ''"),
        ("convert rows.jsonl made", "made: expected a file to write, got a folder"),
        ("convert rows.jsonl file/x.jsonl", "file: expected a folder or a new name, got a file"),
        ("data D --from empty.jsonl", "from: expected files with rows that training can use"),
        ("train --config broken.yaml", "broken.yaml: not a YAML file (while parsing a flow sequence"),
        ("train --config empty.yaml", "config: expected settings in empty.yaml, got an empty file"),
        ("ablation --config broken.yaml", "broken.yaml: not a YAML file (while parsing a flow sequence"),
        ("export folder --model model", "which holds other files"),
        ("export model --model model", "folder: expected another one than the model's, got"),
        ("export . --model model", "which holds other files"),
        ("rerank --query a --passages rows.jsonl --top 0", "--top: expected an int >= 1, got 0"),
        ("generate --prompt a --beams 0", "--beams: expected an int >= 1, got 0"),
        (
            "index I --add rows.jsonl --chunk-tokens 4 --overlap 2",
            "--chunk-tokens, --overlap: expected 0, or 1 and more",
        ),
        ("index I --add rows.jsonl --chunk-tokens -4", "--chunk-tokens, --overlap: expected 0, or 1 and more"),
        ("serve --port 99999", "--port: expected 0 to 65535, got 99999"),
        ("serve --timeout 0", "--timeout: expected a number > 0, got 0.0"),
        ("serve --kv-tokens 0", "--kv-tokens: expected an int >= 1, got 0"),
        ("serve --ageing -1", "--ageing: expected a number >= 0, got -1.0"),
        ("export file --model model", "file: expected a folder or a new name, got a file"),
    ],
)
def test_one_line_says_what_is_wrong(folder: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = fails(folder, line, monkeypatch)
    assert message in said and "\n" not in said
    assert not (folder / "D").exists() and (folder / "folder" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eval --model model --questions nowhere", "there is no file nowhere"),
        ("eval --model model --questions questions.jsonl", "questions.jsonl:1: expected a question row"),
        ("eval --model model --output made", "made: expected a file to write, got a folder"),
        ("eval --model model --output file/x.json", "file: expected a folder or a new name, got a file"),
        ("demo --model model --output-dir file", "file: expected a folder or a new name, got a file"),
    ],
)
def test_it_is_said_before_a_model_is_loaded(
    folder: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    for command in ("evaluate.load", "demo.GritLM"):
        monkeypatch.setattr(f"python_model.commands.{command}", load)
    assert message in fails(folder, line, monkeypatch)


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (0, "cuda", "device: expected cpu, as torch sees no CUDA device, got 'cuda'"),
        (2, "cuda:2", "device: expected one of the 2 CUDA devices, from cuda:0, got 'cuda:2'"),
    ],
)
def test_a_cuda_device_that_is_not_there_is_refused(
    folder: Path, count: int, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    line = f"embed --model model --text a --json --device {device}"
    assert fails(folder, line, monkeypatch) == f"grit embed: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("embed --max-length x", "error: --max-length: expected an int, got 'x'\n"),
        ("embed --gpus many", "error: --gpus: expected a float, got 'many'\n"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_option(line: str, message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(line.split())
    assert capsys.readouterr().err.endswith(message)


def test_help_names_no_class_of_python(capsys: Any) -> None:
    for command in ("export", "serve", "generate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    printed = capsys.readouterr().out
    assert "default: 8000" in printed and not any(word in printed for word in ("<class", "null", "default: )", "()"))
