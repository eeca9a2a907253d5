"""A checkpoint with layers that do not attend (LFM2) embeds and generates like any other, and keeps no documents' states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from python_model import GritLM
from python_model.generate import reply
from python_model.generate.decode import decode
from tests.python_model.conftest import tokenizer  # noqa: F401  (fixture)

TEXTS = ["Paris is the capital of France.", "A stone.", "Water that flows to the sea, or to another river."]


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> GritLM:  # noqa: F811
    if "lfm2" not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of transformers has no lfm2")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "lfm2",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        initializer_range=0.2,
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    folder: Path = tmp_path_factory.mktemp("hybrid")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not hasattr(transformers.Cache, "get_conv_state"):
        pytest.skip("a transformers before 5.24, whose LFM2 patch() refuses")
    return GritLM(folder, device="cpu", dtype="float32")


def test_texts_embedded_together_equal_those_embedded_alone(model: GritLM) -> None:
    together = model.encode(TEXTS, instruction="<|embed|>\n", convert_to_tensor=True)
    for text, vector in zip(TEXTS, together, strict=True):
        assert torch.allclose(model.encode(text, instruction="<|embed|>\n", convert_to_tensor=True), vector, atol=1e-5)


@torch.no_grad()
def test_decoding_several_prompts_equals_transformers_on_each(model: GritLM) -> None:
    prompts = [[1, 40, 41, 42, 43], [1, 50], [1, 60, 61]]
    found = decode(model.model, prompts, max_new_tokens=6, eos_token_ids=[])
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        expected = model.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert expected[0, len(prompt) :].tolist() == tokens
    assert isinstance(reply(model, ["What is a river?"], max_new_tokens=4), str)


def test_states_that_a_key_value_cache_cannot_hold_are_refused(model: GritLM) -> None:
    with pytest.raises(ValueError, match="cache: expected one with room for the states of layers that do not attend"):
        model.encode("a text", get_cache=True)
