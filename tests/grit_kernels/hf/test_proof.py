"""Types without a test of their own are tried on a tiny model, and admitted or refused for a reason."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
import transformers

import grit_kernels as gk
from grit_kernels.hf import proof
from tests.grit_kernels.tiny_mistral import FLAGS, IDS, MASKS, tiny_model
from tools import families_sweep

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
OLMO3 = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
DEEPSEEK = {
    "head_dim": 16,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
GPT_OSS = {**OLMO3, "num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA4 = {
    **{"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    **{"global_head_dim": 512, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 2},
    **{"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16, "use_bidirectional_attention": "vision"},
}
ADMITTED = {
    "olmo3": OLMO3,
    "starcoder2": {},
    "glm4": {},
    "cohere2": OLMO3,
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": GPT_OSS,
    "gemma4_text": GEMMA4,
}


def model_of(model_type: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    values = {**SMALL, **changes}
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("model_type", ADMITTED)
@torch.no_grad()
def test_a_type_that_passes_its_trial_equals_the_unpatched_model(model_type: str) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    stock = model_of(model_type, **ADMITTED[model_type])
    before = torch.random.get_rng_state()
    model = gk.patch(copy.deepcopy(stock))
    assert torch.equal(torch.random.get_rng_state(), before), "a trial disturbs no random numbers"
    assert proof.verdict(stock).error < proof.TOLERANCE
    for mask in (MASKS["right"], MASKS["left"]):
        real = mask.bool()
        truth = [stock(IDS, attention_mask=mask, is_causal=flag, use_cache=False).logits for flag in (True, False)]
        mixed = torch.where(FLAGS[:, None, None], *truth)
        for caching in (False, True):
            found = model(IDS, attention_mask=mask, is_causal=FLAGS, use_cache=caching).logits
            assert (found - mixed)[real].abs().max() <= 1e-5 * max(1.0, float(mixed.abs().max()))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": MASKS["left"]}
    assert torch.equal(model.generate(IDS, **options), stock.generate(IDS, **options))


@pytest.mark.parametrize("model_type", families_sweep.WRONG)
def test_types_known_to_be_wrong_are_refused(model_type: str) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    assert families_sweep.tried(model_type).refusal is not None


@pytest.mark.parametrize("model_type", families_sweep.SINKS)
def test_types_with_attention_sinks_are_admitted(model_type: str) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    assert families_sweep.tried(model_type).refusal is None


@pytest.mark.parametrize("model_type", families_sweep.RECURRENT)
def test_types_with_layers_that_carry_a_state_are_admitted(model_type: str) -> None:
    if not hasattr(transformers.Cache, "get_conv_state") or model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("a transformers before 5.24, which calls such layers otherwise: they are refused")
    assert families_sweep.tried(model_type).refusal is None


def test_the_parts_of_a_tiny_head_add_up() -> None:
    sizes = proof.tiny_values(model_of("deepseek_v3", **DEEPSEEK).config)
    assert sizes["qk_head_dim"] == sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"] == 24


@torch.no_grad()
def test_what_a_text_gives_alone_depends_on_no_text_before_it() -> None:
    """Dynamic scaling keeps the frequencies of the longest text read so far."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    decoder = tiny_model(max_position_embeddings=8, rope_parameters=rope).model
    before = dict(vars(decoder.config))
    alone = proof.alone_in_stock(decoder, IDS[:1, :12], False)
    proof.alone_in_stock(decoder, IDS[:1].repeat(1, 3), True)
    assert torch.equal(proof.alone_in_stock(decoder, IDS[:1, :12], False), alone)
    assert vars(decoder.config) == before


@pytest.mark.parametrize("kinds", [["sliding_attention"], ["full_attention", "full_attention"]])
def test_a_model_of_few_layers_is_tried_with_their_kinds(kinds: list[str]) -> None:
    model = model_of("olmo3", sliding_window=5, layer_types=kinds, num_hidden_layers=len(kinds))
    assert proof.verdict(model).refusal is None and proof.tiny_values(model.config)["layer_types"] == [kinds[0]] * 2
    assert gk.is_patched(gk.patch(model))


