"""A patched model under torch.compile: one graph per pass, shared by batches of any size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import grit_kernels as gk
from tests.grit_kernels.tiny_mistral import FLAGS, IDS, MASKS, WINDOW, close, positions, tiny_model

RIGHT = MASKS["right"]
REAL = RIGHT.bool()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_pass_compiles_into_one_graph_with_its_gradients(model: Any, layout: str, compiler: str) -> None:
    pack = gk.SamplePack.from_mask(RIGHT, FLAGS)

    def packed() -> Tensor:
        return model.model(pack.pack(IDS)[None], sample_pack=pack).last_hidden_state[0]

    def padded() -> Tensor:
        return model.model(IDS, attention_mask=RIGHT, is_causal=FLAGS).last_hidden_state

    torch._dynamo.reset()
    parameters = list(model.model.parameters())
    compiled = torch.compile(packed if layout == "packed" else padded, backend=compiler, fullgraph=True)
    a, b = compiled(), packed()
    a = a if layout == "packed" else a[REAL]
    close(a, b)
    grads = [torch.autograd.grad(x.square().mean(), parameters) for x in (a, b)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_compiled_model_itself_takes_flags_and_any_padding(model: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("left", "holes"):
        real, arguments = MASKS[name].bool(), {"attention_mask": MASKS[name], "is_causal": FLAGS}
        close(compiled(IDS, **arguments).logits[real], model(IDS, **arguments).logits[real])


@torch.no_grad()
def test_packs_and_padded_batches_of_any_size_share_their_graphs(model: Any) -> None:
    def compiled_model() -> tuple[CompileCounter, Any]:
        torch._dynamo.reset()
        counter = CompileCounter()
        return counter, torch.compile(model, backend=counter, fullgraph=True)

    counter, compiled = compiled_model()
    for lengths in ([5, 9], [7, 3], [20, 11], [3, 5, 8], [9, 4, 1], [7] * 4, [6] * 5):
        pack = gk.SamplePack.from_lengths(lengths, torch.arange(len(lengths)) % 2 == 0)
        ids = torch.randint(3, 97, (1, pack.tokens))
        close(compiled(ids, sample_pack=pack).logits, model(ids, sample_pack=pack).logits)
    assert counter.frame_count <= 3  # the first sizes, then lengths, then the number of samples became symbols
    counter, compiled = compiled_model()
    for batch, length in ((2, 9), (2, 12), (3, 14), (4, 7), (4, 20)):
        ids = torch.randint(3, 97, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        arguments = {"attention_mask": mask, "is_causal": torch.arange(batch) % 2 == 0}
        close(compiled(ids, **arguments).logits[mask.bool()], model(ids, **arguments).logits[mask.bool()])
    assert counter.frame_count <= 3


@pytest.mark.slow
def test_gradients_of_packs_of_any_size_share_their_graphs(model: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    parameters = list(model.model.parameters())
    for lengths in ([5, 9], [7, 3], [20, 11, 4], [3, 5, 8, 2]):
        pack = gk.SamplePack.from_lengths(lengths, torch.arange(len(lengths)) % 2 == 0)
        ids = torch.randint(3, 97, (1, pack.tokens))
        losses = [m(ids, sample_pack=pack).last_hidden_state.square().mean() for m in (compiled, model.model)]
        for a, b in zip(*(torch.autograd.grad(x, parameters) for x in losses), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, WINDOW])
def test_compiled_steps_over_a_static_cache_equal_the_unpatched_model(window: int | None) -> None:
    torch._dynamo.reset()
    stock = tiny_model(sliding_window=window)
    model = gk.patch(copy.deepcopy(stock))
    counter = CompileCounter()
    logits: list[list[Tensor]] = [[], []]
    for found, prefill, step in (
        (logits[0], stock, stock),
        (logits[1], model, torch.compile(model, backend=counter, fullgraph=True)),
    ):
        mask = MASKS["left"]
        cache = transformers.StaticCache(stock.config, max_cache_len=32)
        options = {**gk.hf.cache_keyword(stock, cache), "use_cache": True}
        prefill(IDS, attention_mask=mask, position_ids=positions(mask), **options)
        for i in range(5):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            where = (mask.sum(1) - 1)[:, None]
            found.append(step(IDS[:, i : i + 1], attention_mask=mask, position_ids=where, **options).logits)
    close(*map(torch.cat, logits))
    assert counter.frame_count <= 2


@torch.no_grad()
def test_what_a_compiled_pass_would_have_to_read_back_is_refused(model: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    pack = gk.SamplePack.from_mask(RIGHT, FLAGS)
    ids, positions = pack.pack(IDS)[None], pack.position_ids[None]
    for name, arguments in (
        ("position_ids", {"position_ids": positions}),
        ("cu_seq_lens_q", {"position_ids": positions, "cu_seq_lens_q": pack.cu_seqlens}),
    ):
        with pytest.raises(Exception, match=f"{name}: a compiled pass cannot"):
            compiled(ids, **arguments)
