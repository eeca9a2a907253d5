"""visibility.py against its definition: plain loops, exhaustively over all small samples and windows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from grit_kernels import visibility
from grit_kernels.visibility import TileRange, dense_mask, key_range, row_range, tile_keys, tile_rows

LENGTHS = range(6)
DISTANCES = (0, 1, 2, 3, 5, 11)  # 11 exceeds every distance of two positions here
SHAPES = [(q, k, left, right) for q, k in product(LENGTHS, LENGTHS) for left, right in product(DISTANCES, DISTANCES)]


def sees(row: int, key: int, len_q: int, len_k: int, left: int, right: int) -> bool:
    """The rule as the documentation states it."""
    position = row + len_k - len_q
    return max(0, position - left) <= key < min(len_k, position + right + 1)


def visible(len_q: int, len_k: int, left: int, right: int) -> list[list[bool]]:
    return [[sees(r, j, len_q, len_k, left, right) for j in range(len_k)] for r in range(len_q)]


def test_dense_mask_equals_the_rule_pair_by_pair() -> None:
    for len_q, len_k, left, right in SHAPES:
        expected = torch.tensor(visible(len_q, len_k, left, right), dtype=torch.bool).reshape(len_q, len_k)
        assert torch.equal(dense_mask(len_q, len_k, left, right), expected), (len_q, len_k, left, right)


def test_dense_mask_with_hi_replaces_only_the_right_bound() -> None:
    for len_q, len_k, left in product(range(4), range(4), DISTANCES):
        for hi in product(range(-1, len_k + 2), repeat=len_q):
            if list(hi) != sorted(hi):
                continue
            mask = dense_mask(len_q, len_k, left, 0, torch.tensor(hi, dtype=torch.int32))
            for r, j in product(range(len_q), range(len_k)):
                assert bool(mask[r, j]) == (max(0, r + len_k - len_q - left) <= j < hi[r])


def test_key_range_is_exactly_the_visible_keys_for_ints_and_tensors() -> None:
    for len_q, len_k, left, right in SHAPES:
        for r in range(len_q):
            position = r + len_k - len_q
            lo, hi = key_range(position, len_k, left, right)
            assert [j for j in range(len_k) if sees(r, j, len_q, len_k, left, right)] == list(range(lo, hi))
            as_tensors = key_range(torch.tensor(position), torch.tensor(len_k), torch.tensor(left), torch.tensor(right))
            assert (lo, hi) == (int(as_tensors[0]), int(as_tensors[1]))


def test_bounds_never_decrease_with_the_row() -> None:
    for len_q, len_k, left, right in SHAPES:
        bounds = [key_range(r + len_k - len_q, len_k, left, right) for r in range(len_q)]
        assert [lo for lo, _ in bounds] == sorted(lo for lo, _ in bounds)
        assert [hi for _, hi in bounds] == sorted(hi for _, hi in bounds)


def test_row_range_is_the_transpose_of_key_range() -> None:
    for len_q, len_k, left, right in SHAPES:
        for j in range(len_k):
            first, last = row_range(j, len_q, len_k, left, right)
            rows = [r for r in range(len_q) if sees(r, j, len_q, len_k, left, right)]
            assert rows == list(range(first, last)), (len_q, len_k, left, right, j)


def check_tile(tile: TileRange, columns: list[list[bool]]) -> None:
    """``columns[x]``: visibility of index x (key or row) for every member of the tile."""
    touched = [x for x, seen in enumerate(columns) if any(seen)]
    free = [x for x, seen in enumerate(columns) if all(seen)]
    assert touched == (list(range(tile.begin, tile.end)) if touched else [])
    assert free == list(range(tile.full_begin, tile.full_end))
    for block in (1, 2, 3, 4):
        blocks = visibility.in_blocks(tile, block)
        assert blocks.begin <= blocks.full_begin <= blocks.full_end <= blocks.end
        for n in range(len(columns) // block + 2):
            members = range(n * block, (n + 1) * block)
            whole = all(x < len(columns) and all(columns[x]) for x in members)
            if any(x in touched for x in members):
                assert blocks.begin <= n < blocks.end, "a block with a visible pair is skipped"
            if blocks.full_begin <= n < blocks.full_end:
                assert whole, "an unmasked block holds an invisible pair"
            elif touched:
                assert not whole, "a block that needs no mask is masked"
        if not touched:
            assert blocks.begin == blocks.end, "blocks of a tile that sees nothing"


@pytest.mark.parametrize("len_q", LENGTHS)
def test_tiles_of_rows_touch_all_visible_keys_and_mask_only_edges(len_q: int) -> None:
    for len_k, left, right in product(LENGTHS, DISTANCES, DISTANCES):
        mask = visible(len_q, len_k, left, right)
        for first in range(len_q):
            for last in range(first + 1, len_q + 1):
                tile = tile_keys(first, last, len_q, len_k, left, right)
                check_tile(tile, [[mask[r][j] for r in range(first, last)] for j in range(len_k)])


@pytest.mark.parametrize("len_k", LENGTHS)
def test_tiles_of_keys_touch_all_rows_that_see_them_and_mask_only_edges(len_k: int) -> None:
    for len_q, left, right in product(LENGTHS, DISTANCES, DISTANCES):
        mask = visible(len_q, len_k, left, right)
        for first in range(len_k):
            for last in range(first + 1, len_k + 1):
                tile = tile_rows(first, last, len_q, len_k, left, right)
                check_tile(tile, [[mask[r][j] for j in range(first, last)] for r in range(len_q)])


def splits(tokens: int) -> list[list[int]]:
    """All ways to cut ``tokens`` into two samples, empty ones included, and three with an empty one in the middle."""
    return [[n, tokens - n] for n in range(tokens + 1)] + [[tokens // 2, 0, tokens - tokens // 2]]


def table(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("right", [-1, 0, 1, 2, 9])
def test_span_hi_equals_its_formula_for_every_pattern_of_runs(right: int) -> None:
    for tokens in range(6):
        for lengths, marks in product(splits(tokens), product([False, True], repeat=tokens)):
            expected, start = [], 0
            for length in lengths:
                inside = marks[start : start + length]
                for i in range(length):
                    end = i
                    while inside[i] and end < length and inside[end]:
                        end += 1
                    window = length if right == -1 else i + right + 1
                    expected.append(max(i + 1, min(end if inside[i] else 0, window)))
                start += length
            hi = visibility.span_hi(table(lengths), torch.tensor(marks, dtype=torch.bool), right)
            assert hi.dtype == torch.int32
            assert hi.tolist() == expected, (lengths, marks)


@pytest.mark.parametrize("right", [-1, 0, 1, 3])
def test_prefix_lm_hi_is_max_of_causal_and_prefix_inside_the_window(right: int) -> None:
    for lengths in ([4, 3], [0, 5], [5, 0, 2], [1]):
        for prefixes in product(range(7), repeat=len(lengths)):
            expected = [
                max(i + 1, min(prefix, length, length if right == -1 else i + right + 1))
                for length, prefix in zip(lengths, prefixes, strict=True)
                for i in range(length)
            ]
            hi = visibility.prefix_lm_hi(table(lengths), torch.tensor(prefixes), sum(lengths), right)
            assert hi.tolist() == expected


@pytest.mark.parametrize("right", [-1, 0, 2])
def test_causal_instruction_hi_is_causal_first_and_bidirectional_after(right: int) -> None:
    for lengths in ([4, 3], [0, 5], [5, 0, 2]):
        for skips in product(range(6), repeat=len(lengths)):
            expected = []
            for length, skip in zip(lengths, skips, strict=True):
                for i in range(length):
                    whole = length if right == -1 else min(length, i + right + 1)
                    expected.append(i + 1 if i < skip else whole)
            hi = visibility.causal_instruction_hi(table(lengths), torch.tensor(skips), sum(lengths), right)
            assert hi.tolist() == expected


MARKS, ENDS, LENS = torch.ones(5, dtype=torch.bool), table([2, 3]), torch.tensor([1, 2])
REFUSED: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "marks of fewer tokens": ("cu_seqlens: expected .* from 0 to 3, got", lambda: visibility.span_hi(ENDS, MARKS[:3])),
    "marks of more tokens": (
        "cu_seqlens: expected .* from 0 to 6",
        lambda: visibility.span_hi(ENDS, MARKS.repeat(2)[:6]),
    ),
    "integer marks": ("bidirectional: expected .*got torch.int64", lambda: visibility.span_hi(ENDS, MARKS.long())),
    "window below -1": ("right: expected .*got -3", lambda: visibility.span_hi(ENDS, MARKS, right=-3)),
    "more tokens": ("cu_seqlens: expected .* from 0 to 7", lambda: visibility.prefix_lm_hi(ENDS, LENS, 7)),
    "one prefix": (r"prefix_lens: expected .*\(2,\), got", lambda: visibility.prefix_lm_hi(ENDS, LENS[:1], 5)),
    "three prefixes": ("prefix_lens: expected", lambda: visibility.prefix_lm_hi(ENDS, LENS.repeat(2)[:3], 5)),
    "prefixes as a column": (
        r"instruction_lens: expected .*got torch.int64 \(2, 1\)",
        lambda: visibility.causal_instruction_hi(ENDS, LENS[:, None], 5),
    ),
}


@pytest.mark.parametrize(("message", "make"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_by_name(message: str, make: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def brute_transpose(hi: list[int], q: list[tuple[int, int]], k: list[tuple[int, int]], keys: int) -> list[int]:
    out = [0] * keys
    for (q_start, q_len), (k_start, k_len) in zip(q, k, strict=True):
        for j in range(k_len):
            rows = [r for r in range(q_len) if hi[q_start + r] > j]
            out[k_start + j] = rows[0] if rows else q_len
    return out


def check_transpose(hi: list[int], q: list[tuple[int, int]], k: list[tuple[int, int]], keys: int) -> None:
    numbers = [torch.tensor(x, dtype=torch.int32) for x in (*zip(*q, strict=True), *zip(*k, strict=True))]
    found = visibility.transpose_hi(torch.tensor(hi, dtype=torch.int32), *numbers, keys)
    assert found.dtype == torch.int32
    assert found.tolist() == brute_transpose(hi, q, k, keys), (hi, q, k)


def upper_bounds(rows: int, top: int) -> list[tuple[int, ...]]:
    return [values for values in product(range(top + 1), repeat=rows) if list(values) == sorted(values)]


def test_transpose_hi_of_packs_equals_brute_force_with_empty_samples() -> None:
    for lens_q, lens_k in product(product(range(3), repeat=3), product((0, 1, 3), repeat=3)):
        starts_q = [sum(lens_q[:b]) for b in range(3)]
        starts_k = [sum(lens_k[:b]) for b in range(3)]
        for turn in range(4):  # a few lists of bounds per layout: taken in turn, so every sample meets all of its own
            hi: list[int] = []
            for len_q, len_k in zip(lens_q, lens_k, strict=True):
                choices = upper_bounds(len_q, len_k)
                hi += choices[(turn * 7 + len_q) % len(choices)]
            pairs_q = list(zip(starts_q, lens_q, strict=True))
            check_transpose(hi, pairs_q, list(zip(starts_k, lens_k, strict=True)), sum(lens_k))


def test_transpose_hi_of_padded_batches_ignores_unused_rows_and_slots() -> None:
    rows, slots = 3, 4
    for len_a, len_b, first, count in product(range(rows + 1), range(rows + 1), range(2), range(slots)):
        for hi_a, hi_b in product(upper_bounds(len_a, slots)[::5], upper_bounds(len_b, count)[::3]):
            for junk in (0, 99, -5):
                hi = [*hi_a, *[junk] * (rows - len_a), *hi_b, *[junk] * (rows - len_b)]
                layout_k = [(0, slots), (slots + first, min(count, slots - first))]
                check_transpose(hi, [(0, len_a), (rows, len_b)], layout_k, 2 * slots)


@pytest.mark.parametrize("unlimited", [-1, 2**31 - 1, 2**30])
def test_unlimited_windows_become_distances_beyond_every_position_without_overflow(unlimited: int) -> None:
    causal = torch.tensor([True, False])
    for window in ((unlimited, unlimited), torch.full((2, 2), unlimited, dtype=torch.int32)):
        left, right = visibility.window_bounds(causal, window, 7, 9)
        assert left.dtype == right.dtype == torch.int32
        assert bool((left >= 16).all()) and bool((left < 2**30).all())
        assert right[0] == 0 and 16 <= int(right[1]) < 2**30


def test_unlimited_windows_do_not_overflow_for_the_largest_upper_bounds() -> None:
    left, right = visibility.window_bounds(torch.tensor([False]), (-1, -1), 2**31 - 1, 2**31 - 1)
    assert left.tolist() == right.tolist() == [2**30]
    window = torch.tensor([[2**32 + 3, 2**31]])
    left, right = visibility.window_bounds(torch.tensor([False]), window, 4, 4)
    assert left.tolist() == right.tolist() == [8]


def test_a_causal_sample_gets_right_zero_and_keeps_left() -> None:
    causal = torch.tensor([True, False, True])
    left, right = visibility.window_bounds(causal, (3, 5), 20, 20)
    assert (left.tolist(), right.tolist()) == ([3, 3, 3], [0, 5, 0])
    window = torch.tensor([[1, 9], [-1, 2], [0, -1]])
    left, right = visibility.window_bounds(causal, window, 20, 20)
    assert (left.tolist(), right.tolist()) == ([1, 40, 0], [0, 2, 0])


def test_positions_and_samples_count_inside_each_sample() -> None:
    for lengths in ([2, 0, 3], [0, 0, 1], [4], [1, 1, 1, 0]):
        position, sample = visibility.positions_and_samples(table(lengths), sum(lengths))
        expected = [(i, b) for b, length in enumerate(lengths) for i in range(length)]
        assert list(zip(position.tolist(), sample.tolist(), strict=True)) == expected
