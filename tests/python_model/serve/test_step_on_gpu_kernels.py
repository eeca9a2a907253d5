"""The packed step on the Triton kernels: rows that decode keep the split of their keys beside a long text."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import grit_kernels as gk
from python_model import GritLM
from python_model.serve.arena import Arena
from python_model.serve.step import Item, PackedStep
from tests.conftest import Backend

pytest.importorskip("triton")


def arena_of(model: GritLM, device: str) -> Arena:
    config = model.model.config
    arena = Arena(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, 700, 200, device=device)
    for memory in (arena.keys, arena.values):
        memory.fill_(float("nan"))
    return arena


def test_decoding_beside_a_long_text_splits_its_keys_and_changes_no_result(
    served_model: GritLM, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.forced != "triton":
        pytest.skip("kernels of another backend")
    from grit_kernels.attention import triton_forward

    calls: list[tuple[int, int]] = []
    decode = triton_forward.decode_samples

    def noted(q: Any, k: Any, v: Any, out: Any, lse: Any, problem: Any, *rest: Any, **named: Any) -> None:
        calls.append((problem.q_start.shape[0], problem.max_q))
        decode(q, k, v, out, lse, problem, *rest, **named)

    monkeypatch.setattr(triton_forward, "decode_samples", noted)
    source = random.Random(0)
    ids = [source.randrange(3, 300) for _ in range(299)]
    text = [source.randrange(3, 300) for _ in range(70)]
    model = served_model.to(backend.device)
    arena = arena_of(model, backend.device)
    step = PackedStep(model, arena)
    first, second = arena.allocate(310), arena.allocate(310)
    with gk.backend("reference"):  # Triton's interpreter takes minutes for these rows
        step([Item(ids[:299], first), Item(ids[:299], second)])
    with backend():
        hidden, offsets = step([Item(text, causal=False), Item([7], first, 299), Item([8], second, 299)])
    assert offsets == [0, 70, 71, 72]
    hidden = hidden.cpu()
    # one call for all, of which the kernels choose the decoding samples by themselves
    assert calls == [(3, 70)] * model.model.config.num_hidden_layers
    served_model.to("cpu")
    arena = arena_of(served_model, "cpu")
    step, alone = PackedStep(served_model, arena), arena.allocate(310)
    with gk.backend("reference"):
        step([Item(ids[:299], alone)])
        torch.testing.assert_close(hidden[70:71], step([Item([7], alone, 299)])[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(hidden[:70], step([Item(text, causal=False)])[0], rtol=0, atol=1e-5)
