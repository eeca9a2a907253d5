"""A checkpoint whose layers differ in the size and number of their heads (Gemma 4) embeds, generates and trains."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import transformers

from python_model import GritLM
from python_model.generate.text import conversation_ids, reply
from python_model.model.identity import states_config
from python_model.rag.answer import bytes_per_token
from python_model.rag.index import add_documents, open_index
from python_model.rag.modes import Document
from python_model.train.flops import ModelFlops
from python_model.train.memory import activation_bytes, attention_output_bytes
from tests.grit_kernels.hf.test_proof import GEMMA4, model_of
from tests.python_model.training_samples import toy_config, toy_trainer

TEXTS = ["where is the river", "a city of France, which is a long text", "code"]


@pytest.fixture(scope="module")
def gemma4(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "max_position_embeddings": 512}
    try:
        model = model_of("gemma4_text", **{**GEMMA4, **sizes})
    except (ValueError, KeyError) as error:
        pytest.skip(f"this version of transformers: {error}")
    folder = tmp_path_factory.mktemp("gemma4")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_embeds_and_replies(gemma4: Path) -> None:
    model = GritLM(gemma4, device="cpu", dtype="float32")
    together = torch.tensor(model.encode(TEXTS))
    alone = torch.stack([torch.tensor(model.encode(text)) for text in TEXTS])
    assert (together - alone).abs().max() < 1e-5 * alone.abs().max()
    plain = transformers.AutoModelForCausalLM.from_pretrained(gemma4, dtype=torch.float32).eval()
    ids = conversation_ids(model, ["Where?"])
    theirs = plain.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(ids) :]
    assert (
        reply(model, ["Where?"], max_new_tokens=8) == model.tokenizer.decode(theirs, skip_special_tokens=True).strip()
    )


def test_it_trains(gemma4: Path, tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(gemma4, tmp_path, steps=6, lr=1e-2, peak_tflops=1.0))
    records = trainer.train()
    assert records[-1]["loss"] < records[0]["loss"]
    trained = torch.tensor(trainer.grit.eval().encode(TEXTS))
    saved = GritLM(trainer.save(), device="cpu", dtype="float32")
    assert (torch.tensor(saved.encode(TEXTS)) - trained).abs().max() < 1e-5


def test_an_index_knows_it(gemma4: Path, tmp_path: Path) -> None:
    model = GritLM(gemma4, device="cpu", dtype="float32")
    index = open_index(tmp_path / "index", model, prefix="")
    add_documents(index, model, [Document(str(i), text) for i, text in enumerate(TEXTS)])
    again = GritLM(gemma4, device="cpu", dtype="float32")
    assert len(open_index(tmp_path / "index", again, prefix="")) == len(TEXTS)
    assert states_config(model.model.config)["head_dim"] == [32, 512, 32, 512]


def test_what_it_takes_is_counted_by_layer(gemma4: Path) -> None:
    model = GritLM(gemma4, device="cpu", dtype="float32")
    layers = model.model.config.per_layer_config
    expected = sum(2 * layer.num_key_value_heads * layer.head_dim * 2 for layer in layers)
    assert bytes_per_token(model, "bfloat16") == expected
    assert ModelFlops.of(model).per_pair == 12 * sum(layer.num_attention_heads * layer.head_dim for layer in layers)
    for count in (activation_bytes, attention_output_bytes):
        assert count(model.model.config, True) == pytest.approx(fmean(count(layer, True) for layer in layers))


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_the_largest_length_matters_to_states_if_any_kind_of_layer_scales_by_it(kind: str) -> None:
    def config(length: int) -> transformers.PretrainedConfig:
        plain = {"rope_type": "default", "rope_theta": 1e4}
        scaled = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
        rope = {"sliding_attention": plain, "full_attention": plain if kind == "default" else scaled}
        return transformers.Gemma3TextConfig(max_position_embeddings=length, rope_parameters=rope)

    assert (states_config(config(64)) == states_config(config(128))) == (kind == "default")
