"""The Hopper forward in Gluon without a GPU: its arithmetic and its barriers on paper, its machine code, when it is chosen."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grit_kernels.attention import reference
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.backend import interpreting

if interpreting():
    pytest.skip("Gluon has no interpreter", allow_module_level=True)
triton = pytest.importorskip("triton", reason="the package triton is not installed")

from grit_kernels.attention import hopper, triton_forward  # noqa: E402
from grit_kernels.attention.triton_configs import table_config  # noqa: E402

hopper_forward = pytest.importorskip("grit_kernels.attention.hopper_forward", reason="this Triton has another Gluon")
from tests.grit_kernels.attention import hopper_paper, samples  # noqa: E402
from tests.grit_kernels.attention.barrier_model import Model  # noqa: E402

BLOCK = hopper_forward.BLOCK


def sample(rows: int, keys: int, left: int = -1, right: int = -1) -> AttentionProblem:
    """One sample; -1: no bound."""
    numbers = (0, rows, 0, keys, left if left >= 0 else keys + rows, right if right >= 0 else keys + rows)
    tables = [torch.tensor([x], dtype=torch.int32) for x in numbers]
    return AttentionProblem(*tables, None, 0, 0, rows, keys, 0.125, 0.0)


def on_paper(problem: AttentionProblem, stages: int, dim: int = 64) -> hopper_paper.Record:
    """The record of the only program of a problem of one tile and one head."""
    torch.manual_seed(0)
    q, k = (torch.randn(int(n), 1, dim, dtype=torch.bfloat16) for n in (problem.q_len, problem.k_len))
    (record,) = hopper_paper.forward(q, k, k, problem, stages)[2]
    return record


def blocks(full: int, edges_left: int, steps: int) -> list[int]:
    return [*range(edges_left, edges_left + full), *range(edges_left), *range(edges_left + full, steps)]


def model(record: hopper_paper.Record, order: list[int], clean: bool) -> Model:
    """Expects that every product reads its blocks, in ``order``; the last block of values is cleaned with ``clean``."""

    def holds(name: str, block: int) -> tuple[Any, ...]:
        last = clean and name == "v" and block == order[-1]
        return (name, block * BLOCK) + (("clean",) if last else ())

    expected = []
    for consumer in range(2):
        q = ("q", consumer * hopper_forward.ROWS_EACH)
        products: list[tuple[Any, ...]] = [(q, holds("k", order[0]))]
        for before, block in zip(order, order[1:], strict=False):
            products += [(q, holds("k", block)), (holds("v", before),)]
        expected.append((*products, (holds("v", order[-1]),)))
    return Model(record, expected)


# rows, keys, left, right -> order of the blocks, and whether the last one has keys of another sample
TILES = {
    "one block": (sample(128, 128), [0], False),
    "part of a block": (sample(128, 100), [0], True),
    "no key": (sample(128, 128, 0, 0), [0], False),
    "two blocks": (sample(128, 256), [0, 1], False),
    "three blocks and a part": (sample(128, 400), [0, 1, 2, 3], True),
    "causal after a cache": (sample(128, 600, right=0), [0, 1, 2, 3, 4], True),
    "a window's edges": (sample(128, 640, 300, 0), [3, 2, 1, 4], False),
}


@pytest.mark.parametrize("name", [name for name in TILES if name != "no key"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_order_of_the_partitions_reads_the_right_blocks_and_ends(name: str, stages: int) -> None:
    problem, _, clean = TILES[name]
    record = on_paper(problem, stages)
    copies = [op[3] for op in record.partitions[2] if op[0] == "copy" and op[3][0] == "k"]
    found = model(record, [row // BLOCK for _, row in copies], clean)
    assert found.fault() == ""
    print(name, stages, len(found.states))
