"""The arena: intervals never overlap, moving them keeps their states, and no row is wasted by fragmentation."""

from __future__ import annotations

import random

import pytest
import torch

from python_model.generate.states import TextStates
from python_model.serve.arena import Arena, Interval

LAYERS, ROWS = 2, 50


def states_of(arena: Arena, interval: Interval) -> torch.Tensor:
    """(layers, 2, filled, heads, dim), and the rows of each layer are apart."""
    rows = [
        slice(layer * arena.rows + interval.start, layer * arena.rows + interval.start + interval.filled)
        for layer in range(arena.layers)
    ]
    return torch.stack([torch.stack([memory[r] for memory in (arena.keys, arena.values)]) for r in rows])


def fill(arena: Arena, interval: Interval, tokens: int) -> torch.Tensor:
    data = torch.randn(LAYERS, 2, 1, tokens, 8)
    arena.write(interval, TextStates(data, torch.zeros(tokens).long(), torch.arange(tokens), True))
    return data.transpose(2, 3)


@pytest.mark.parametrize("seed", range(20))
def test_random_use_never_overlaps_and_never_refuses_what_fits(seed: int) -> None:
    source, arena = random.Random(seed), Arena(LAYERS, 1, 8, ROWS, 4)
    live: list[tuple[Interval, torch.Tensor]] = []
    for _ in range(200):
        if live and source.random() < 0.45:
            arena.free(live.pop(source.randrange(len(live)))[0])
            continue
        rows = source.randrange(1, 20)
        free = ROWS - sum(interval.rows for interval, _ in live)
        interval = arena.allocate(rows)
        assert (interval is None) == (rows > free), "a gap was refused, or made of rows in use"
        if interval is not None:
            live.append((interval, fill(arena, interval, source.randrange(1, rows + 1))))
        taken = sorted((i.start, i.start + i.rows) for i, _ in live)
        assert all(end <= start for (_, end), (start, _) in zip(taken, taken[1:], strict=False))
        assert not taken or taken[-1][1] <= ROWS
        for interval, data in live:
            assert torch.equal(states_of(arena, interval), data)


def test_states_are_shared_by_copying() -> None:
    arena = Arena(LAYERS, 1, 8, ROWS, 4)
    source, target = arena.allocate(10), arena.allocate(10)
    assert source is not None and target is not None
    data = fill(arena, source, 8)
    arena.share(source, target, 5)
    assert target.filled == 5 and torch.equal(states_of(arena, target), data[:, :, :5])
    with pytest.raises(ValueError, match="^rows: expected at most 8"):
        arena.share(source, target, 9)
    arena.share(source, target, 8)
    assert torch.equal(states_of(arena, target), data)


def test_states_in_wider_memory_have_zeros_behind_them() -> None:
    arena = Arena(LAYERS, 1, 8, ROWS, 4, memory_dim=12)
    for memory in (arena.keys, arena.values):
        memory.fill_(float("nan"))
    arena.allocate(3)
    interval = arena.allocate(10)
    assert interval is not None
    data = fill(arena, interval, 7)
    found = states_of(arena, interval)
    assert torch.equal(found[..., :8], data) and torch.equal(found[..., 8:], torch.zeros(LAYERS, 2, 7, 1, 4))
    assert int(arena.keys.isfinite().all(-1).sum()) == LAYERS * 7, "other rows are as they were"


def test_wrong_states_and_intervals_are_refused() -> None:
    arena = Arena(LAYERS, 1, 8, ROWS, 4)
    interval = arena.allocate(3)
    assert interval is not None
    with pytest.raises(ValueError, match="^states: expected at most 3 tokens"):
        fill(arena, interval, 4)
    arena.free(interval)
    with pytest.raises(ValueError):
        arena.free(interval)
    with pytest.raises(ValueError, match="below 2\\*\\*31"):
        Arena(100, 1, 8, 2**25, 4)
