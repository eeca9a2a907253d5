"""Rows that hold several samples: what tells them apart, in models with and without patch(), and what cannot is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import grit_kernels as gk
from tests.grit_kernels.tiny_mistral import IDS, close, tiny_model

# two samples in one row, each starting over at position 0
ROW = torch.cat([IDS[0, :6], IDS[1, :8]])[None]
STARTS_OVER = torch.cat([torch.arange(6), torch.arange(8)])[None]
NUMBERED = torch.tensor([[1] * 6 + [2] * 8])
ADDED = torch.tensor([[0.0] * 12 + [-1e9] * 2])
OTHER = torch.tensor([[1] * 5 + [2] * 9])
TABLE = {"cu_seq_lens_q": torch.tensor([0, 6, 14], dtype=torch.int32), "max_length_q": 8}


@pytest.fixture
def plain(stock: Any) -> Any:
    """The same weights with attn_implementation="grit", without patch()."""
    model = copy.deepcopy(stock)
    model.set_attn_implementation("grit")
    return model


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_samples_of_one_row_are_kept_apart_by_positions_or_a_numbered_mask(is_causal: bool, packing: bool) -> None:
    model = gk.patch(tiny_model(), packing=packing).model
    parts = [model(ROW[:, s], is_causal=is_causal)[0] for s in (slice(0, 6), slice(6, None))]
    truth = torch.cat(parts, dim=1)
    ones, padded = torch.ones_like(ROW), torch.ones_like(ROW)
    padded[0, -2:] = 0
    for options in (
        {"position_ids": STARTS_OVER},
        {"position_ids": STARTS_OVER, "attention_mask": ones},
        {"position_ids": STARTS_OVER, "attention_mask": ones.bool()},
        {"position_ids": STARTS_OVER, "attention_mask": NUMBERED},
        {"position_ids": STARTS_OVER[0], "attention_mask": ones},
    ):
        close(model(ROW, is_causal=is_causal, **options)[0], truth)
    # positions go on, and only distances count
    close(model(ROW, is_causal=is_causal, attention_mask=NUMBERED)[0], truth)
    cut = model(ROW, is_causal=is_causal, position_ids=STARTS_OVER, attention_mask=padded)[0][:, :-2]
    close(cut, torch.cat([parts[0], model(ROW[:, 6:-2], is_causal=is_causal)[0]], dim=1))
    # rows that share their positions
    rows = torch.cat([ROW, ROW.flip(1)])
    both = torch.cat([model(rows[:, s], is_causal=is_causal)[0] for s in (slice(0, 6), slice(6, None))], dim=1)
    for shared in (STARTS_OVER, STARTS_OVER[0]):
        close(model(rows, is_causal=is_causal, position_ids=shared)[0], both)
        close(model(rows, is_causal=is_causal, position_ids=shared, attention_mask=torch.ones_like(rows))[0], both)
    # beside a pack, too, positions may lack the dimension of the batch
    pack = gk.SamplePack.from_lengths([6, ROW.shape[1] - 6], is_causal)
    close(model(ROW, sample_pack=pack, position_ids=STARTS_OVER[0])[0], truth)


@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_seq_idx_keeps_the_samples_of_a_row_apart(stock: Any, model: Any, is_causal: bool) -> None:
    """What TRL and transformers' DataCollatorWithFlattening send beside positions, or instead of them."""
    truth = torch.cat([stock(r, is_causal=is_causal).logits for r in (IDS[:1, :6], IDS[1:2, :8])], 1)
    call = {"is_causal": is_causal, "use_cache": False, "position_ids": STARTS_OVER, "seq_idx": NUMBERED.int() - 1}
    for extra in ({}, {"attention_mask": torch.ones_like(ROW)}, TABLE):
        close(model(ROW, **call, **extra).logits, truth)
    close(model(ROW, is_causal=is_causal, use_cache=False, seq_idx=NUMBERED - 1).logits, truth)
    padded = model(ROW, **{**call, "seq_idx": NUMBERED - 1}, attention_mask=(NUMBERED == 2).long()).logits
    close(padded[:, 6:], truth[:, 6:])
    with pytest.raises(ValueError, match="seq_idx: expected the samples of cu_seq_lens_q or sample_pack, got others"):
        model(ROW, **{**call, "seq_idx": torch.arange(14)[None] // 5}, **TABLE)
    with pytest.raises(ValueError, match=r"seq_idx: expected integers \(1, 14\)"):
        model(ROW, **{**call, "seq_idx": NUMBERED.float()})
    with pytest.raises(ValueError, match=r"attention_mask: expected none or \(1, 14\) with seq_idx, got .*\(1, 15\)"):
        model(ROW, **call, attention_mask=torch.ones(1, 15, dtype=torch.int64))


@torch.no_grad()
def test_seq_idx_changes_nothing_beside_a_cache(model: Any) -> None:
    mask, numbers = torch.ones_like(IDS), torch.full_like(IDS, 3)
    mask[1, :2] = 0
    for options in ({}, {"attention_mask": mask}):
        truth, cache, seen = model(IDS, **options, use_cache=False).logits, gk.hf.new_cache(), 0
        for end in (6, 7, IDS.shape[1]):
            given = {name: value[:, :end] for name, value in options.items()}
            step = {**given, **gk.hf.cache_keyword(model, cache), "seq_idx": numbers[:, seen:end]}
            found = model(IDS[:, seen:end], **step).logits
            real = mask[:, seen:end].bool() if options else torch.ones_like(IDS[:, seen:end], dtype=torch.bool)
            close(found[real], truth[:, seen:end][real])
            seen = end
    with pytest.raises(ValueError, match="seq_idx: expected one sample per row with a cache, got several"):
        model(ROW, seq_idx=NUMBERED, use_cache=True)


@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_positions_that_start_over_beside_a_mask_are_kept_apart_without_patch(
    stock: Any, plain: Any, is_causal: bool
) -> None:
    mask = torch.ones_like(ROW)
    for real in (14, 12):
        mask[0, real:] = 0
        parts = [stock(ROW[:, s], is_causal=is_causal).logits for s in (slice(0, 6), slice(6, real))]
        found = plain(ROW, attention_mask=mask, position_ids=STARTS_OVER, is_causal=is_causal, use_cache=False).logits
        close(found[:, :real], torch.cat(parts, dim=1))


@torch.no_grad()
def test_positions_that_change_in_place_or_serve_another_batch_are_read_again_without_patch(
    stock: Any, plain: Any
) -> None:
    positions = torch.empty_like(STARTS_OVER)
    for first in (6, 9):
        positions.copy_(torch.cat([torch.arange(first), torch.arange(14 - first)])[None])
        truth = torch.cat([stock(ROW[:, s]).logits for s in (slice(0, first), slice(first, None))], dim=1)
        for batch in (1, 2):
            found = plain(ROW.expand(batch, -1), position_ids=positions, use_cache=False).logits
            close(found, truth.expand(batch, -1, -1))


@torch.inference_mode()
def test_positions_that_change_in_place_in_inference_mode_are_read_again_without_patch(stock: Any, plain: Any) -> None:
    positions = torch.arange(14)[None].clone()
    assert positions.is_inference()
    for first in (6, 9):
        positions.copy_(torch.cat([torch.arange(first), torch.arange(14 - first)])[None])
        truth = torch.cat([stock(ROW[:, s]).logits for s in (slice(0, first), slice(first, None))], dim=1)
        close(plain(ROW, position_ids=positions, use_cache=False).logits, truth)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"attention_mask": torch.zeros(1, 1, 14, 14), "position_ids": STARTS_OVER},
            r"attention_mask: expected a 2-D padding mask, got torch.float32 \(1, 1, 14, 14\)",
        ),
        ({"attention_mask": (OTHER == 2).long(), **TABLE}, "attention_mask: expected none with cu_seq_lens_q"),
        ({"seq_idx": NUMBERED - 1}, "seq_idx: expected the samples of position_ids or cu_seq_lens_q, got others"),
        ({"seq_idx": OTHER, "position_ids": STARTS_OVER}, "seq_idx: expected the samples of position_ids"),
        ({"seq_idx": OTHER, **TABLE}, "seq_idx: expected the samples of position_ids"),
        ({"cu_seq_lens_k": TABLE["cu_seq_lens_q"]}, "cu_seq_lens_q: expected it with cu_seq_lens_k, got none"),
        ({"max_length_k": 8}, "cu_seq_lens_q: expected it with max_length_k, got none"),
        (
            {**TABLE, "cu_seq_lens_k": torch.tensor([0, 5, 14])},
            "cu_seq_lens_k: expected the same samples as cu_seq_lens_q, got others",
        ),
    ],
)
@torch.no_grad()
def test_what_would_be_dropped_without_patch_is_an_error(plain: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        plain(ROW, **call, use_cache=False)


@torch.no_grad()
def test_what_says_the_same_of_samples_twice_changes_nothing_without_patch(stock: Any, plain: Any) -> None:
    truth = torch.cat([stock(ROW[:, s]).logits for s in (slice(0, 6), slice(6, None))], dim=1)
    keys = {"cu_seq_lens_k": torch.tensor([0, 6, 14]), "max_length_k": 8}
    for call in ({"position_ids": STARTS_OVER}, {**TABLE, **keys}):
        close(plain(ROW, **call, seq_idx=NUMBERED.int() - 1, use_cache=False).logits, truth)
    for call in (TABLE, {"seq_idx": NUMBERED}):
        cache = gk.hf.cache_keyword(plain, gk.hf.new_cache())
        plain(ROW, **cache)
        with pytest.raises(ValueError, match=f"^{next(iter(call))}: expected none with a cache"):
            plain(ROW, **cache, **call)
    rows, numbers = torch.cat([ROW, ROW]), torch.cat([NUMBERED, torch.ones_like(NUMBERED)])
    positions = torch.cat([STARTS_OVER, torch.arange(14)[None]])
    mask = (torch.arange(14) < 12).expand(2, -1).long()
    found = plain(rows, position_ids=positions, seq_idx=numbers, attention_mask=mask, use_cache=False).logits
    close(found[:1, :12], truth[:, :12])
    close(found[1:, :12], stock(ROW).logits[:, :12])


@torch.no_grad()
def test_a_compiled_pass_without_patch_refuses_rows_of_several_samples(stock: Any, plain: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    mask, positions = torch.ones_like(IDS), torch.arange(IDS.shape[1])[None]
    mask[1, :2] = 0
    for call in ({}, {"position_ids": positions}, {"position_ids": positions, "attention_mask": mask}):
        found, real = compiled(IDS, **call, use_cache=False).logits, mask.bool() if len(call) == 2 else mask >= 0
        close(found[real], stock(IDS, **call, use_cache=False).logits[real])
    for extra in ({}, {"attention_mask": torch.ones_like(ROW)}):
        with pytest.raises(RuntimeError, match="position_ids: a compiled pass cannot distinguish samples"):
            compiled(ROW, position_ids=STARTS_OVER, use_cache=False, **extra)
    with pytest.raises(Exception, match="seq_idx: a compiled model needs"):
        compiled(ROW, position_ids=positions, seq_idx=NUMBERED, use_cache=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"max_length_q": 8}, "cu_seq_lens_q: expected it with max_length_q, got none"),
        (
            {"attention_mask": torch.ones(1, 14, 14)},
            r"attention_mask: expected \(1, 14\) as 2-D inputs, got \(1, 14, 14\)",
        ),
        ({"attention_mask": ADDED}, "attention_mask: expected 0 at padding and 1 at real tokens, got torch.float32"),
        ({"attention_mask": ADDED, "use_cache": True}, "attention_mask: expected 0 and 1 with a cache"),
        ({"attention_mask": -NUMBERED}, "attention_mask: expected 0 at padding and 1 at real tokens, got torch.int64"),
        ({"attention_mask": ADDED, "seq_idx": NUMBERED}, "attention_mask: expected 0 and 1 beside seq_idx"),
        ({"attention_mask": OTHER, "seq_idx": NUMBERED}, "attention_mask: expected 0 and 1 beside seq_idx"),
        ({"attention_mask": OTHER, **TABLE}, "attention_mask: expected the samples of cu_seq_lens_q or sample_pack"),
        ({"attention_mask": ADDED, **TABLE}, "attention_mask: expected none with packed input"),
        ({"attention_mask": torch.ones(1, 1, 14, 14), **TABLE}, "attention_mask: expected none with packed input"),
        ({"cu_seq_lens_k": TABLE["cu_seq_lens_q"]}, "cu_seq_lens_q: expected it with cu_seq_lens_k"),
        ({"sample_pack": gk.SamplePack.from_lengths([5, 9], True), **TABLE}, "cu_seq_lens_q: expected the samples of"),
        (
            {"attention_mask": torch.ones(1, 1, 1, 14).int()},
            r"attention_mask: expected \(B, T\) with 0 at padding and 1",
        ),
        ({"attention_mask": torch.ones(1, 1, 1, 14).bool()}, "attention_mask: expected a 2-D padding mask"),
        ({"attention_mask": torch.zeros(1, 1, 14, 14)}, "attention_mask: expected a 2-D padding mask"),
        ({"attention_mask": torch.ones(1, 13)}, r"attention_mask: expected \(1, 14\)"),
    ],
)
def test_a_mask_or_table_that_means_something_else_is_refused(model: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        model(ROW, **call)


@torch.no_grad()
def test_a_mask_or_table_that_says_the_same_twice_changes_nothing(model: Any) -> None:
    truth = model(ROW, **TABLE).logits
    pack = gk.SamplePack.from_lengths([6, 8], True)
    for extra in ({"attention_mask": NUMBERED}, {"attention_mask": torch.ones_like(ROW)}, {"sample_pack": pack}):
        close(model(ROW, **TABLE, **extra).logits, truth)


def test_several_samples_in_a_row_of_a_cache_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="position_ids: expected one sample per row with a cache"):
        model(ROW, position_ids=STARTS_OVER, use_cache=True)
    with pytest.raises(ValueError, match="attention_mask: expected 0 and 1 with a cache"):
        model(ROW, attention_mask=NUMBERED, use_cache=True)


