"""The model card that training and export write, and the upload to the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from python_model import GritLM
from python_model.model.card import CARD_FILE, carried_sections, model_card
from python_model.model.hub import push_to_hub
from python_model.settings import GritSettings
from python_model.train.run import run
from tests.python_model.training_samples import toy_config, toy_trainer


def front_matter(card: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    return dict(ModelCard(card).data.to_dict())


def test_a_card_has_the_hubs_metadata_and_what_the_run_was() -> None:
    card = model_card(
        GritSettings(attn="cccc"),
        name="me/small",
        base="HuggingFaceTB/SmolLM2-135M",
        training={"optimizer.lr": 1e-4},
        datasets={"wordnet": 12345},
        results={"ndcg_at_10": 0.51239, "queries": 40},
    )
    data = front_matter(card)
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and "grit-kernels" in data["tags"]
    for line in ("| optimizer.lr | `0.0001` |", "| wordnet | 12,345 |", "| ndcg_at_10 | 0.5124 |", "| attn | `cccc` |"):
        assert line in card.splitlines(), line
    assert 'GritLM("me/small")' in card


def test_a_run_leaves_a_card_without_paths_and_credentials(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret_place").mkdir()
    config = toy_config(checkpoint, tmp_path / "secret_place", steps=2, lr=3e-4, matryoshka_dims=[8, 16])
    trainer = toy_trainer(config)
    trainer.train()
    (trainer.folder / "evaluation.jsonl").write_text(
        "".join(json.dumps({"step": n, "ndcg_at_10": score}) + "\n" for n, score in ((1, 0.75), (2, 0.5)))
    )
    assert "ndcg_at_10" not in (trainer.save() / CARD_FILE).read_text()  # of an earlier run in this folder
    config.evaluation.data = str(tmp_path)
    folder = trainer.save()
    card = (folder / CARD_FILE).read_text()
    assert "| losses.matryoshka_dims | `[8, 16]` |" in card and "| optimizer.lr | `0.0003` |" in card
    assert "| ndcg_at_10 | 0.7500 |" in card and "base_model" not in front_matter(card)
    assert "secret_place" not in card and str(checkpoint.parent) not in card
    assert GritLM(folder, device="cpu").encode("a").shape == (64,)


def test_an_export_carries_training_and_results_over(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from python_model.model.export import export_sentence_transformers

    source = tmp_path / "source"
    GritLM(checkpoint, device="cpu", dtype="float32").save_pretrained(source)
    card = model_card(GritSettings(), training={"steps": 7}, results={"ndcg_at_10": 0.25})
    (source / CARD_FILE).write_text(card)
    assert list(carried_sections(source)) == ["Training", "Results"]
    model = GritLM(source, device="cpu", dtype="float32")
    exported = (export_sentence_transformers(model, tmp_path / "exported") / CARD_FILE).read_text()
    assert front_matter(exported)["library_name"] == "sentence-transformers"
    assert "| steps | `7` |" in exported and "| ndcg_at_10 | 0.2500 |" in exported
    assert "GritLM(" not in exported and "`document`, `query`" in exported
    (source / CARD_FILE).write_text("# Another's card\n\n## Training\n\nunknown\n")
    assert carried_sections(source) == {} == carried_sections(tmp_path)


class FakeApi:
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"name": name, **options}))

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload_folder", options))
        return "commit"


def test_a_checkpoint_is_uploaded_alone_and_private(checkpoint: Path, tmp_path: Path) -> None:
    import fnmatch

    api = FakeApi()
    assert push_to_hub(checkpoint, "me/small", api=api) == "https://huggingface.co/me/small"
    (made, first), (sent, second) = api.calls
    assert (made, first) == ("create_repo", {"name": "me/small", "private": True, "exist_ok": True})
    assert sent == "upload_folder" and second["repo_id"] == "me/small" and Path(second["folder_path"]) == checkpoint
    patterns = second["allow_patterns"]

    def goes(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    assert all(goes(file.name) for file in checkpoint.iterdir()) and goes("README.md") and goes("1_Pooling/config.json")
    assert not any(goes(name) for name in (".env", "states/step-1/.metadata", "log.jsonl", "cache.sqlite", "id_rsa"))
    for wrong in ("small", "a/b/c", "me/", "https://hub/me/small"):
        with pytest.raises(ValueError, match=f"name: expected owner/name, got '{wrong}'"):
            push_to_hub(checkpoint, wrong, api=api)
    with pytest.raises(FileNotFoundError, match="folder: there is no config.json"):
        push_to_hub(tmp_path, "me/small", api=api)
    with pytest.raises(ValueError, match="push_to_hub: expected owner/name, got 'small'"):
        toy_config(checkpoint, tmp_path, push_to_hub="small")


def test_an_upload_that_fails_says_what_is_there_and_how_to_upload_it(checkpoint: Path) -> None:
    """The client's errors about the network are no OSError, which the command would report in one line."""

    class Away:
        def create_repo(self, name: str, **options: Any) -> None:
            raise RuntimeError("name or service not known")

    later = f"`hf upload me/small {checkpoint} --private` uploads it later"
    told = f"{checkpoint} is complete, but was not uploaded to me/small (name or service not known); {later}"
    with pytest.raises(OSError, match=re.escape(told)):
        push_to_hub(checkpoint, "me/small", api=Away())


def test_a_run_without_credentials_does_not_train_first(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("python_model.train.trainer.Trainer.from_config", lambda *_: pytest.fail("it went on"))
    with pytest.raises(
        ValueError, match="push_to_hub: expected the credentials of `hf auth login` or HF_TOKEN, got none"
    ):
        run(toy_config(checkpoint, tmp_path, push_to_hub="me/small"))
