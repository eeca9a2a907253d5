"""Samples that also see tokens of other samples, on a tiny Mistral: equal to one dense mask, and differentiable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from tests.grit_kernels.tiny_mistral import WINDOW, tiny_model

# two documents, a reply that sees both without the second's first token, an ordinary sample, a second reply to the first one
LENGTHS = [5, 4, 6, 3, 2]
CAUSAL = [False, False, True, True, True]
CONTEXTS: list[list[int] | None] = [None, None, [0, 1, 2, 3, 4, 6, 7, 8], None, [0, 1, 2, 3, 4]]
FIRSTS = [0, 4, 8, 0, 5]
IDS = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def pack(**changes: Any) -> gk.SamplePack:
    return gk.SamplePack.from_lengths(LENGTHS, CAUSAL, **{"contexts": CONTEXTS, "first_positions": FIRSTS, **changes})


def dense_mask(window: int | None, causal: list[bool] = CAUSAL) -> Tensor:
    """bool (tokens, tokens): which token sees which, from the definition, token by token."""
    seen = torch.zeros(sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)
    start = 0
    for length, flag, context in zip(LENGTHS, causal, CONTEXTS, strict=True):
        own = list(range(start, start + length))
        keys = [*(context or []), *own]
        for row, token in enumerate(own, len(context or [])):
            for place, key in enumerate(keys):
                near = window is None or (row - place < window if flag else abs(row - place) <= window)
                seen[token, key] = near and (place <= row or not flag)
        start += length
    return seen


def dense_logits(model: Any, window: int | None, causal: list[bool] = CAUSAL) -> Tensor:
    """From transformers' own attention over that mask (its eager one computes the softmax in float32)."""
    model.set_attn_implementation("sdpa")
    mask = torch.where(dense_mask(window, causal), 0.0, -1e30).to(model.dtype)[None, None]
    return model(IDS, attention_mask=mask, position_ids=pack().position_ids[None]).logits


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("causal", [CAUSAL, [True] * 5])
def test_logits_and_gradients_are_those_of_a_dense_mask(window: int | None, causal: list[bool]) -> None:
    stock = tiny_model(sliding_window=window).double()
    model = gk.patch(copy.deepcopy(stock), fuse=False)  # norms as in transformers, which computes them in float32
    weights = torch.randn(1, sum(LENGTHS), 97, dtype=torch.float64)
    want = dense_logits(stock, window, causal)
    made = gk.SamplePack.from_lengths(LENGTHS, causal, contexts=CONTEXTS, first_positions=FIRSTS)
    with gk.backend("reference"):
        got = model(IDS, sample_pack=made).logits
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        for logits in (want, got):
            (logits * weights).sum().backward()
    for (name, a), b in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and float(b.grad.abs().max()) > 0, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-9 * float(b.grad.abs().max()), msg=name)


@torch.no_grad()
def test_a_context_reaches_only_the_samples_that_have_it() -> None:
    model = gk.patch(tiny_model(sliding_window=None))
    before = model(IDS, sample_pack=pack()).logits[0].split(LENGTHS)
    changed = IDS.clone()
    changed[0, 7] = 3 if int(IDS[0, 7]) != 3 else 4  # a token of the second document
    after = model(changed, sample_pack=pack()).logits[0].split(LENGTHS)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False, True, True]
    changed = IDS.clone()
    changed[0, 5] = 3 if int(IDS[0, 5]) != 3 else 4  # the token that only the document itself sees
    after = model(changed, sample_pack=pack()).logits[0].split(LENGTHS)
    own, reply = (float((after[b] - before[b]).abs().max()) for b in (1, 2))
    assert own > 0 and reply > 0  # through the document's other tokens
    without = model(IDS, sample_pack=pack(contexts=None)).logits[0].split(LENGTHS)
    assert float((without[2] - before[2]).abs().max()) > 1e-2 and torch.equal(without[0], before[0])


@torch.no_grad()
def test_float32_kernels_agree_with_the_dense_mask() -> None:
    stock = tiny_model()
    model = gk.patch(copy.deepcopy(stock))
    torch.testing.assert_close(model(IDS, sample_pack=pack()).logits, dense_logits(stock, WINDOW), rtol=1e-4, atol=2e-5)


def test_a_pack_says_where_its_samples_begin() -> None:
    made = pack()
    assert made.position_ids.tolist() == [
        p for first, n in zip(FIRSTS, LENGTHS, strict=True) for p in range(first, first + n)
    ]
    assert made.contexts is not None and made.contexts.lens.tolist() == [0, 0, 8, 0, 5]
    assert made.to("cpu").contexts is not None and torch.equal(made.to("cpu").position_ids, made.position_ids)
    moved = made.to("meta").contexts
    assert moved is not None
    for part in (moved, moved.alone, moved.after):
        assert {x.device.type for x in vars(part).values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert pack(contexts=[None, [], None, None, None]).contexts is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": CONTEXTS[:4]}, "contexts: expected one for each of the 5 samples, got 4"),
        (
            {"contexts": [None, None, [20], None, None]},
            "contexts: expected tokens of samples .* got others for sample 2",
        ),
        ({"contexts": [None, None, [-1], None, None]}, "got others for sample 2"),
        ({"contexts": [None, None, [0], None, [9]]}, "got others for sample 4"),
        ({"contexts": [None, None, [9], None, None]}, "got others for sample 2"),
        ({"hi": torch.ones(20, dtype=torch.int32)}, "hi: expected none with contexts, got both"),
        ({"first_positions": [0, 1]}, "first_positions: expected one int >= 0 for each of 5 samples, got "),
        ({"first_positions": [0, 0, 0, 0, -1]}, "first_positions: expected one int >= 0"),
        ({"first_positions": [0.5] * 5}, "first_positions: expected one int >= 0"),
    ],
)
def test_contexts_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(**changes)


def test_rotary_embeddings_that_change_with_the_length_are_refused() -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = gk.patch(tiny_model(rope_parameters=scaled))
    with pytest.raises(
        ValueError, match="sample_pack: expected no contexts for a MistralModel, whose layers rotate by"
    ):
        model(IDS, sample_pack=pack())
