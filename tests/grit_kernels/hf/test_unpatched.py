"""attn_implementation="grit" alone, without patch(): every supported family gives what its own attention gives.

Without patch() nothing is packed: transformers' padded batches, caches and masks reach the kernels as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import grit_kernels as gk
from tests.grit_kernels.hf.test_families import FAMILIES, IDS, LEFT, RIGHT, WINDOW, WINDOWED, close, run_stock, stock

# GPT-J's attention is not pluggable in transformers: only patch() supports it
PLAIN = sorted(set(FAMILIES) - {"gptj"})
FAMILY = pytest.mark.parametrize("family", PLAIN)
PADDING = pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])


def chosen(family: str) -> Any:
    model = copy.deepcopy(stock(family))
    model.set_attn_implementation("grit")
    assert not gk.is_patched(model)
    return model


@FAMILY
@PADDING
@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_padded_batches_equal_the_eager_model(family: str, mask: Tensor, is_causal: bool) -> None:
    arguments = {"input_ids": IDS, "attention_mask": mask}
    expected = run_stock(family, is_causal, **arguments).logits
    found = chosen(family)(**arguments, is_causal=is_causal, use_cache=False).logits
    close(found[mask.bool()], expected[mask.bool()])


@FAMILY
@PADDING
def test_gradients_equal_those_of_the_eager_model(family: str, mask: Tensor) -> None:
    real, found = mask.bool(), {}
    for name, model in (("eager", copy.deepcopy(stock(family))), ("grit", chosen(family))):
        logits = model(IDS, attention_mask=mask, use_cache=False).logits
        logits[real].log_softmax(-1)[:, 3].sum().backward()
        found[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found["grit"].keys() == found["eager"].keys()
    largest = max(float(grad.abs().max()) for grad in found["eager"].values())
    for key, expected in found["eager"].items():
        assert float((found["grit"][key] - expected).abs().max()) <= 1e-4 * largest, key


@FAMILY
@torch.no_grad()
def test_generation_with_a_cache_equals_the_eager_model(family: str) -> None:
    """Prompts padded on the left, and replies that leave the sliding window behind."""
    options = {"attention_mask": LEFT, "max_new_tokens": 2 * WINDOW, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    found, expected = (model.generate(IDS, **options) for model in (chosen(family), stock(family)))
    assert torch.equal(found.sequences, expected.sequences)
    close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("family", sorted(set(WINDOWED) & set(PLAIN)))
@torch.no_grad()
def test_a_causal_window_of_w_sees_w_keys_and_not_w_minus_1(family: str) -> None:
    """In a model of one layer, changing a key changes a row as long as it is the row itself or one of the W - 1 before."""
    model = chosen(family)
    windowed = [layer for layer in model.model.layers if getattr(layer.self_attn, "sliding_window", None)]
    model.model.layers = torch.nn.ModuleList(windowed[:1] or model.model.layers[:1])
    model.config.num_hidden_layers = 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = ["sliding_attention"]
    ids, changed = IDS[:1], IDS[:1].clone()
    changed[0, 2] = (changed[0, 2] + 1) % 90 + 3
    before, after = (model(x, use_cache=False).logits[0] for x in (ids, changed))
    differs = (before - after).abs().amax(-1) > 1e-6
    assert differs.nonzero()[:, 0].tolist() == list(range(2, 2 + WINDOW))


@pytest.mark.parametrize("causal", [True, False])
def test_rows_without_a_mask_and_positions_are_whole_samples(causal: bool) -> None:
    """Models with absolute positions pass neither to the attention function."""
    attention = ALL_ATTENTION_FUNCTIONS["grit"]
    q, k, v = torch.randn(3, 2, 4, 5, 32).unbind(0)
    found, _ = attention(torch.nn.Module(), q, k, v, None, is_causal=causal)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    close(found, expected.transpose(1, 2))
