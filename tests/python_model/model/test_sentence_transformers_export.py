"""An exported folder gives the same embeddings in sentence-transformers, padded and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from python_model import GritLM
from python_model.model.export import export_sentence_transformers
from python_model.model.prompts import embed_instruction
from python_model.support import precision

TEXTS = ["A river flows.", "def add(first, second):", "x", "The capital of France is a city with a river in it. " * 3]


def _load(folder: Path, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"attn": "bbcc", "pooling_method": "mean"},
        {"attn": "cccc", "pooling_method": "lasttoken"},
        {"attn": "bbcc", "pooling_method": "cls", "normalized": False},
        {"attn": "bbcc", "pooling_method": "mean", "projection": 16},
        {"pooling_method": "mean", "projection": 16, "projection_activation": "tanh"},
        {"pooling_method": "mean", "format": "zephyr"},
        {"pooling_method": "weightedmean", "embed_instruction": True},
        {"pooling_method": "lasttoken", "embed_eos": "</e>"},
        {"pooling_method": "mean", "bidirectional_window": "full"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_export_gives_the_same_embeddings(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], packed: bool
) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32", **settings)
    instructions = {"query": "Find the text", "document": ""}
    folder = export_sentence_transformers(model, tmp_path / "st", instructions=instructions, packed=packed)
    loaded = _load(folder, trust_remote_code=packed)
    for name, instruction in instructions.items():
        want = model.encode(TEXTS, instruction=model.formatter.embed_instruction(instruction))
        got = loaded.encode(TEXTS, prompt_name=name)
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=1e-5)
    want = model.encode(TEXTS)
    np.testing.assert_allclose(loaded.encode(TEXTS), want, atol=2e-6 * np.abs(want).max(), rtol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["st"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_to_embed_is_no_message_to_a_chat_template(checkpoint: Path, tmp_path: Path, packed: bool) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.role }} says: {{ m.content }}{% endfor %}"
    folder = export_sentence_transformers(model, tmp_path / "st", packed=packed)
    loaded = _load(folder, trust_remote_code=packed)
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    np.testing.assert_allclose(loaded.encode(TEXTS), model.encode(TEXTS), atol=2e-6, rtol=1e-5)


def test_the_packed_module_runs_the_patched_decoder(checkpoint: Path, tmp_path: Path) -> None:
    import grit_kernels as gk

    model = GritLM(checkpoint, device="cpu", dtype="float32")
    loaded = _load(export_sentence_transformers(model, tmp_path / "st", packed=True), trust_remote_code=True)
    assert gk.is_patched(loaded[0].auto_model)
    plain = _load(export_sentence_transformers(model, tmp_path / "plain"))
    assert not gk.is_patched(plain[0].auto_model)


def test_the_ranking_loss_trains_the_packed_module_like_the_padded_one(checkpoint: Path, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = GritLM(checkpoint, device="cpu", dtype="float32")
    queries, documents = ["river", "sum of two", "capital of France"], [TEXTS[0], TEXTS[1], TEXTS[3]]
    losses: dict[str, list[float]] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, packed in (("padded", False), ("packed", True)):
        folder = export_sentence_transformers(model, tmp_path / name, instructions={"query": "Find"}, packed=packed)
        trained = _load(folder, trust_remote_code=packed).train()
        loss_function = MultipleNegativesRankingLoss(trained, scale=50.0)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
        losses[name] = []
        for step in range(3):
            features = [
                trained.preprocess(queries, prompt=trained.prompts["query"]),
                trained.preprocess(documents),
            ]
            loss = loss_function(features, torch.arange(len(queries)))
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                gradients[name] = [p.grad.clone() for p in trained.parameters()]
            optimizer.step()
            losses[name].append(float(loss.detach()))
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-3)
    assert losses["packed"][-1] < losses["packed"][0]
    for a, b in zip(gradients["packed"], gradients["padded"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-7)


def test_the_trainer_trains_the_packed_module_like_the_padded_one(checkpoint: Path, tmp_path: Path) -> None:
    import datasets
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = GritLM(checkpoint, device="cpu", dtype="float32")
    columns = {"query": ["river", "sum of two", "capital of France"], "document": [TEXTS[0], TEXTS[1], TEXTS[3]]}
    instructions = {"query": "Find the text", "document": ""}
    losses: dict[str, list[float]] = {}
    trained: dict[str, Any] = {}
    for name, packed in (("padded", False), ("packed", True)):
        folder = export_sentence_transformers(model, tmp_path / name, instructions=instructions, packed=packed)
        trained[name] = _load(folder, trust_remote_code=packed)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / f"{name} run"),
            max_steps=4,
            per_device_train_batch_size=3,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            prompts=trained[name].prompts,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = SentenceTransformerTrainer(
            model=trained[name],
            args=arguments,
            train_dataset=datasets.Dataset.from_dict(columns),
            loss=MultipleNegativesRankingLoss(trained[name], scale=50.0),
        )
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses["packed"]) == 4 and losses["packed"] == pytest.approx(losses["padded"], rel=1e-3)
    assert losses["packed"][-1] < losses["packed"][0]
    trained["packed"].save(str(tmp_path / "saved"))
    again = _load(tmp_path / "saved", trust_remote_code=True)
    got, want = (m.encode(TEXTS, prompt_name="query") for m in (again, trained["packed"]))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("pooling_method", ["mean", "lasttoken", "cls"])
def test_the_packed_export_of_a_bfloat16_model_gives_its_own_vectors(
    checkpoint: Path, tmp_path: Path, pooling_method: str
) -> None:
    model = GritLM(checkpoint, device="cpu", dtype=torch.bfloat16, pooling_method=pooling_method)
    folder = export_sentence_transformers(model, tmp_path / "st", packed=True)
    loaded = _load(folder, trust_remote_code=True, model_kwargs={"dtype": "bfloat16"})
    assert loaded[0].auto_model.dtype == torch.bfloat16
    # one text at a time: in bfloat16 the tiles of a matrix product depend on its rows
    for text in TEXTS:
        np.testing.assert_allclose(loaded.encode(text), model.encode(text), atol=1e-6)


@pytest.mark.parametrize("known", ["avx2", "avx512_bf16"])
def test_the_packed_export_computes_in_the_dtype_that_gritlm_chooses(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """Float32 on a CPU that emulates products in bfloat16."""
    GritLM(checkpoint, device="cpu", dtype=torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    stored = GritLM(tmp_path / "bfloat16", device="cpu", dtype="auto")
    folder = export_sentence_transformers(stored, tmp_path / "st", packed=True)
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: frozenset({known}))
    loaded, model = _load(folder, trust_remote_code=True), GritLM(tmp_path / "bfloat16", device="cpu")
    assert loaded[0].auto_model.dtype == model.model.dtype == (torch.float32 if known == "avx2" else torch.bfloat16)
    for text in TEXTS:
        np.testing.assert_allclose(loaded.encode(text), model.encode(text), atol=1e-6)


def test_the_plain_export_of_a_bfloat16_model_gives_the_vectors_of_its_weights_in_float32(
    checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model = GritLM(checkpoint, device="cpu", dtype=torch.bfloat16)
    folder = export_sentence_transformers(model, tmp_path / "st")
    loaded = _load(folder)
    model.save_pretrained(tmp_path / "saved")
    exact = GritLM(tmp_path / "saved", device="cpu", dtype=torch.float32).encode(TEXTS)
    np.testing.assert_allclose(loaded.encode(TEXTS), exact, atol=2e-6)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    mine = model.encode(TEXTS)
    assert np.linalg.norm(loaded.encode(TEXTS) - mine) <= 1.001 * np.linalg.norm(exact - mine)


def test_bos_that_the_tokenizer_does_not_add_is_added_by_the_exported_one(
    checkpoint_without_bos: Path, tmp_path: Path
) -> None:
    model = GritLM(checkpoint_without_bos, special_tokens="bos", device="cpu", dtype="float32")
    bare = GritLM(checkpoint_without_bos, device="cpu", dtype="float32")
    assert np.abs(model.encode(TEXTS) - bare.encode(TEXTS)).max() > 1e-2
    for grit in (model, bare):
        loaded = _load(export_sentence_transformers(grit, tmp_path / "st", instructions={"query": "Find the text"}))
        np.testing.assert_allclose(loaded.encode(TEXTS), grit.encode(TEXTS), atol=2e-6)
        want = grit.encode(TEXTS, instruction=embed_instruction("Find the text"))
        np.testing.assert_allclose(loaded.encode(TEXTS, prompt_name="query"), want, atol=2e-6)


def test_an_instruction_may_take_the_name_of_an_empty_prompt(checkpoint: Path, tmp_path: Path) -> None:
    model = GritLM(checkpoint, prompts={"query": "", "document": ""}, device="cpu", dtype="float32")
    loaded = _load(export_sentence_transformers(model, tmp_path / "st", instructions={"query": "Find the text"}))
    want = model.encode(TEXTS, instruction=embed_instruction("Find the text"))
    np.testing.assert_allclose(loaded.encode(TEXTS, prompt_name="query"), want, atol=2e-6)


def test_settings_without_a_counterpart_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "attn": {"attn": "cbcc"},
        "pooling_method": {"pooling_method": "weightedmean"},
        "embed_eos": {"embed_eos": "</e>"},
    }
    for name, settings in refused.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*got"):
            export_sentence_transformers(GritLM(checkpoint, device="cpu", **settings), tmp_path / "st")
    named = GritLM(checkpoint, device="cpu", prompts={"query": "Find: "})
    with pytest.raises(ValueError, match="instructions: expected names that differ .*got 'query'"):
        export_sentence_transformers(named, tmp_path / "st", instructions={"query": "Find the text"})
    assert list(tmp_path.iterdir()) == []
