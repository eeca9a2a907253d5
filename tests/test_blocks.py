"""Every block of code and every command in README.md and docs/*.md works: on a tiny model, an index, a live server.

A Python block runs in a folder that has what the pages name (``my_run/checkpoint``, ``INDEX``, ``STORE``, ``ST``); one that
needs a package which is not installed is skipped and says so. A ``grit`` command is parsed by its own parser and run on small
data, but for those that fetch packages or train several models, which have tests of their own; training of 7B models, also
under ``torchrun``, is run dry. ``make``, ``pip install``, other ``python -m`` and ``curl`` lines are held to the Makefile, the
extras, the benchmarks' parsers and the server's routes, and commands within sentences to their options. Rows of JSON are read
as training reads them, and what a page shows below a ``$`` command is what the command prints.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from python_model import cli
from python_model.commands.runner import SMALL_MODEL
from python_model.data.reading import tolerant_rows
from python_model.data.report import DataReport
from python_model.data.rows import to_object
from tests.bench.parsing import parsed
from tests.conftest import needs_source_tree
from tests.python_model.conftest import checkpoint, tokenizer  # noqa: F401  (fixtures)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = needs_source_tree
ADDRESS = "http://127.0.0.1:8000"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M"
"""A model that the pages name; the tiny one takes its place."""
PARSED = {"fetch-model", "demo", "ablation"}
"""Commands that are not run here, but in test_small_model, test_demo and test_ablation."""
SMALLER = ("--steps", "1", "--batch.embedding_batch_size", "2", "--batch.generative_batch_size", "2")
"""With these, training ends in a second."""
TOOLS = ("trl", "langchain_openai", "langchain_huggingface", "llama_index", "mteb", "SentenceTransformerTrainer")


class Block(NamedTuple):
    page: str
    number: int
    language: str
    text: str

    @property
    def name(self) -> str:
        first = next((line for line in self.text.splitlines() if line.strip()), "")
        return f"{self.page}-{self.number}-{first[:40]}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for number, match in enumerate(re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)):
            found.append(Block(page.name, number, match[1], match[2]))
    return found


PYTHON = [
    pytest.param(b, id=b.name, marks=[pytest.mark.tools] if any(name in b.text for name in TOOLS) else [])
    for b in blocks()
    if b.language == "python" and "fetch_small_model" not in b.text  # tests/test_readme.py runs those
]
SHELL = [b for b in blocks() if b.language in ("", "bash", "sh")]


def lines(block: Block) -> list[list[str]]:
    """The commands of a block, split as a shell does."""
    joined = block.text.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        line = line.removeprefix("$ ").removeprefix("srun ")
        if line.split(" ")[0] in ("grit", "make", "pip", "python", "torchrun", "curl") or re.match(
            r"[A-Z_]+=\d+ ", line
        ):
            words = shlex.split(line.replace("&&", " ; "), comments=True)
            found.append([word for word in words if not re.fullmatch(r"[A-Z_]+=\S+", word) or word.startswith("docs=")])
    return found


ROWS = [b for b in blocks() if b.text.startswith("{") and b.language in ("", "json")]
SHOWN = [b for b in SHELL if b.text.startswith("$ ")]
COMMANDS = [pytest.param(words, id=f"{b.page}-{' '.join(words)[:60]}") for b in SHELL for words in lines(b)]


@pytest.fixture(scope="module")
def world(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with everything that the pages name."""
    from python_model import GritLM
    from python_model.cli import main

    folder = tmp_path_factory.mktemp("world")
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    model.model.config.sliding_window = None  # the pages embed texts of 512 tokens
    model.save_pretrained(folder / "my_run" / "checkpoint")
    (folder / "CHECKPOINT").symlink_to("my_run/checkpoint")
    pairs = [{"query": f"river {n}", "pos": [f"Water {n} that flows."], "neg": [f"A stone {n}."]} for n in range(80)]
    chats = [{"text": [f"What is river {n}?", f"Water {n}."]} for n in range(80)]
    rows = {"rows.jsonl": pairs, "mined/rows.jsonl": pairs, "rows/pairs.jsonl": pairs, "rows/chats.jsonl": chats}
    # as many as an approximate search takes at least
    notes = {"docs/notes/rows.jsonl": [{"text": f"A visibility rule {n}.", "year": 2021} for n in range(256)]}
    for name, objects in (rows | notes).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in objects), encoding="utf-8")
    (folder / "docs" / "drafts").mkdir()
    (folder / "docs" / "drafts" / "page.md").write_text("A draft.")
    (folder / "docs" / "page.txt").write_text("Paris is the capital of France. A visibility rule says who sees whom.")
    shutil.copytree(ROOT / "configs", folder / "configs")
    with _inside(folder):
        where = ["--model", "my_run/checkpoint"]
        main(["index", "INDEX", *where, "--add", "docs/", "--store", "STORE"])
        main(["data", "DATA", "--from", "rows", "--held-out", "10", "--test-rows", "4"])
        question = {"question": "What is river 1?", "answers": ["Water"]}
        Path("DATA/test/questions.jsonl").write_text(json.dumps(question) + "\n")
        if find_spec("sentence_transformers"):
            main(["export", "ST", *where])
            main(["export", "PACKED", *where, "--packed"])
    return folder


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 has not."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def url(world: Path) -> Iterator[str]:
    """A live server over the tiny model."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from python_model import GritLM
    from tests.python_model.serve.server import serving

    with serving(GritLM(world / "my_run" / "checkpoint", device="cpu", dtype="float32")) as running:
        yield running.url


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("block", PYTHON)
def test_a_python_block_runs(
    block: Block, world: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in re.findall(r"^(?:from|import) (\w+(?:\.\w+)*)", block.text, flags=re.MULTILINE):
        pytest.importorskip(package, exc_type=ImportError)
    for name in ("ST", "PACKED"):
        if f'"{name}"' in block.text and not (world / name).exists():
            pytest.skip("sentence-transformers is not installed")
    text = block.text.replace(f'"{HUB_NAME}"', '"my_run/checkpoint"')
    if ADDRESS in text:
        text = text.replace(ADDRESS, request.getfixturevalue("url"))
    monkeypatch.chdir(world)
    exec(compile(text, block.page, "exec"), {"__name__": "block"})


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one_that_works(
    words: list[str], world: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    tool, rest = words[0], words[1:]
    if tool == "grit":
        _grit(rest, tmp_path)
    elif tool == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for name in rest)
    elif tool == "pip":
        _pip(rest)
    elif tool in ("python", "torchrun"):
        if "-m" in rest:
            module = rest[rest.index("-m") + 1]
            assert find_spec(module), module
            if module == "python_model.train":
                _grit(["train", *rest[rest.index("-m") + 2 :]], tmp_path)
            elif module.startswith("bench."):
                parsed(module, rest[rest.index("-m") + 2 :])
    elif tool == "curl":
        _curl(rest, request)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_have_the_options_that_they_are_given(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`((?:grit|python -m bench\.)[^`]+)`", text):
        words = shlex.split(span)
        if words[0] == "grit" and words[1] in cli.COMMANDS:
            actions = importlib.import_module(cli.COMMANDS[words[1]][0]).COMMAND.parser()._actions
            known = {option for action in actions for option in action.option_strings}
            assert {word for word in words if word.startswith("--")} <= known | {"--help"}, span
        elif words[0] == "python" and len(words) > 3 and "--help" not in words:
            parsed(words[2], words[3:])


def test_an_index_is_searched_with_the_model_that_made_it() -> None:
    """Not with the small model, which is the default: the index refuses it."""
    asked = [words for block in SHELL for words in lines(block) if words[:2] == ["grit", "rag"] or "--search" in words]
    assert len(asked) >= 4 and all("--model" in words for words in asked)


@pytest.mark.parametrize("block", ROWS, ids=lambda block: block.name)
def test_rows_are_read_by_training(block: Block, tmp_path: Path) -> None:
    for number, line in enumerate(block.text.splitlines()):
        report = DataReport()
        (tmp_path / f"{number}.jsonl").write_text(line + "\n", encoding="utf-8")
        (row,) = tolerant_rows(str(tmp_path / f"{number}.jsonl"), report)
        assert sum(report.used.values()) == 1 and not report.left_out, line
        assert set(json.loads(line)) <= set(to_object(row))


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: block.name)
def test_a_command_prints_what_the_page_shows(
    block: Block, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, _, printed = block.text.removeprefix("$ ").partition("\n")
    words = shlex.split(command)
    for name, value in (word.split("=") for word in words if re.fullmatch(r"[A-Z_]+=\S+", word)):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    cli.main(["train", *words[words.index("python_model.train") + 1 :]])
    assert capsys.readouterr().out == printed


def _grit(rest: list[str], out: Path) -> None:
    """Run a command; what it writes beside the index goes to the folder ``out``."""
    if ";" in rest:
        cut = rest.index(";")
        _grit(rest[:cut], out)
        rest = rest[cut + 2 :]
    name, arguments = rest[0], [word for word in rest[1:] if word != "FILE"]
    parser = importlib.import_module(cli.COMMANDS[name][0]).COMMAND.parser()
    parser.parse_args(arguments)
    if name in PARSED or any(word == "--ray" or word.startswith("s3://") for word in arguments):
        return
    if name == "train":
        if any("7b.yaml" in word for word in arguments):
            arguments += ["--dry_run", "true"]
        else:
            arguments += ["--model.name", "my_run/checkpoint", "--output_dir", str(out / "run"), *SMALLER]
    elif name == "eval":
        arguments = [
            {SMALL_MODEL: "CHECKPOINT", "results.json": str(out / "results.json")}.get(w, w) for w in arguments
        ]
        arguments += ["--data", "DATA"]
    elif name == "data":
        if "--from" not in arguments:
            return  # reads packages, as tests/python_model/corpora do
        arguments[0] = str(out / "DATA")
    elif name == "mine":
        pytest.importorskip("bm25s")
        arguments[1] = str(out / "mined.jsonl")
    else:
        if name == "serve":
            pytest.importorskip("uvicorn")
        if name == "export" and "--for" not in arguments:
            pytest.importorskip("sentence_transformers")
        if "--approximate" in arguments:
            pytest.importorskip("faiss")
        if "--model" not in arguments and any("--model" in action.option_strings for action in parser._actions):
            arguments += ["--model", "my_run/checkpoint"]
    if name == "serve":
        _serve(arguments)
    else:
        cli.main([name, *arguments])


def _serve(arguments: list[str]) -> None:
    """Start a server of its own, as it changes its process; ask whether it is ready, and stop it."""
    httpx = pytest.importorskip("httpx")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "python_model.cli", "serve", *arguments, "--device", "cpu", "--port", port]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as server:
        try:
            while server.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                        break
                time.sleep(0.1)
        finally:
            server.terminate()
    assert server.returncode == -signal.SIGTERM  # which uvicorn raises again when it has finished


def _pip(rest: list[str]) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of pyproject.toml")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in rest[1:]:
        named = re.match(r"(?:grit-kernels|\.)\[([\w,-]+)\]$", word)
        if named:
            assert set(named[1].split(",")) <= set(extras), word
        elif not word.startswith(("-", ".", "grit-kernels")):
            try:
                version(re.split(r"[=<>]", word)[0])
            except PackageNotFoundError:
                pytest.skip(f"{word} is not installed")


def _curl(rest: list[str], request: pytest.FixtureRequest) -> None:
    httpx = pytest.importorskip("httpx")
    (address,) = [word for word in rest if word.startswith("127.0.0.1")]
    sent: Any = json.loads(rest[rest.index("-d") + 1])
    if "messages" in sent:
        sent["max_tokens"] = 4
    answer = httpx.post(request.getfixturevalue("url") + "/" + address.split("/", 1)[1], json=sent, timeout=60)
    assert answer.status_code == 200, answer.text


def test_the_blocks_are_found() -> None:
    assert {b.page for b in blocks()} >= {"README.md", "getting_started.md", "integrations.md", "serving.md"}
    assert len(PYTHON) >= 15 and len(COMMANDS) >= 40 and len(ROWS) >= 3 and SHOWN
    # a command that is merely indented would not be found
    hidden = re.compile(r"^ {4}(grit|make|pip|python|torchrun|curl) ", flags=re.MULTILINE)
    assert not [page.name for page in PAGES if hidden.search(page.read_text(encoding="utf-8"))]
