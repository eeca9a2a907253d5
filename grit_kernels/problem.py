"""Arguments shared by several ops, as one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

_SCHEMA_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "SymInt", "float": "float", "bool": "bool"}


class Problem:
    """Base of frozen dataclasses whose fields are arguments of ops, tensors first.

    torch.library requires flat schemas. The fields are declared once, in the dataclass: ``TENSORS`` and ``OPTIONS`` are their
    part of a schema, and :func:`gathering` turns a flat call into one that takes the object.
    """

    NAMES: ClassVar[tuple[str, ...]]
    TENSORS: ClassVar[str]
    OPTIONS: ClassVar[str]
    TENSOR_COUNT: ClassVar[int]

    def __init_subclass__(cls) -> None:
        fields = {name: _SCHEMA_TYPES[kind] for name, kind in cls.__annotations__.items()}
        tensors = [name for name, kind in fields.items() if kind.startswith("Tensor")]
        cls.NAMES = tuple(fields)
        assert cls.NAMES[: len(tensors)] == tuple(tensors), f"{cls.__name__}: tensors come first"
        cls.TENSOR_COUNT = len(tensors)
        cls.TENSORS = ", ".join(f"{kind} {name}" for name, kind in fields.items() if name in tensors)
        cls.OPTIONS = ", ".join(f"{kind} {name}" for name, kind in fields.items() if name not in tensors)

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return getattr(self, self.NAMES[0]).device

    def flat(self) -> tuple[Any, ...]:
        """The fields in order, as an op takes them."""
        return tuple(getattr(self, name) for name in self.NAMES)


def gathering(problem: type[Problem], schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` behind the arguments of ``schema``: it takes the problem where the last of the problem's fields is."""
    names = [argument.split()[-1] for argument in schema[schema.index("(") + 1 : schema.index(")")].split(",")]
    fields = [names.index(name) for name in problem.NAMES]
    before, after = (
        [i for i in part if i not in fields] for part in (range(fields[-1]), range(fields[-1], len(names)))
    )

    def run(*flat: Any) -> Any:
        gathered = problem(*(flat[i] for i in fields))
        return function(*(flat[i] for i in before), gathered, *(flat[i] for i in after))

    return run
