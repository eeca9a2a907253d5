"""A path that is empty, of the wrong kind, or closed to this user ends a command with one line that names it."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from python_model.cli import COMMANDS, main
from python_model.corpora.small_model import fetch_small_model, resolve_model
from python_model.data.files import data_files, read_objects
from python_model.data.token_cache import TokenCache
from python_model.evaluation.held_out import HeldOut
from python_model.model.export import export_sentence_transformers
from python_model.model.hub import push_to_hub
from python_model.model.modeling import GritLM
from python_model.model.server_export import export_for_server
from python_model.rag.corpus import Recipe, embed_corpus, read_run
from python_model.rag.documents import read_documents
from python_model.rag.index import Index
from python_model.rag.store.folder import StoreError
from python_model.rag.store.kvstore import KVStore
from python_model.rag.sync import add_files
from python_model.settings import GritSettings
from python_model.support.files import new_file, new_folder, reason_of
from python_model.train.ablation import Ablation
from python_model.train.config import ModelConfig, TrainConfig
from tests.python_model.commands.test_bad_input import fails

TEXTS = (
    "--approximate --device --dtype --for --format --host --instruction --method --mode --prompt --query "
    "--query-instruction --question --replicas --search --served-model-name --sources --stop --store-format --system --text "
    "--vectors --where shell "
).split()
"""The options whose value is a text, but no path."""


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an index, a store, and files where folders are expected."""
    made = tmp_path_factory.mktemp("paths")
    shutil.copytree(checkpoint, made / "model")
    (made / "rows.jsonl").write_text(json.dumps({"query": "a river", "pos": ["Water."], "neg": ["A stone."]}))
    (made / "file").touch()
    (made / "notes").mkdir()
    (made / "notes" / "a.txt").write_text("A river flows.")
    (made / "odd" / "index.sqlite").mkdir(parents=True)
    Index(made / "index").close()
    KVStore(made / "store").close()
    return made


