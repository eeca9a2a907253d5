"""SamplePack: pad <-> pack, the numbers per sample, refused input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import grit_kernels as gk

MASKS = st.integers(1, 4).flatmap(
    lambda batch: st.integers(0, 6).flatmap(
        lambda length: st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch
        )
    )
)


def as_mask(rows: list[list[bool]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)


@settings(max_examples=60)
@given(MASKS)
def test_pack_then_unpack_keeps_real_tokens_and_zeros_the_padding(rows: list[list[bool]]) -> None:
    mask = as_mask(rows)
    pack = gk.SamplePack.from_mask(mask)
    padded = torch.randn(*mask.shape, 3)
    packed = pack.pack(padded)
    assert torch.equal(packed, padded[mask.bool()])
    assert torch.equal(pack.unpack(packed), padded * mask[..., None])
    assert pack.tokens == len(packed) == int(pack.cu_seqlens[-1])
    assert pack.lengths.tolist() == mask.sum(1).tolist()
    assert pack.max_seqlen == max(pack.lengths.tolist())


@settings(max_examples=40)
@given(MASKS)
def test_positions_start_at_zero_in_every_sample(rows: list[list[bool]]) -> None:
    pack = gk.SamplePack.from_mask(as_mask(rows))
    assert pack.position_ids.tolist() == [i for length in pack.lengths.tolist() for i in range(length)]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_from_lengths_and_from_mask_of_the_same_batch_agree(lengths: list[int]) -> None:
    columns = torch.arange(max(lengths))
    mask = (columns[None] < torch.tensor(lengths)[:, None]).to(torch.int64).reshape(len(lengths), -1)
    causal = torch.tensor([b % 2 == 0 for b in range(len(lengths))])
    a, b = gk.SamplePack.from_lengths(lengths, causal), gk.SamplePack.from_mask(mask, causal)
    for name in ("cu_seqlens", "causal", "instruction_lens", "position_ids", "starts", "lengths"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.tokens == b.tokens and len(a) == len(lengths)
    assert [x.shape[0] for x in a.split(torch.zeros(a.tokens, 2))] == lengths


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 3))
def test_positions_that_start_over_mark_samples_and_keep_each_rows_flag(rows: list[list[int]], first: int) -> None:
    length = max(sum(row) for row in rows)
    filled = [[*row, length - sum(row)] if sum(row) < length else row for row in rows]
    position_ids = torch.stack([torch.cat([torch.arange(first, first + n) for n in row]) for row in filled])
    flags = torch.tensor([b % 2 == 0 for b in range(len(rows))])
    pack = gk.SamplePack.from_position_ids(position_ids, flags)
    # a sample of one token before a sample that starts one higher would look joined; these all start at the same position
    expected = [(n, bool(flags[b])) for b, row in enumerate(filled) for n in row]
    assert list(zip(pack.lengths.tolist(), pack.causal.tolist(), strict=True)) == expected
    hidden = torch.randn(*position_ids.shape, 2)
    assert torch.equal(pack.unpack(pack.pack(hidden)), hidden)


def test_unpack_is_differentiable_and_gives_padding_no_gradient() -> None:
    pack = gk.SamplePack.from_mask(torch.tensor([[0, 1, 1], [1, 0, 1]]))
    packed = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pack.unpack, (packed,))
    padded = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pack.pack, (padded,))


def test_dtypes_are_those_of_the_documentation() -> None:
    pack = gk.SamplePack.from_mask(torch.ones(2, 3), torch.tensor([True, False]), torch.tensor([1, 0]))
    assert pack.cu_seqlens.dtype == pack.instruction_lens.dtype == pack.lengths.dtype == torch.int32
    assert pack.causal.dtype == torch.bool and pack.position_ids.dtype == torch.int64
    assert pack.padded_shape == (2, 3)


def test_a_pack_is_immutable_and_moves_between_devices_with_all_its_fields() -> None:
    pack = gk.SamplePack.from_lengths([2, 1], False, hi=torch.tensor([1, 2, 1]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pack.max_seqlen = 9  # type: ignore[misc]
    meta = pack.to("meta")
    assert meta.device.type == "meta" and meta.hi is not None and meta.hi.device.type == "meta"
    assert meta.max_seqlen == pack.max_seqlen
    options = {"hi": torch.tensor([1, 2, 1]), "instruction_lens": [1, 0], "first_positions": [0, 5]}
    made = gk.SamplePack.from_lengths([2, 1], [True, False], **options, device="meta")
    fields = [value for field in dataclasses.fields(made) if torch.is_tensor(value := getattr(made, field.name))]
    assert made.first_positions is not None and all(value.device.type == "meta" for value in fields)


def test_one_flag_may_be_a_tensor() -> None:
    flag = torch.tensor(True)
    for pack in (
        gk.SamplePack.from_mask(torch.ones(2, 3), flag),
        gk.SamplePack.from_position_ids(torch.zeros(2, 1), flag),
    ):
        assert pack.causal.tolist() == [True, True]


def test_a_mask_of_any_dtype_may_say_what_is_real() -> None:
    for mask in (torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), torch.tensor([[7, 0]])):
        assert gk.SamplePack.from_mask(mask).lengths.tolist() == [1]


Make = Callable[[], Any]
REFUSED: list[tuple[str, str, Make]] = [
    ("empty batch", "lengths: .*empty batch", lambda: gk.SamplePack.from_lengths([], True)),
    ("negative length", "lengths: ", lambda: gk.SamplePack.from_lengths([2, -1], True)),
    ("too many tokens", "lengths: .*2\\*\\*31", lambda: gk.SamplePack.from_lengths([2**31], True)),
    ("flags of another length", "causal: ", lambda: gk.SamplePack.from_lengths([2, 1], [True])),
    ("integer flags", "causal: ", lambda: gk.SamplePack.from_lengths([2], torch.tensor([1]))),
    (
        "flags of more rows than a mask has",
        r"causal: expected a bool or bools \(2,\), got torch.bool \(3,\)",
        lambda: gk.SamplePack.from_mask(torch.ones(2, 3), torch.tensor([True, False, True])),
    ),
    (
        "flags of fewer rows than a mask has",
        r"causal: expected .*\(2,\), got",
        lambda: gk.SamplePack.from_mask(torch.ones(2, 3), torch.tensor([True])),
    ),
    (
        "flags of more rows than positions have",
        r"causal: expected .*\(1,\), got",
        lambda: gk.SamplePack.from_position_ids(torch.arange(3)[None], torch.tensor([True, False])),
    ),
    ("instruction beyond sample", "instruction_lens: ", lambda: gk.SamplePack.from_lengths([2, 1], True, [3, 0])),
    ("negative instruction", "instruction_lens: ", lambda: gk.SamplePack.from_lengths([2, 1], True, [-1, 0])),
    ("instruction count", "instruction_lens: ", lambda: gk.SamplePack.from_lengths([2, 1], True, [1])),
    ("no positions", "position_ids: ", lambda: gk.SamplePack.from_position_ids(torch.zeros(1, 0))),
    (
        "mask to be added to scores",
        r"attention_mask: expected 0 at padding and 1 at real tokens, got torch.float32 \(1, 2\) with other values",
        lambda: gk.SamplePack.from_mask(torch.tensor([[0.0, torch.finfo(torch.float32).min]])),
    ),
    ("mask of halves", "attention_mask: .*other values", lambda: gk.SamplePack.from_mask(torch.tensor([[1.0, 0.5]]))),
    ("mask of -1", "attention_mask: .*other values", lambda: gk.SamplePack.from_mask(torch.tensor([[1, -1]]))),
    ("mask of NaN", "attention_mask: .*other", lambda: gk.SamplePack.from_mask(torch.tensor([[1.0, float("nan")]]))),
    ("mask of one dimension", "attention_mask: ", lambda: gk.SamplePack.from_mask(torch.ones(3))),
    (
        "hi decreases",
        "hi: expected non-decreasing .*in sample 0",
        lambda: gk.SamplePack.from_lengths([2], True, hi=torch.tensor([2, 1])),
    ),
    (
        "hi beyond sample",
        "hi: expected non-decreasing .*in sample 1",
        lambda: gk.SamplePack.from_lengths([1, 1], True, hi=torch.tensor([1, 2])),
    ),
    (
        "hi below zero",
        "hi: expected non-decreasing .*in sample 0",
        lambda: gk.SamplePack.from_lengths([1], True, hi=torch.tensor([-1])),
    ),
    ("hi of another length", "hi: ", lambda: gk.SamplePack.from_lengths([2], True, hi=torch.tensor([1]))),
    ("hi of floats", "hi: ", lambda: gk.SamplePack.from_lengths([1], True, hi=torch.tensor([1.0]))),
]


@pytest.mark.parametrize(("message", "make"), [(m, f) for _, m, f in REFUSED], ids=[name for name, _, _ in REFUSED])
def test_bad_input_is_refused_by_name(message: str, make: Make) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_packs_without_padding_refuse_to_pad_and_wrong_shapes_are_named() -> None:
    pack = gk.SamplePack.from_lengths([2, 1], True)
    with pytest.raises(ValueError, match="from_mask"):
        pack.pack(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="from_mask"):
        pack.unpack(torch.zeros(3, 2))
    padded = gk.SamplePack.from_mask(torch.tensor([[1, 0], [1, 1]]))
    with pytest.raises(ValueError, match=r"padded: expected .*got shape \(2, 3\)"):
        padded.pack(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="packed: expected .*got 2 rows"):
        padded.unpack(torch.zeros(2, 3))
