"""A patched model with caches: generate() in every way it has, and prefills in one mode continued in the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import grit_kernels as gk
from tests.grit_kernels.tiny_mistral import FLAGS, IDS, MASKS, WINDOW, close, output_cache, tiny_model

GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE.keys())
@pytest.mark.parametrize("mask_name", ["none", "left"])
def test_generate_equals_the_unpatched_model_beyond_the_window(
    stock: Any, model: Any, options: dict[str, Any], mask_name: str
) -> None:
    outputs = []
    for m in (stock, model):
        torch.manual_seed(3)
        arguments = {"max_new_tokens": 10, "do_sample": False, **options}
        outputs.append(m.generate(IDS, attention_mask=MASKS[mask_name], **arguments))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("chunk", [3, WINDOW + 2])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mask_name", ["none", "left"])
def test_chunked_prefill_through_a_sliding_cache_equals_the_unpatched_model(
    stock: Any, model: Any, cache: str, chunk: int, mask_name: str
) -> None:
    assert IDS.shape[1] > 2 * WINDOW
    options: dict[str, Any] = {"prefill_chunk_size": chunk, "cache_implementation": cache}
    arguments = {"attention_mask": MASKS[mask_name], "max_new_tokens": WINDOW + 4, "do_sample": False}
    outputs = [m.generate(IDS, **arguments, **options) for m in (stock, model)]
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], stock.generate(IDS, **arguments))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_prompt_lookup_decoding_equals_the_unpatched_model(window: int | None) -> None:
    stock = tiny_model(sliding_window=window)
    model = gk.patch(copy.deepcopy(stock))
    ids = IDS[:1].repeat(1, 2)
    options = {"max_new_tokens": 14, "do_sample": False}
    found = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(found, stock.generate(ids, prompt_lookup_num_tokens=3, **options))
    assert torch.equal(found, stock.generate(ids, **options))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_assisted_decoding_equals_plain_decoding(window: int | None) -> None:
    stock = tiny_model(sliding_window=window)
    model = gk.patch(copy.deepcopy(stock))
    assistant = gk.patch(tiny_model(sliding_window=window, num_hidden_layers=1))
    expected = stock.generate(IDS[:1], max_new_tokens=14, do_sample=False)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=14, do_sample=False, assistant_model=assistant), expected)


@torch.no_grad()
def test_a_bidirectional_prefill_may_be_continued_causally(stock: Any, model: Any) -> None:
    document, query = IDS[:, :9], IDS[:, 9:]
    caches, logits = [], []
    for m in (stock, model):
        cache = transformers.DynamicCache()  # without a config: keeps all tokens, not just the last window
        m(document, is_causal=False, use_cache=True, **gk.hf.cache_keyword(m, cache))
        caches.append(cache)
        logits.append(m(query, use_cache=True, **gk.hf.cache_keyword(m, cache)).logits)
    close(*logits)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        close(a.keys, b.keys)
        close(a.values, b.values)


@torch.no_grad()
def test_generation_from_a_bidirectional_document_cache_equals_the_unpatched_model(stock: Any, model: Any) -> None:
    outputs = []
    for m in (stock, model):
        cache = transformers.DynamicCache()
        m.model(IDS[:, :9], is_causal=False, use_cache=True, **gk.hf.cache_keyword(m, cache))
        outputs.append(m.generate(IDS, max_new_tokens=6, do_sample=False, **gk.hf.cache_keyword(m, cache)))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_a_mixed_prefill_fills_each_samples_cache_in_its_own_mode(stock: Any, model: Any) -> None:
    cache = transformers.DynamicCache()
    model(IDS, is_causal=FLAGS, use_cache=True, **gk.hf.cache_keyword(model, cache))
    for flag in (True, False):
        alone = transformers.DynamicCache()
        stock(IDS, is_causal=flag, use_cache=True, **gk.hf.cache_keyword(stock, alone))
        for a, b in zip(cache.layers, alone.layers, strict=True):
            close(a.keys[flag == FLAGS], b.keys[flag == FLAGS])


@torch.no_grad()
def test_a_cache_is_built_only_when_asked_for(model: Any) -> None:
    assert output_cache(model.model(IDS)) is None
    assert output_cache(model.model(IDS, use_cache=False)) is None
    assert output_cache(model.model(IDS, use_cache=True)).get_seq_length() == 14


@torch.no_grad()
def test_a_static_cache_that_was_reset_is_empty(model: Any) -> None:
    cache = gk.hf.StaticCache(model.config.num_hidden_layers, IDS.shape[1])
    expected = model(IDS, **gk.hf.cache_keyword(model, cache)).logits
    assert cache.get_seq_length() == IDS.shape[1]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(IDS, **gk.hf.cache_keyword(model, cache)).logits, expected)