def test_a_refusal_names_the_model_and_the_reason() -> None:
    model = model_of("stablelm")
    reason = r"got StableLmForCausalLM \(model type 'stablelm'\): .*no layer of this StableLmModel called.* Tested are gemma2"
    with pytest.raises(TypeError, match=reason):
        gk.patch(model)
    assert not gk.is_patched(model) and model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "model_type, reason",
    [
        ("openai-gpt", r".*TypeError: model: expected a decoder that takes a KV cache, got OpenAIGPTModel.*"),
        ("falcon", r"its layers fail without a mask \(TypeError: .*\)"),
        ("xmod", r"unpatched, with eager attention, it fails on a text alone \(ValueError: Input language unknown.*\)"),
    ],
)
def test_a_trial_that_fails_says_in_which_pass(model_type: str, reason: str) -> None:
    assert re.fullmatch(reason, families_sweep.tried(model_type).refusal or "")


def test_as_many_ids_that_end_a_text_as_layers_are_no_list_of_layers() -> None:
    model = model_of("olmo3", **{**OLMO3, "layer_types": ["full_attention"] * 3}, num_hidden_layers=3)
    model.config.eos_token_id = [1, 2, 3]
    assert gk.is_patched(gk.patch(model))


def test_one_config_that_cannot_be_tried_says_nothing_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_reached", functools.cache(proof._reached.__wrapped__))
    strange = tiny_model()
    strange.config.attention_span_limit = 4096
    with pytest.raises(TypeError, match="attention_span_limit=4096 in its config may matter"):
        gk.patch(strange)
    assert gk.is_patched(gk.patch(tiny_model()))


def test_each_kind_of_config_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_reached", functools.cache(proof._reached.__wrapped__))
    tried, copied = [], proof.patched_copy
    monkeypatch.setattr(proof, "patched_copy", lambda stock: tried.append(stock) or copied(stock))
    for window in (6, 6, None, None):
        gk.patch(tiny_model(sliding_window=window))
    assert [tiny.config.sliding_window is None for tiny in tried] == [False, True]


def test_a_wrong_result_is_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    from grit_kernels.hf import attention_pass

    model = model_of("olmo3", **OLMO3, rms_norm_eps=1.25e-6)  # a kind that no other test has tried
    honest = attention_pass.window_sizes
    monkeypatch.setattr(
        attention_pass, "window_sizes", lambda causal, window, convention: honest(causal, window and window + 1, "full")
    )
    with pytest.raises(TypeError, match=r"on a tiny random model it is off by 0\.\d+ of the largest value"):
        gk.patch(model)


def test_numbers_that_a_trial_cannot_reach_are_a_reason() -> None:
    model = model_of("olmo3", **OLMO3)
    model.config.attention_span_limit = 4096
    assert proof.verdict(model).refusal == (
        "attention_span_limit=4096 in its config may matter beyond the texts of a trial"
    )


def test_a_tested_family_whose_layers_attend_by_themselves_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = transformers.models.mistral.modeling_mistral.MistralAttention
    monkeypatch.setattr(proof, "_reached", functools.cache(proof._reached.__wrapped__))
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states, *args, **kwargs: (hidden_states, None))
    with pytest.raises(TypeError, match="no layer of this MistralModel called the attention"):
        gk.patch(tiny_model())


@pytest.mark.parametrize("model_type, plain", [("olmo3", True), ("cohere2", False), ("mistral", True)])
def test_heads_that_scale_their_logits_are_known(model_type: str, plain: bool) -> None:
    model = model_of(model_type, **(OLMO3 if model_type != "mistral" else {}))
    if plain:
        gk.hf.check_plain_head(model)
        return
    with pytest.raises(ValueError, match="model: expected logits that are the output of the language-model head"):
        gk.hf.check_plain_head(model)
