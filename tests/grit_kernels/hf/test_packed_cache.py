"""Packed passes whose samples continue: each reads its keys where they lie in one memory, and gives what it gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from grit_kernels.hf import compat, packed_trial, proof
from tests.conftest import Backend
from tests.grit_kernels.hf.test_proof import ADMITTED, model_of
from tests.grit_kernels.tiny_mistral import tiny_model

ROWS = 80


def memory(geometry: gk.hf.StatesGeometry, device: str = "cpu") -> tuple[Tensor, Tensor]:
    shape = (geometry.layers * ROWS, geometry.heads, geometry.served)
    keys, values = (torch.full(shape, float("nan"), device=device) for _ in range(2))
    return keys, values


def cache_of(keys: Tensor, values: Tensor, layers: int, samples: list[tuple[int, int, int]], **changes: Any) -> Any:
    """``samples``: (first row, tokens before, new tokens) of each."""
    device, base = keys.device, torch.arange(layers)[:, None] * ROWS
    positions = torch.cat([torch.arange(past, past + new) for _, past, new in samples])
    first = torch.cat([torch.full((new,), start) for start, _, new in samples])
    starts = torch.tensor([start for start, _, _ in samples])
    options: dict[str, Any] = {
        "rows": (base + first + positions).to(device),
        "starts": (base + starts).to(device=device, dtype=torch.int32).unbind(),
        "lengths": torch.tensor([past + new for _, past, new in samples], dtype=torch.int32, device=device),
        "longest": max(past + new for _, past, new in samples),
        "positions": positions.to(device),
    }
    return gk.hf.PackedCache(keys, values, **{**options, **changes})


@torch.no_grad()
def test_samples_in_pieces_beside_a_whole_text_equal_each_alone(backend: Backend) -> None:
    model = gk.patch(tiny_model(sliding_window=6)).to(backend.device)
    decoder = compat.decoder_of(model)
    source = torch.Generator().manual_seed(1)
    chat, text = (torch.randint(3, 90, (n,), generator=source).to(backend.device) for n in (19, 11))
    geometry = gk.hf.states_geometry(model)
    keys, values = memory(geometry, backend.device)

    def run(ids: list[Tensor], causal: list[bool], samples: list[tuple[int, int, int]], **changes: Any) -> Tensor:
        pack = gk.SamplePack.from_lengths([len(x) for x in ids], causal, device=backend.device)
        cache = cache_of(keys, values, geometry.layers, samples, **changes)
        keyword = gk.hf.cache_keyword(decoder, cache)
        return decoder(torch.cat(ids)[None], sample_pack=pack, **keyword)[0][0]

    with backend():
        first = run([chat[:15]], [True], [(40, 0, 15)])
        second = run([text, chat[15:18]], [False, True], [(0, 0, 11), (40, 15, 3)])
        third = run([chat[18:]], [True], [(40, 18, 1)])
        # upper bounds per token: the first four see only their past, the others all of the text
        hi = torch.tensor([1, 2, 3, 4, *[11] * 7], dtype=torch.int32, device=backend.device)
        bounded = run([text], [False], [(3, 0, 11)], hi=hi)
        truth = decoder(chat[None], use_cache=False)[0][0], decoder(text[None], is_causal=False, use_cache=False)[0][0]
        pack = gk.SamplePack.from_lengths([11], False, hi=hi, device=backend.device)
        bounded_truth = decoder(text[None], sample_pack=pack)[0][0]
    torch.testing.assert_close(torch.cat([first, second[11:], third]), truth[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(second[:11], truth[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(bounded, bounded_truth, rtol=0, atol=1e-4)
    assert (bounded - second[:11]).abs().max() > 1e-3


OTHERS: dict[str, dict[str, Any]] = {
    **{name: changes for name, changes in ADMITTED.items() if name not in ("deepseek_v3", "gemma4_text")},
    **dict.fromkeys(("gemma2", "gemma3_text", "gpt_neox", "mistral", "phi3", "qwen3"), {}),
    "gptj": {"rotary_dim": 16},
    "gpt2": {"attn_pdrop": 0.0},
    "opt": {"word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_what_patch_admits_runs_packed_passes_over_a_cache(model_type: str) -> None:
    model = gk.patch(model_of(model_type, **OTHERS[model_type]))
    assert gk.hf.packed_cache_refusal(model) is None


def test_states_are_held_in_the_size_that_the_kernels_serve() -> None:
    for size, served in ((20, 32), (32, 32), (36, 40)):
        assert gk.hf.states_geometry(gk.patch(tiny_model(head_dim=size))) == (2, 1, size, served, torch.float32)


def test_layers_with_states_of_several_sizes_have_no_place_in_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def states(heads: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, heads, 1, 32, dtype=dtype), torch.zeros(1, 2, 1, size)

    model = gk.patch(tiny_model())
    for second in (states(4, 32), states(2, 48), states(2, 32, torch.bfloat16)):
        monkeypatch.setattr(compat, "cached_states", lambda cache, second=second: [states(2, 32), second])
        with pytest.raises(
            ValueError, match=r"^model: expected layers that all keep keys and values of one .*\(2, 32\)"
        ):
            gk.hf.states_geometry(model)
    monkeypatch.setattr(compat, "cached_states", lambda cache: [states(2, 48)] * 3)
    assert gk.hf.states_geometry(model) == (3, 2, 48, 48, torch.float32)


def test_layers_whose_heads_differ_are_a_refusal() -> None:
    refusal = gk.hf.packed_cache_refusal(gk.patch(model_of("gemma4_text", **ADMITTED["gemma4_text"])))
    assert "expected layers that all keep keys and values of one number of heads, size and dtype" in str(refusal)


def test_latent_attention_whose_keys_are_made_from_what_is_stored_is_a_refusal() -> None:
    model = gk.patch(model_of("deepseek_v3", **ADMITTED["deepseek_v3"]))
    assert "key: expected what a PackedCache returned" in str(gk.hf.packed_cache_refusal(model))


def test_layers_that_carry_a_state_are_a_refusal() -> None:
    model = model_of("lfm2", layer_types=["conv", "full_attention"])
    if compat.cache_argument(type(model).forward) != "cache" and proof.verdict(model).refusal is not None:
        pytest.skip("a transformers before 5.24, which calls some layers of lfm2 otherwise: refused by patch()")
    gk.patch(model)
    assert "Lfm2ShortConv" in str(gk.hf.packed_cache_refusal(model))
    with pytest.raises(ValueError, match="^model: expected layers that keep keys and values, got Lfm2ShortConv"):
        gk.hf.states_geometry(model)


@pytest.mark.parametrize("changed", ["key", "value"])
def test_a_layer_that_changes_states_after_storing_them_is_a_refusal(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.olmo2 import modeling_olmo2

    own = modeling_olmo2.Olmo2Attention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None:
            update = cache.update

            def other(*states: Any, **rest: Any) -> tuple[Tensor, Tensor]:
                keys, values = update(*states, **rest)
                return (keys * 1.0, values) if changed == "key" else (keys, values * 1.0)

            cache.update = other
        try:
            return own(self, *args, **kwargs)
        finally:
            if cache is not None:
                del cache.update

    model = gk.patch(model_of("olmo2", num_key_value_heads=4, head_dim=16))
    monkeypatch.setattr(packed_trial, "_tried", packed_trial._tried.__wrapped__)
    monkeypatch.setattr(modeling_olmo2.Olmo2Attention, "forward", forward)
    assert f"{changed}: expected what a PackedCache returned" in str(gk.hf.packed_cache_refusal(model))


def test_wrong_results_of_a_trial_are_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gk.patch(model_of("olmo2", num_key_value_heads=4, head_dim=16))
    monkeypatch.setattr(packed_trial, "_tried", packed_trial._tried.__wrapped__)
    monkeypatch.setattr(proof, "TOLERANCE", 1e-12)
    assert "are off by" in str(gk.hf.packed_cache_refusal(model))


HEADS: dict[str, dict[str, Any]] = {
    "cohere2": {**ADMITTED["cohere2"], "logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 4.0},
    "gptj": {"rotary_dim": 16},
    "gpt2": {"attn_pdrop": 0.0},  # whose head also asks for cross-attentions
    "opt": {"word_embed_proj_dim": 64},  # whose decoder lies deeper
    "phi": {"head_dim": 16, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("model_type, changes", HEADS.items(), ids=HEADS)
@torch.no_grad()
def test_own_logits_are_those_of_the_whole_model(model_type: str, changes: dict[str, Any]) -> None:
    model = gk.patch(model_of(model_type, **changes))
    ids = torch.arange(3, 20)[None]
    states = compat.decoder_of(model)(ids, use_cache=False)[0][0]
    torch.testing.assert_close(gk.hf.own_logits(model, states), model(ids, use_cache=False).logits[0])
    assert compat.decoder_of(model)(ids, use_cache=False)[0][0].equal(states), "the model keeps its decoder"


def test_calls_and_caches_that_do_not_belong_together_are_refused() -> None:
    model = gk.patch(tiny_model())
    decoder, geometry = compat.decoder_of(model), gk.hf.states_geometry(model)
    keys, values = memory(geometry)
    cache, ids = cache_of(keys, values, geometry.layers, [(0, 0, 4)]), torch.arange(3, 7)[None]
    keyword, pack = gk.hf.cache_keyword(decoder, cache), gk.SamplePack.from_lengths([4], True)
    with pytest.raises(ValueError, match="^sample_pack: expected one with a PackedCache, got none"):
        decoder(ids, **keyword)
    with pytest.raises(
        ValueError, match=r"^cache: expected lengths \(2,\) and positions \(4,\) as the sample_pack, got \(1,\)"
    ):
        decoder(ids, sample_pack=gk.SamplePack.from_lengths([1, 3], True), **keyword)
    bounded = gk.SamplePack.from_lengths([4], True, hi=torch.tensor([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="^sample_pack: expected no upper bounds and no contexts with a PackedCache"):
        decoder(ids, sample_pack=bounded, **keyword)
    with pytest.raises(ValueError, match="^cache, use_cache: expected none or a PackedCache"):
        decoder(ids, sample_pack=pack, **gk.hf.cache_keyword(decoder, gk.hf.new_cache()))
    with pytest.raises(ValueError, match="^values: expected "):
        cache_of(keys, values[1:], geometry.layers, [(0, 0, 4)])
    with pytest.raises(ValueError, match="^keys: expected heads of size 32, got 20"):
        cache_of(keys[..., :20], values[..., :20], geometry.layers, [(0, 0, 4)])
    with pytest.raises(ValueError, match=r"^rows: expected \(2, tokens\), one row per layer"):
        cache_of(keys, values, geometry.layers, [(0, 0, 4)], rows=torch.zeros(1, 4).long())
    with pytest.raises(ValueError, match=r"^starts: expected \(1,\) per layer"):
        cache_of(keys, values, geometry.layers, [(0, 0, 4)], starts=[torch.zeros(2).int()] * 2)


def test_a_pass_that_needs_gradients_is_refused() -> None:
    """The memory outlives the pass: it would keep the graph of every pass."""
    model = gk.patch(tiny_model())
    decoder, geometry = compat.decoder_of(model), gk.hf.states_geometry(model)
    keys, values = memory(geometry)
    cache, pack = cache_of(keys, values, geometry.layers, [(0, 0, 4)]), gk.SamplePack.from_lengths([4], True)
    with pytest.raises(ValueError, match=r"^cache: expected a pass under torch.no_grad\(\) with a PackedCache"):
        decoder(torch.arange(3, 7)[None], sample_pack=pack, **gk.hf.cache_keyword(decoder, cache))
    assert not keys.requires_grad
