"""Commands print what was asked for: nothing of the packages they stand on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from python_model.commands.runner import readable_errors
from tests.python_model.small_sample import write_small_sample

SCRIPT = """
import json, sys
from pathlib import Path
from python_model import cli
from python_model.commands import demo
sample = Path(sys.argv[1])
demo.sample_dir, demo.REPLY_TOKENS = (lambda: sample), 2
for command in json.loads(sys.argv[2]):
    try:
        cli.main(command)
    except SystemExit as stop:  # the demo of a random model gets no better
        if command[0] != "demo" or stop.code != 1:
            raise
"""
BAR = re.compile(r"(\w[\w ]*: *)?\d+%\|.*\| [\d.]+\w?/[\d.]+\w? \[.*\]?")


def test_nothing_but_progress_is_on_standard_error(checkpoint: Path, tmp_path: Path) -> None:
    """In one process: what is said once is not said again, and what only the first use of a package says is said."""
    sample = write_small_sample(tmp_path / "sample")
    model = ["--model", str(checkpoint)]
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "0", "text": "A river flows."}))
    index, store, to = str(tmp_path / "index"), str(tmp_path / "store"), ["--output_dir", str(tmp_path / "run")]
    commands = [
        ["generate", *model, "--prompt", "What?", "--max-new-tokens", "2"],
        ["embed", *model, "--text", "a", "--json"],
        ["index", index, *model, "--add", str(tmp_path / "d.jsonl"), "--store", store],
        [
            "rag",
            index,
            *model,
            "--question",
            "What?",
            "--max-new-tokens",
            "2",
            "--mode",
            "document_cache",
            "--store",
            store,
        ],
        ["train", "--model.name", str(checkpoint), "--data.train_data", str(sample / "train"), "--steps", "1", *to],
        ["demo", *model, "--steps", "1", "--output-dir", str(tmp_path / "demo")],
    ]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(sample), json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    said = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", run.stderr) if line.strip()]
    said = [line for line in said if not BAR.fullmatch(line)]
    assert len(said) == 1 and said[0].startswith("grit index: ") and "their states take" in said[0]  # what it will cost
    assert not re.search("Loading weights|Writing model shards|LOAD REPORT|Warning", run.stderr + run.stdout)


@pytest.mark.parametrize("command", [["doctor"], ["completion", "bash"]])
def test_nothing_is_said_when_the_reader_has_left(command: list[str]) -> None:
    """As in `grit doctor | head -1`; the status is that of a process that SIGPIPE has ended."""
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "python_model.cli", *command], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")


def test_another_broken_pipe_is_reported() -> None:
    with pytest.raises(SystemExit, match="grit embed: a worker is gone"), readable_errors("embed"):
        raise BrokenPipeError("a worker is gone")
