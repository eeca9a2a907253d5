"""Dataclasses of settings that are checked against their annotations.

@dataclass
class BatchConfig(Checked):
    chunking: Literal["tokens", "triplet"] = "tokens"
    chunk_tokens: Annotated[int, Range(0)] = 0

BatchConfig(chunk_tokens=-1)      # ValueError: chunk_tokens: expected an int >= 0, got -1
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``, excluding ``least`` itself if ``above``."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        low = f" {'>' if self.above else '>='} {self.least:g}" if self.least > -math.inf else ""
        return low if self.most == math.inf else f"{low} and <= {self.most:g}"


class _NotEmpty:
    def __contains__(self, value: str) -> bool:
        return value != ""

    def __str__(self) -> str:
        return " that is not empty"


Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
"""0 disables something."""
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Location = Annotated[str, _NotEmpty()]
"""Of a file, a folder or a model: an empty text would be the current folder."""


@dataclass
class Checked:
    """Base class of a dataclass whose fields are checked against their annotations on creation.

    Supported are int, float (finite; an int is accepted), bool, str, None, Literal, unions, list, dict, Mapping, dataclasses and
    ``Annotated[.., Range(..)]`` or what else says ``in`` of a value.

    Raises:
        ValueError: "FIELD: expected X, got Y".
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if not _fits(value, hint):
                raise ValueError(f"{field.name}: expected {describe(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0]) and all(value in limit for limit in arguments[1:])
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if hint is None else hint)


def describe(hint: Any) -> str:
    """What an annotation accepts, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(arguments[0]) + "".join(str(limit) for limit in arguments[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is list:
        return f"a list, each {describe(arguments[0])}"
    if origin in (dict, Mapping):
        return f"a mapping from {describe(arguments[0])} to {describe(arguments[1])}"
    if hint is type(None):
        return "None"
    if is_dataclass(hint):
        return f"a {hint.__name__}"  # type: ignore[union-attr]
    return {int: "an int", float: "a finite number", bool: "a bool", str: "a str"}.get(hint, str(hint))
