"""No result depends on the other texts of a batch, whatever the rotary scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import grit_kernels as gk
from tests.grit_kernels.hf.test_families import FAMILIES, SPECIAL

LONG = 16
HALF = 16
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LONG},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * HALF,
        "long_factor": [1.0 + i for i in range(HALF)],
        "original_max_position_embeddings": LONG,
    },
}
FIXED = {"gptj"}
"""Families whose positions cannot be scaled."""
TEXTS = [5, 30, LONG, LONG + 1, 24]
"""Shorter than the original length, longer, and at its edge."""


def scaled(kind: str, scaling: str) -> dict[str, Any]:
    """rope_parameters of a family: one set, or one for each kind of layer."""
    parameters = {"rope_theta": 1e4, **SCALINGS[scaling]}
    if kind == "gpt_neox":
        parameters["partial_rotary_factor"] = 1.0
    if kind == "gemma3_text":
        return {"full_attention": parameters, "sliding_attention": {"rope_theta": 1e3, "rope_type": "default"}}
    return parameters


def tiny(kind: str, scaling: str) -> Any:
    torch.manual_seed(0)
    options = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2 * HALF,
        "max_position_embeddings": LONG if scaling == "dynamic" else 64,
        "original_max_position_embeddings": LONG,
        "rope_parameters": scaled(kind, scaling),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    config = transformers.AutoConfig.for_model(kind, **{**options, **SPECIAL[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


# every supported family under both scalings that depend on the length, one of them under the others as well
CASES = [(kind, scaling) for kind in sorted(set(FAMILIES) - FIXED) for scaling in ("dynamic", "longrope")]
CASES += [("llama", scaling) for scaling in ("default", "linear", "yarn")]
CASES.remove(("phi3", "dynamic"))  # its config takes no scaling other than longrope


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (length,), generator=generator) for length in TEXTS]


@pytest.mark.parametrize("kind, scaling", CASES)
@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_every_text_becomes_what_it_becomes_alone_in_a_new_unpatched_model(
    kind: str, scaling: str, is_causal: bool, texts: list[torch.Tensor]
) -> None:
    # a new model for each: dynamic scaling remembers the longest text it has seen
    options = {"is_causal": is_causal, "use_cache": False}
    alone = [tiny(kind, scaling).base_model(text[None], **options)[0][0] for text in texts]
    model = gk.patch(tiny(kind, scaling)).base_model
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    pack = gk.SamplePack.from_mask(mask, is_causal)
    for _ in range(2):
        states = {
            "packed": list(model(pack.pack(ids)[None], sample_pack=pack)[0][0].split(TEXTS)),
            "padded": [row[: len(t)] for row, t in zip(model(ids, mask, is_causal=is_causal)[0], texts, strict=True)],
        }
        cached = model(ids, mask, is_causal=is_causal, cache=gk.hf.new_cache())[0]
        states["cached"] = [row[: len(t)] for row, t in zip(cached, texts, strict=True)]
        for way, found in states.items():
            for a, b in zip(found, alone, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda m, way=way: f"{way}: {m}")


@pytest.mark.parametrize("kind, scaling", [("llama", "dynamic"), ("phi3", "longrope")])
@torch.no_grad()
def test_what_a_prompt_generates_does_not_depend_on_its_batch(kind: str, scaling: str) -> None:
    model = gk.patch(tiny(kind, scaling))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 97, (length,), generator=generator) for length in (5, 30)]
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **options)[:, longest:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), **options)
        assert torch.equal(together[row], alone[0, len(prompt) :])


@pytest.mark.parametrize("kind, scaling", [("llama", "dynamic"), ("phi3", "longrope")])
@torch.no_grad()
def test_what_stands_before_a_text_makes_it_no_longer(kind: str, scaling: str, texts: list[torch.Tensor]) -> None:
    """Padding on the left, or another sample of the row, in calls without positions."""
    alone = [tiny(kind, scaling).base_model(text[None], use_cache=False)[0][0] for text in texts]
    longest = max(map(len, texts))
    ids, mask = torch.zeros(2, len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :], mask[row, longest - len(text) :] = text, 1
    numbers = torch.cat([torch.full_like(text, number) for number, text in enumerate(texts, 1)])
    for packing in (True, False):
        model = gk.patch(tiny(kind, scaling), packing=packing).base_model
        keyword = gk.hf.cache_keyword(model, gk.hf.new_cache())
        first = model(ids[:, :-3], mask[:, :-3], **keyword)[0]
        found = {
            "padded": model(ids, mask)[0][mask.bool()],
            "in a row": model(torch.cat(texts)[None], numbers[None])[0][0],
            "cached": torch.cat([first, model(ids[:, -3:], mask, **keyword)[0]], dim=1)[mask.bool()],
        }
        for way, states in found.items():
            for a, b in zip(states.split([len(text) for text in texts]), alone, strict=True):
                if way != "cached" or len(b) <= LONG:  # keys in a cache keep the frequencies of a shorter text
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda m, way=way: f"{way}: {m}")


def test_a_compiled_pass_with_scaling_by_length_is_refused() -> None:
    model = gk.patch(tiny("llama", "dynamic"))
    with pytest.raises(Exception, match="rope_parameters: a compiled pass cannot decide"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 5, dtype=torch.int64))


def test_unpatch_gives_the_rotary_module_back() -> None:
    model = tiny("llama", "dynamic")
    gk.unpatch(gk.patch(model))
    assert "forward" not in model.model.rotary_emb.__dict__
