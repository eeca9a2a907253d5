"""A checkpoint goes to a hub that speaks the protocol of huggingface_hub, byte for byte, and a hub that fails costs nothing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from python_model import GritLM
from python_model.model.card import CARD_FILE, model_card
from python_model.model.hub import push_to_hub
from tests.python_model.hub import TOKEN, Hub, hub

NAME = "me/small"

# of huggingface_hub itself, about httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture(params=["xet", "lfs"])
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, which the client of this process knows as the only one; large files go to it by Xet, as by default, or by LFS."""
    from huggingface_hub import constants

    renew = getattr(pytest.importorskip("huggingface_hub.utils._xet"), "abort_xet_session", lambda: None)
    if request.param == "xet":
        pytest.importorskip("hf_xet")
        monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
        monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
        monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")
        renew()  # the next session reads these
    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its repetitions
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running
    renew()


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a head, a card, and what sentence-transformers reads; and beside it what is nobody else's business."""
    made = tmp_path_factory.mktemp("upload") / "checkpoint"
    model = GritLM(checkpoint, device="cpu", dtype="float32", projection=16, is_inference=False)
    model.save_pretrained(made)
    (made / CARD_FILE).write_text(model_card(model.settings, name=NAME, training={"steps": 7}))
    (made / "modules.json").write_text("[]")
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    (made / "cache.sqlite").write_bytes(b"\0" * 100)
    (made / ".env").write_text("HF_TOKEN=secret")
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_arrives_is_what_is_in_the_folder(folder: Path, here: Hub, tmp_path: Path) -> None:
    assert push_to_hub(folder, NAME) == f"{here.url}/{NAME}"
    sent = {name: data for name, data in content(folder).items() if name not in ("cache.sqlite", ".env")}
    assert here.files == {NAME: sent} and here.private == {NAME: True} and here.commits == ["Upload a GRIT checkpoint"]
    assert {"grit.json", "README.md", "modules.json", "1_Pooling/config.json", "model.safetensors"} < set(sent)
    for name, data in sent.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "modules.json").unlink()
    vectors = [GritLM(place, device="cpu").encode("a river").tolist() for place in (folder, tmp_path)]
    assert vectors[0] == vectors[1]


def test_only_what_has_changed_is_sent_again(folder: Path, here: Hub) -> None:
    push_to_hub(folder, NAME, private=False)
    assert here.private == {NAME: False}
    here.requests.clear()
    card = folder / CARD_FILE
    before = card.read_text()
    card.write_text(before + "\nMore.\n")
    try:
        push_to_hub(folder, NAME)
    finally:
        card.write_text(before)
    assert here.files[NAME][CARD_FILE] == f"{before}\nMore.\n".encode() and len(here.commits) == 2
    assert not any(request.startswith("PUT") for request in here.requests), "the weights are there"
    assert here.private == {NAME: False}, "a repository that exists keeps its visibility"


@pytest.mark.parametrize(
    ("here", "step", "status", "why"),
    [
        ("xet", "POST /api/repos/create", 403, "You are not allowed to"),
        ("xet", "POST /api/models/me/small/preupload/main", 403, "You are not allowed to"),
        ("xet", "GET /api/models/me/small/xet-write-token/main", 403, "403"),
        ("xet", "POST /v1/xorbs/", 403, "403 Forbidden"),
        ("xet", "POST /v1/xorbs/", 500, "500 Internal Server Error"),
        ("xet", "POST /v1/shards", 500, "500 Internal Server Error"),
        ("xet", "POST /api/models/me/small/commit/main", 500, "Internal Error"),
        ("lfs", "POST /me/small.git/info/lfs/objects/batch", 403, "You are not allowed to"),
        ("lfs", "PUT /upload/", 403, "You are not allowed to"),
        ("lfs", "PUT /upload/", 500, "500 Internal Server Error"),
        ("lfs", "POST /api/models/me/small/commit/main", 500, "Internal Error"),
    ],
    indirect=["here"],
)
def test_an_upload_that_fails_says_why_and_loses_nothing(
    folder: Path, here: Hub, step: str, status: int, why: str
) -> None:
    before = content(folder)
    heads = [data for name, data in before.items() if name == "embedding_head.safetensors"]
    whole = f"PUT /upload/{hashlib.sha256(heads[0]).hexdigest()}"  # of the two large files, one arrives
    here.fails = lambda request: status if request.startswith(step) and request != whole else None
    with pytest.raises(OSError, match="is complete, but was not uploaded to me/small") as failed:
        push_to_hub(folder, NAME)
    message = str(failed.value)
    assert (
        why in message and f"`hf upload {NAME} {folder} --private` uploads it later" in message and "\n" not in message
    )
    assert TOKEN not in message
    assert content(folder) == before
    assert not here.files.get(NAME), "a commit is whole or not at all"
    here.fails = lambda request: None
    assert push_to_hub(folder, NAME) == f"{here.url}/{NAME}"
    assert set(here.files[NAME]) == set(before) - {"cache.sqlite", ".env"}
    if step.startswith("PUT"):
        assert sum(request == whole for request in here.requests) == 1, "what has arrived is not sent again"


def test_another_owners_name_and_a_wrong_token_are_told(
    folder: Path, here: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match='rights to create a model under the namespace "you"'):
        push_to_hub(folder, "you/small")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    with pytest.raises(OSError, match="Invalid credentials"):
        push_to_hub(folder, NAME)
    assert not here.files


def test_a_card_that_the_hub_refuses_stops_the_upload_before_the_weights(folder: Path, here: Hub) -> None:
    card = folder / CARD_FILE
    before = card.read_text()
    card.write_text("---\ntags: grit\n---\n")
    try:
        with pytest.raises(OSError, match='Invalid metadata in README.md. - "tags" has a wrong type'):
            push_to_hub(folder, NAME)
    finally:
        card.write_text(before)
    assert here.files == {NAME: {}} and not any("upload" in request for request in here.requests)


@pytest.mark.slow
def test_a_run_ends_with_its_checkpoint_on_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    """The command in a process of its own, which knows the hub by HF_ENDPOINT as a user's would."""
    rows = [{"query": f"a river {n}", "pos": [f"Water {n}."], "neg": [f"A stone {n}."]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model.name": checkpoint,
        "data.train_data": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "run",
        "mode": "embedding",
        "steps": 1,
        "push_to_hub": NAME,
    }
    line = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with hub() as here:
        environment = {
            "HF_ENDPOINT": here.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-m", "python_model.cli", "train", *line],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"uploaded to {here.url}/{NAME}\nsaved {tmp_path}/run/checkpoint\n" in done.stdout
        assert here.files == {NAME: content(tmp_path / "run" / "checkpoint")} and here.private == {NAME: True}
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or TOKEN.encode() not in file.read_bytes(), file
