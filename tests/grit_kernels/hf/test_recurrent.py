"""Layers that carry a state from token to token begin anew with every sample of a pack."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import grit_kernels as gk
from grit_kernels.hf import compat, proof, recurrent
from tools import families_sweep

TYPES = ("qwen3_5_text", "qwen3_next", "lfm2", "olmo_hybrid", "granitemoehybrid", "falcon_h1")
"""Gated delta rule, short convolution, Mamba 2, and Mamba 2 beside attention in one layer."""
LENGTHS = (7, 1, 19, 4)
FLAGS = torch.tensor([True, False, False, True])


@functools.cache
def stock(model_type: str) -> Any:
    """A tiny unpatched model with large random weights; not to be changed."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    shape = families_sweep.representative_model(model_type)
    config = type(shape.config)(**proof.tiny_values(shape.config))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = type(shape)(config).eval().float()
    with torch.no_grad():
        proof.draw_weights(model)
    return model


def patched(model_type: str) -> Any:
    model = stock(model_type)
    if compat.cache_argument(type(model).forward) != "cache" and proof.verdict(model).refusal is not None:
        pytest.skip(f"a transformers before 5.24, which calls some layers of {model_type} otherwise: refused")
    return gk.patch(copy.deepcopy(model))


@functools.cache
def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (1, length), generator=generator) for length in LENGTHS]


def alone(model_type: str, index: int, causal: bool) -> Tensor:
    """States (tokens, hidden) of one text in the unpatched decoder."""
    return proof.alone_in_stock(compat.decoder_of(stock(model_type)), texts()[index], causal)[0]


def pack() -> gk.SamplePack:
    return gk.SamplePack.from_lengths(LENGTHS, FLAGS)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_sample_in_a_pack_equals_the_text_alone(model_type: str) -> None:
    decoder = compat.decoder_of(patched(model_type))
    ids = torch.cat(texts(), dim=1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    by_pack = pack().split(decoder(ids, sample_pack=pack())[0][0])
    by_positions = pack().split(decoder(ids, position_ids=positions, is_causal=True)[0][0])
    for index, flag in enumerate(FLAGS.tolist()):
        assert close(by_pack[index], alone(model_type, index, flag))
        assert close(by_positions[index], alone(model_type, index, True))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(model_type: str, side: str) -> None:
    decoder = compat.decoder_of(patched(model_type))
    longest = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts()):
        place = slice(0, LENGTHS[row]) if side == "right" else slice(longest - LENGTHS[row], longest)
        ids[row, place], mask[row, place] = text[0], 1
    states = decoder(ids, attention_mask=mask, is_causal=FLAGS)[0]
    for row, flag in enumerate(FLAGS.tolist()):
        assert close(states[row][mask[row].bool()], alone(model_type, row, flag))


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2"])
def test_gradients_of_a_pack_are_those_of_separate_runs(model_type: str) -> None:
    separate, together = copy.deepcopy(stock(model_type)), patched(model_type)
    weights = [torch.randn(length, 64, generator=torch.Generator().manual_seed(2)) for length in LENGTHS]
    plain = compat.decoder_of(separate)
    for index, flag in enumerate(FLAGS.tolist()):
        plain.config.is_causal = flag
        (plain(texts()[index], use_cache=False)[0][0] * weights[index]).sum().backward()
    states = compat.decoder_of(together)(torch.cat(texts(), dim=1), sample_pack=pack())[0][0]
    (states * torch.cat(weights)).sum().backward()
    expected = {name: p.grad for name, p in separate.named_parameters() if p.grad is not None}
    assert any("conv" in name for name in expected)
    for name, parameter in together.named_parameters():
        if name in expected:
            assert parameter.grad is not None and close(parameter.grad, expected[name]), name


@torch.no_grad()
def test_without_the_layout_a_trial_notices_that_samples_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gk.unpatch(patched("lfm2"))
    model.config.norm_eps = 1.5e-5  # a kind that was not tried before
    monkeypatch.setattr(recurrent, "attach", lambda decoder: None)
    assert "off by" in str(proof.verdict(model).refusal)


@torch.no_grad()
def test_unpatching_removes_the_layout_and_copies_keep_it() -> None:
    model = patched("lfm2")
    ids = torch.cat(texts(), dim=1)
    states = compat.decoder_of(model)(ids, sample_pack=pack())[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), gk.patch(gk.unpatch(model))):
        assert torch.equal(compat.decoder_of(other)(ids, sample_pack=pack())[0], states)
    gk.unpatch(model)
    modules = list(model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any(m._forward_hooks_with_kwargs or m._forward_pre_hooks_with_kwargs for m in modules)


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "granitemoehybrid"])
@torch.no_grad()
def test_generation_equals_that_of_the_unpatched_model(model_type: str) -> None:
    model = patched(model_type)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.int64), texts()[0]], dim=1)
    ids = torch.cat([ids, texts()[2][:, :11]])
    mask = (ids != 0).long()
    expected = copy.deepcopy(stock(model_type)).generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


@torch.no_grad()
def test_a_cache_without_room_for_states_is_refused() -> None:
    decoder = compat.decoder_of(patched("lfm2"))
    with pytest.raises(ValueError, match=r"cache: expected one with room for the states .*, got DynamicCache"):
        decoder(texts()[0], cache=compat.new_cache())
    states = decoder(texts()[0], cache=compat.new_cache(config=decoder.config))[0]
    assert close(states[0], alone("lfm2", 0, True))


def test_nothing_is_read_back() -> None:
    decoder = compat.decoder_of(patched("lfm2")).to("meta")
    states = decoder(torch.cat(texts(), dim=1).to("meta"), sample_pack=pack().to("meta"))[0]
    assert states.device.type == "meta" and states.shape == (1, sum(LENGTHS), 64)
