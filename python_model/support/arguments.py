"""Checks whose error names the argument, what was expected and what was given."""

from __future__ import annotations

import os
from collections.abc import Sequence


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")


def check_at_least(name: str, value: int, least: int) -> None:
    """ValueError unless ``value`` >= ``least``."""
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")


def check_path(name: str, path: str | os.PathLike[str]) -> None:
    """ValueError for an empty text, which ``Path`` takes for the current folder."""
    if not os.fspath(path):
        raise ValueError(f"{name}: expected a path, got ''")
