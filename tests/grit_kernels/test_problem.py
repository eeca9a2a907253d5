"""Problems: the fields of a dataclass are the arguments of an op, and a flat call becomes one with the object."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.contrastive.problem import ContrastiveProblem
from grit_kernels.pooling.problem import PoolingProblem
from grit_kernels.problem import Problem, gathering


@dataclass(frozen=True)
class Small(Problem):
    a: Tensor
    b: Tensor | None
    count: int
    scale: float
    flag: bool


def test_the_fields_are_spelled_as_a_schema() -> None:
    assert (Small.TENSORS, Small.OPTIONS) == ("Tensor a, Tensor? b", "SymInt count, float scale, bool flag")
    assert Small.TENSOR_COUNT == 2


def test_fields_are_gathered_wherever_they_stand() -> None:
    schema = f"op(Tensor x, {Small.TENSORS}, Tensor? y, {Small.OPTIONS}, int z) -> Tensor"
    found = gathering(Small, schema, lambda *arguments: arguments)(1, 2, 3, 4, 5, 6, 7, 8)
    assert found == (1, 4, Small(2, 3, 5, 6, 7), 8)  # type: ignore[arg-type]
    assert found[2].flat() == (2, 3, 5, 6, 7)


def test_an_option_before_a_tensor_is_refused() -> None:
    with pytest.raises(AssertionError, match="Wrong: tensors come first"):

        class Wrong(Problem):
            count: int
            a: Tensor


@pytest.mark.parametrize(
    ("problem", "ops"),
    [
        (
            AttentionProblem,
            ("attention_forward", "attention_backward", "attention_plan", "attention_decode"),
        ),
        (AttentionProblem, ("attention_decode_cuda", "attention_decode_paged", "attention_decode_paged_cuda")),
        (ContrastiveProblem, ("contrastive_forward", "contrastive_backward", "contrastive_step")),
        (PoolingProblem, ("pool_forward", "pool_backward")),
    ],
)
def test_every_op_of_a_folder_takes_the_fields_in_their_order(problem: type[Problem], ops: tuple[str, ...]) -> None:
    for op in ops:
        names = [x.name for x in getattr(torch.ops.grit_kernels, op).default._schema.arguments]
        assert tuple(name for name in names if name in problem.NAMES) == problem.NAMES, op