def test_a_mask_that_numbers_samples_makes_a_pack_of_them() -> None:
    mask = torch.tensor([[1, 1, 2, 2, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 3]])
    pack = gk.SamplePack.from_mask(mask, torch.tensor([True, False, False]))
    assert pack.lengths.tolist() == [2, 2, 0, 3, 1]
    assert pack.causal.tolist() == [True, True, False, False, False]
    values = torch.arange(15).view(3, 5)
    assert torch.equal(pack.unpack(pack.pack(values)), values * (mask != 0))
    holes = torch.tensor([[1, 1, 0, 1, 1]])
    assert len(gk.SamplePack.from_mask(holes, position_ids=torch.tensor([[0, 1, 0, 2, 3]]))) == 1
    assert len(gk.SamplePack.from_mask(holes, position_ids=torch.arange(5)[None])) == 1
    assert len(gk.SamplePack.from_mask(holes, position_ids=torch.tensor([[0, 1, 0, 0, 1]]))) == 2
    with pytest.raises(ValueError, match="instruction_lens: expected one sample per row"):
        gk.SamplePack.from_mask(mask, instruction_lens=torch.tensor([0, 0, 0]))


@pytest.mark.parametrize(
    "bad",
    [
        {"attention_mask": NUMBERED},
        {"attention_mask": torch.ones_like(ROW), "position_ids": STARTS_OVER},
    ],
    ids=["numbered mask", "positions"],
)
@torch.no_grad()
def test_a_compiled_pass_refuses_rows_of_several_samples(bad: dict[str, Any]) -> None:
    model = gk.patch(tiny_model(num_hidden_layers=1)).model
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask, positions = torch.ones_like(ROW), torch.arange(14)[None]
    good = {name: {"attention_mask": mask, "position_ids": positions}[name] for name in bad}
    close(compiled(ROW, **good)[0], model(ROW, **good)[0])
    with pytest.raises(RuntimeError, match="a compiled pass cannot distinguish"):
        compiled(ROW, **bad)