def empty(command: Any) -> list[tuple[str, list[str]]]:
    """Each option of a command that takes a text, with a command line that leaves it empty."""
    actions = [action for action in command.parser()._actions if action.nargs != 0 and action.type not in (int, float)]
    places = [action for action in actions if not action.option_strings]
    found = []
    for action in actions:
        kind = getattr(action, "_typehint", None)
        if kind in (int, float) or type(action).__name__ == "ActionYesNo":
            continue
        if action in places:
            found.append((action.dest, ["a"] * places.index(action) + [""]))
            continue
        option = action.option_strings[0]
        found.append((option, ["a"] * len(places) + ([f"{option}="] if action.nargs is None else [option, ""])))
    return found


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_an_empty_path_is_refused_by_every_option_that_takes_one(name: str, capsys: Any) -> None:
    command = importlib.import_module(COMMANDS[name][0]).COMMAND
    for option, line in empty(command):
        if option not in TEXTS:
            with pytest.raises(SystemExit):
                command(line)
            assert f"error: {option}: expected a path, got ''\n" in capsys.readouterr().err, option


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --config=", "--config: expected a path, got ''"),
        ("train --output_dir=", "output_dir: expected a str that is not empty, got ''"),
        ("train --model.name=", "model.name: expected a str that is not empty, got ''"),
        ("serve --model model --index x=", "--index: expected FOLDER or NAME=FOLDER, got 'x='"),
        ("serve --model model --store =x --index x", "--store: expected FOLDER or NAME=FOLDER, got '=x'"),
    ],
)
def test_so_is_a_setting_or_a_part_of_an_option(
    folder: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fails(folder, line, monkeypatch).partition(": ")[2] == message


def test_so_is_an_argument(checkpoint: Path, tmp_path: Path) -> None:
    model = GritLM(checkpoint, device="cpu")
    calls: dict[str, Callable[[], Any]] = {
        "model_name_or_path": lambda: GritLM(""),
        "model": lambda: resolve_model(""),
        "cache_dir": lambda: fetch_small_model(cache_dir=""),
        "folder": lambda: push_to_hub("", "owner/name"),
        "source": lambda: embed_corpus("", "out", Recipe("model")),
        "output": lambda: read_run(""),
        "file": lambda: list(read_objects("")),
        "name": lambda: ModelConfig(name=""),
        "output_dir": lambda: Ablation({}, [], output_dir=""),
        "paths": lambda: add_files(Index(tmp_path), model, [""]),
    }
    for argument, call in calls.items():
        with pytest.raises(ValueError, match=f"^{argument}: expected a (path|str that is not empty), got ''"):
            call()
    for same in (
        *(lambda: Index(""), lambda: KVStore(""), lambda: TokenCache("", "key"), lambda: data_files("")),
        *(lambda: list(read_documents("")), lambda: model.save_pretrained(""), lambda: new_file("").__enter__()),
        *(lambda: new_folder("").__enter__(), lambda: HeldOut(""), lambda: model.settings.save("")),
        *(lambda: GritSettings.load(""), lambda: export_for_server(model, "", "vllm")),
        *(lambda: export_sentence_transformers(model, ""), lambda: embed_corpus("in", "", Recipe("model"))),
    ):
        with pytest.raises(ValueError, match="expected a path, got ''"):
            same()
    with pytest.raises(ValueError, match="output_dir: expected a str that is not empty"):
        TrainConfig(output_dir="", dry_run=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("index I --shards file", "shards: there is no run of `grit embed --ray` at file"),
        ("index I --shards file/x", "shards: there is no run of `grit embed --ray` at file/x"),
        ("index I --model model --add nowhere", "--add: there is no file or folder nowhere"),
        ("index store --model model --search a", "path: there is no index in store, but data of another kind"),
        ("index store --model model --add notes", "path: there is no index in store, but data of another kind"),
        (
            "index new --model model --add notes --store index",
            "path: there is no key-value store in index, but data of another kind",
        ),
        ("index odd --model model --search a", "odd/index.sqlite: the index cannot be opened"),
        ("serve --model model --api-key-file nowhere", "nowhere: there is no such file or folder"),
        ("serve --model model --api-key-file notes", "notes: expected a file, got a folder"),
        ("serve --model model --api-key-file file/x", "file: expected a folder, got a file"),
        ("generate --model model --input notes --output o", "notes: expected a file, got a folder"),
        ("eval --model model --questions notes", "notes: expected a file, got a folder"),
        ("mine rows.jsonl o.jsonl --corpus notes", "notes: expected a file, got a folder"),
        ("embed --model file --text a --json", "expected a checkpoint's folder or name, got the file file"),
        ("embed --model notes --text a --json", "model: expected a checkpoint's folder, got notes without a config"),
        ("fetch-model --cache-dir file/x", "could not write the small model to file/x: file/x: expected a folder"),
        ("data file --from rows.jsonl --overwrite", "output: expected a folder or a new name, got the file file"),
        ("data file/x --from rows.jsonl", "file: expected a folder or a new name, got a file"),
        ("train --config nowhere", "config: there is no file nowhere"),
        ("train --config notes", "config: there is no file notes"),
    ],
)
def test_one_line_names_a_path_of_the_wrong_kind(
    folder: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GRIT_KERNELS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    said = fails(folder, line, monkeypatch)
    assert message in said and "Errno" not in said and "\n" not in said
    assert not (folder / "I").exists()


def test_the_token_cache_needs_a_place_for_a_file(folder: Path) -> None:
    with pytest.raises(IsADirectoryError, match="notes: expected a file to write, got a folder"):
        TokenCache(folder / "notes", "key").get(b"digest")
    with pytest.raises(NotADirectoryError, match="file: expected a folder or a new name, got a file"):
        TokenCache(folder / "file" / "x", "key").get(b"digest")


def test_an_error_of_the_system_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as wrong:
        (tmp_path / "file" / "x" / "y").read_text()
    assert reason_of(wrong.value, with_path=True) == f"{tmp_path / 'file'}: expected a folder, got a file"
    for number, words in ((errno.EACCES, "this user has no permission for it"), (errno.EROFS, "it can only be read")):
        assert reason_of(OSError(number, "Number", "place")) == words
        assert reason_of(OSError(number, "Number", "place"), with_path=True) == f"place: {words}"
    for other in (OSError("a text"), OSError(errno.EPIPE, "Broken pipe"), ValueError("a value")):
        assert reason_of(other, with_path=True) == str(other)


def test_a_file_that_cannot_be_written_is_called_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(PermissionError) as file, new_file(tmp_path / "file"):
        pass
    mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, **how: (mkdir if path == tmp_path else closed)(path, **how))
    with pytest.raises(PermissionError) as made, new_folder(tmp_path / "folder"):
        pass
    assert (file.value.filename, made.value.filename) == (str(tmp_path / "file"), str(tmp_path / "folder"))


def test_an_index_that_this_user_may_not_write_says_so(tmp_path: Path) -> None:
    index = Index(tmp_path)
    index._db.execute("PRAGMA query_only = 1")  # what the system refuses, SQLite refuses in the same words
    with pytest.raises(StoreError, match=f"{tmp_path}: this user has no permission to write the index"):
        index.delete(["a"])


def test_a_search_takes_no_lock_that_a_writer_holds(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It would wait as long as another process adds documents, and fail in a folder that this user may only read."""
    monkeypatch.chdir(folder)
    main("index searched --model model --add notes".split())
    monkeypatch.setattr(
        "python_model.rag.sync.FileLock", lambda path: pytest.fail("a search takes the lock of writers")
    )
    main("index searched --model model --search river --json".split())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["hits"][0]["key"] == "a.txt"
