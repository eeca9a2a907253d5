"""The order of rows: every epoch is whole, batches keep to a data set, and any step can be asked for first."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_model.data.order import BatchOrder, Permutation, permutation

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["sorted", "computed"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every property holds for orders that are computed place by place too, which only large data have."""
    if request.param == "computed":
        monkeypatch.setattr(Permutation, "SORTED", -1)
    return str(request.param)


def rows_of(order: BatchOrder, steps: int) -> list[tuple[int, int]]:
    return [row for step in range(steps) for row in order.batch(step)]


@MANY
@given(sizes=SIZES, batch_size=st.integers(1, 17), seed=st.integers(0, 2**40), same=st.booleans())
def test_every_row_comes_once_per_epoch(sizes: list[int], batch_size: int, seed: int, same: bool) -> None:
    order = BatchOrder(sizes, batch_size, seed, same_dataset=same)
    total = sum(sizes)
    taken = rows_of(order, 3 * total // batch_size + 1)
    everyone = {(d, row) for d, size in enumerate(sizes) for row in range(size)}
    for epoch in range(3):
        part = taken[epoch * total : (epoch + 1) * total]
        assert len(part) == total and set(part) == everyone


@MANY
@given(data=st.data(), batch_size=st.integers(1, 9), seed=st.integers(0, 99), same=st.booleans())
def test_weighted_epochs_take_what_was_asked_and_no_row_twice_too_soon(
    data: st.DataObject, batch_size: int, seed: int, same: bool
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 15), min_size=1, max_size=4))
    wanted = data.draw(st.lists(st.integers(0, 40), min_size=len(sizes), max_size=len(sizes)).filter(any))
    order = BatchOrder(sizes, batch_size, seed, same_dataset=same, rows_per_epoch=wanted)
    total = sum(wanted)
    taken = rows_of(order, 3 * total // batch_size + 1)
    for epoch in range(1, 4):
        counts = Counter(taken[: epoch * total])
        for dataset, (size, count) in enumerate(zip(sizes, wanted, strict=True)):
            times = [counts[dataset, row] for row in range(size)]
            assert sum(times) == epoch * count
            assert max(times) - min(times) <= 1


@MANY
@given(sizes=SIZES, batch_size=st.integers(2, 9), seed=st.integers(0, 99))
def test_batches_keep_to_one_data_set_but_for_the_left_overs(sizes: list[int], batch_size: int, seed: int) -> None:
    """In every epoch, not only in the first: a batch that spans two epochs does not displace the next ones."""
    order = BatchOrder(sizes, batch_size, seed)
    total = sum(sizes)
    steps = 4 * total // batch_size
    mixed = sum(len({dataset for dataset, _ in order.batch(step)}) > 1 for step in range(steps))
    left_over = sum(size % batch_size for size in sizes)
    # per epoch: the left-overs' batches, one that spans epochs, one broken up to complete it
    assert mixed <= 4 * (left_over // batch_size + 2)
    if left_over == 0:
        assert mixed == 0


def test_any_step_can_be_asked_for_first() -> None:
    order = BatchOrder([13, 5, 8], 4, seed=3)
    expected = [order.batch(step) for step in range(40)]
    for step in (39, 0, 17, 6, 7):
        assert BatchOrder([13, 5, 8], 4, seed=3).batch(step) == order.batch(step) == expected[step]


def test_epochs_and_seeds_differ_and_rows_do_not_come_in_order() -> None:
    order, other = BatchOrder([500], 500, seed=0), BatchOrder([500], 500, seed=1)
    first = [row for _, row in order.batch(0)]
    assert first != [row for _, row in order.batch(1)] and first != [row for _, row in other.batch(0)]
    assert sum(abs(place - row) for place, row in enumerate(first)) / 500 > 100  # a third of 500 on average


def test_data_sets_alternate_within_an_epoch() -> None:
    order = BatchOrder([400, 400], 4, seed=0)
    kinds = [order.batch(step)[0][0] for step in range(200)]
    changes = sum(a != b for a, b in zip(kinds, kinds[1:], strict=False))
    assert kinds.count(0) == kinds.count(1) == 100 and changes > 60


def test_the_order_is_the_same_everywhere(kind: str) -> None:
    """A run resumed on another machine must go on with the same rows, so the order itself is part of the contract."""
    assert [row for _, row in BatchOrder([10], 10, seed=7).batch(0)] == EXPECTED[kind]


def test_the_order_of_several_data_sets_is_the_same_everywhere(kind: str) -> None:
    order = BatchOrder([6, 5], 4, seed=7)
    assert [order.batch(step) for step in range(3)] == EXPECTED_OF_TWO[kind]


EXPECTED = {"sorted": [0, 5, 6, 1, 7, 3, 4, 9, 8, 2], "computed": [3, 1, 6, 8, 4, 5, 7, 9, 2, 0]}
EXPECTED_OF_TWO = {
    "sorted": [
        [(0, 4), (0, 3), (0, 5), (0, 1)],
        [(1, 1), (1, 3), (1, 2), (1, 0)],
        [(0, 2), (0, 0), (1, 4), (0, 4)],
    ],
    "computed": [
        [(1, 0), (1, 2), (1, 4), (1, 1)],
        [(0, 4), (0, 5), (0, 1), (0, 3)],
        [(0, 2), (0, 0), (1, 3), (0, 4)],
    ],
}


@MANY
@given(count=st.integers(1, 300), key=st.integers(0, 2**40))
def test_a_permutation_takes_every_number_once(count: int, key: int) -> None:
    found = Permutation(count, key)(np.arange(count))
    assert sorted(found.tolist()) == list(range(count))
    assert found.tolist() == [int(Permutation(count, key)(np.array([n]))[0]) for n in range(count)]


def test_computed_places_are_spread_as_sorted_ones_are() -> None:
    """Neighbours go anywhere: the mean distance of two random places is a third of all."""
    count = 20_000
    for found in (Permutation(count, 3)(np.arange(count)), permutation(count, 3)):
        steps = np.abs(np.diff(found))
        assert (
            abs(steps.mean() / count - 1 / 3) < 0.01
            and abs(np.abs(found - np.arange(count)).mean() / count - 1 / 3) < 0.01
        )
        assert np.corrcoef(found, np.arange(count))[0, 1] < 0.03


def test_a_hundred_million_rows_take_no_memory_and_no_time(kind: str) -> None:
    tracemalloc.start()
    try:
        order = BatchOrder([100_000_000, 7_000_001], 2048, seed=0)
        batches = [order.batch(step) for step in (0, 30_000, 60_000)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6  # the order itself would be 800 MB
    for batch in batches:
        assert len(set(batch)) == 2048 and len({dataset for dataset, _ in batch}) == 1
    rows = np.array([row for _, row in batches[0]])
    assert rows.max() > 0.9 * order.sizes[batches[0][0][0]] and abs(np.diff(np.sort(rows))).max() < 0.01 * rows.max()


@pytest.mark.parametrize(
    ("sizes", "batch_size", "rows", "message"),
    [
        ([3], 0, None, "batch_size: expected an int >= 1, got 0"),
        ([], 1, None, "sizes: expected at least one, got no rows"),
        ([0, 0], 1, None, "sizes: expected at least one, got no rows"),
        ([3, 0], 1, [1, 1], "rows_per_epoch"),
        ([3, 1], 1, [1], "rows_per_epoch"),
        ([3], 1, [-1], "rows_per_epoch"),
    ],
)
def test_impossible_orders_are_refused(sizes: list[int], batch_size: int, rows: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchOrder(sizes, batch_size, 0, rows_per_epoch=rows)
