"""Code written for the PyPI package gritlm runs with this class, and gets its embeddings.

Runs where that package is installed (``pip install --no-deps gritlm==1.0.2``).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from python_model import GritLM

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gritlm") is None, reason="compares with the package gritlm")

# unequal lengths, more than one batch of the reference's padding, words that merge across the border left out
TEXTS = [
    "A river flows.",
    "def add(first, second):",
    "x",
    "The capital of France is a city with a river in it. " * 3,
] * 2
PREFIXES = ["", "<|embed|>\n", "<|user|>\nFind the text\n<|embed|>\n"]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))


def reference(path: Path, **options: Any) -> Any:
    from gritlm import GritLM as Reference

    return Reference(str(path), device="cpu", dtype=torch.float32, **options)


@pytest.fixture(params=["with BOS", "without BOS"])
def folder(request: pytest.FixtureRequest, checkpoint: Path, checkpoint_without_bos: Path) -> Path:
    """Tokenizers that put BOS in front by themselves, as the published models' does, or do not."""
    return checkpoint if request.param == "with BOS" else checkpoint_without_bos


@pytest.mark.parametrize("mode", ["unified", "embedding"])
@pytest.mark.parametrize("method", ["mean", "weightedmean", "lasttoken", "cls"])
@pytest.mark.parametrize(("attn", "allowed"), [("cccc", 1e-5), ("bbcc", 1e-3)])
def test_embeddings_equal_the_packages(folder: Path, mode: str, method: str, attn: str, allowed: float) -> None:
    options: dict[str, Any] = {"mode": mode, "pooling_method": method, "attn": attn}
    want = reference(folder, **options)
    ours = GritLM(folder, device="cpu", dtype=torch.float32, instruction_count="reference", **options)
    for prefix in PREFIXES:
        for add_special_tokens in (True, False):
            for embed_instruction in (False, True):
                call: dict[str, Any] = {
                    "instruction": prefix,
                    "add_special_tokens": add_special_tokens,
                    "embed_instruction": embed_instruction,
                }
                assert relative(ours.encode(TEXTS, **call), want.encode(TEXTS, batch_size=4, **call)) < allowed
    np.testing.assert_allclose(ours.encode(TEXTS[0]), want.encode(TEXTS[0]), atol=1e-4)


def test_the_other_arguments_and_methods_behave_as_in_the_package(folder: Path) -> None:
    options: dict[str, Any] = {"attn": "cccc", "normalized": False}
    want = reference(folder, **options)
    ours = GritLM(folder, device="cpu", dtype=torch.float32, **options)
    corpus = [{"title": "A", "text": "river"}, {"text": "flows."}]
    assert relative(ours.encode_corpus(corpus), want.encode_corpus(corpus)) < 1e-5
    assert relative(ours.encode_queries(TEXTS), want.encode_queries(TEXTS)) < 1e-5
    assert relative(ours.encode(TEXTS, max_length=9), want.encode(TEXTS, max_length=9)) < 1e-5
    got_tensor, want_tensor = (m.encode(TEXTS, convert_to_tensor=True, recast=True) for m in (ours, want))
    assert got_tensor.dtype == want_tensor.dtype and got_tensor.shape == want_tensor.shape
    (got, cache), (expected, reference_cache) = (m.encode(TEXTS[:1], get_cache=True) for m in (ours, want))
    assert relative(got, expected) < 1e-5
    for mine, theirs in zip(cache.layers, reference_cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-5)
    ids = torch.tensor([[1, 5, 9]])
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **arguments), want.generate(ids, **arguments))
    assert ours.tokenizer.padding_side == want.tokenizer.padding_side == "right"


def test_the_default_count_differs_only_where_tokens_merge_over_the_border(folder: Path) -> None:
    default = GritLM(folder, device="cpu", dtype=torch.float32)
    counted = GritLM(folder, device="cpu", dtype=torch.float32, instruction_count="reference")
    for prefix in PREFIXES:
        assert relative(default.encode(TEXTS, instruction=prefix), counted.encode(TEXTS, instruction=prefix)) < 1e-6


@pytest.mark.model
@pytest.mark.parametrize("method", ["mean", "weightedmean", "lasttoken", "cls"])
@pytest.mark.parametrize(("attn", "allowed"), [("cccc", 1e-5), ("bbcc", 1e-3)])
def test_embeddings_of_the_small_model_equal_the_packages(method: str, attn: str, allowed: float) -> None:
    from python_model.corpora.small_model import fetch_small_model

    folder = fetch_small_model()
    texts = ["Paris is the capital of France.", "Rust", "A river flows through the city. " * 6]
    options: dict[str, Any] = {"pooling_method": method, "attn": attn}
    want = reference(folder, **options)
    ours = GritLM(folder, device="cpu", dtype=torch.float32, instruction_count="reference", **options)
    for prefix in PREFIXES:
        for add_special_tokens in (True, False):
            call: dict[str, Any] = {"instruction": prefix, "add_special_tokens": add_special_tokens}
            assert relative(ours.encode(texts, **call), want.encode(texts, **call)) < allowed
