"""A dataclass of settings checks itself by its annotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from python_model.support.checked import Checked, Count, Positive, Range, Share


@dataclass
class Settings(Checked):
    """All that is understood."""

    kind: Literal["a", "b"] = "a"
    count: Count = 1
    share: Share = 0.5
    rate: Positive = 1.0
    window: Annotated[int, Range(-1, 8)] | None = None
    flag: bool = False
    name: str = ""
    names: list[Literal["x", "y"]] = field(default_factory=list)
    weights: dict[str, Share] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("kind", ["b"]),
        ("count", [1, 10**9]),
        ("share", [0, 1, 0.25]),
        ("rate", [1e-30, 2]),
        ("window", [None, -1, 8]),
        ("names", [[], ["x", "y", "x"]]),
        ("weights", [{"x": 0.5}]),
        ("prompts", [{"query": "q"}]),
    ],
)
def test_values_within_the_annotation_are_accepted(name: str, accepted: list[Any]) -> None:
    for value in accepted:
        assert getattr(Settings(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", "c", "kind: expected one of 'a', 'b', got 'c'"),
        ("count", 0, "count: expected an int >= 1, got 0"),
        ("count", True, "count: expected an int >= 1, got True"),
        ("count", 1.0, "count: expected an int >= 1, got 1.0"),
        ("share", 1.5, "share: expected a finite number >= 0 and <= 1, got 1.5"),
        ("share", float("nan"), "share: expected a finite number >= 0 and <= 1, got nan"),
        ("rate", 0, "rate: expected a finite number > 0, got 0"),
        ("rate", float("inf"), "rate: expected a finite number > 0, got inf"),
        ("window", 9, "window: expected an int >= -1 and <= 8 or None, got 9"),
        ("flag", 1, "flag: expected a bool, got 1"),
        ("name", None, "name: expected a str, got None"),
        ("names", ["z"], "names: expected a list, each one of 'x', 'y', got ['z']"),
        (
            "weights",
            {"x": 2.0},
            "weights: expected a mapping from a str to a finite number >= 0 and <= 1, got {'x': 2.0}",
        ),
        ("prompts", "q", "prompts: expected a mapping from a str to a str, got 'q'"),
    ],
)
def test_other_values_are_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Settings(**{name: value})
    assert str(caught.value) == message
