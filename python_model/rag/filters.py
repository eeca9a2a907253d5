"""Which documents a search may find: conditions on their file and their metadata.

A filter is a dict of fields, all of which must match: ``{"lang": "de"}`` (equal), ``{"lang": ["de", "fr"]}`` (one of them),
``{"year": {"min": 2020, "max": 2024}}`` (inclusive; one may be missing). The field ``source`` is the name of a
document's file and takes patterns such as ``notes/*.md``. A document without the field does not match.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Filter = Mapping[str, Any]
_CONDITION = re.compile(r"\s*([^<>=\s]+)\s*(<=|>=|=)\s*(.+?)\s*")


def read_conditions(texts: Sequence[str]) -> dict[str, Any]:
    """A filter from conditions ``lang=de``, ``year>=2020``, ``year<=2024``; repeating ``=`` for a field means any of the values.

    Values are numbers or ``true`` and ``false`` if they read as such, otherwise texts.

    Raises:
        ValueError: a malformed condition, or a field with both values and bounds.
    """
    found: dict[str, Any] = {}
    for text in texts:
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f"where: expected FIELD=VALUE, FIELD>=NUMBER or FIELD<=NUMBER, got {text!r}")
        field, sign, written = match.groups()
        value = written if field == "source" else _value(written)
        entry = found.setdefault(field, [] if sign == "=" else {})
        if isinstance(entry, list) != (sign == "="):
            raise ValueError(f"where: expected values or bounds of {field!r}, got both")
        if sign == "=":
            entry.append(value)
        else:
            entry["min" if sign == ">=" else "max"] = value
    checked(found)
    return found


def checked(where: Filter) -> dict[str, list[Any] | dict[str, float]]:
    """The filter with every field's values as a list, or its bounds.

    Raises:
        ValueError: a value is not a text, number or bool, a list is empty, bounds are not numbers, or an integer has more than
            64 bits.
    """
    found: dict[str, list[Any] | dict[str, float]] = {}
    for field, value in where.items():
        if isinstance(value, Mapping):
            numbers = [type(bound) in (int, float) for bound in value.values()]
            if not value or not set(value) <= {"min", "max"} or not all(numbers) or field == "source":
                raise ValueError(f"where: expected numbers 'min' and 'max' as bounds of {field!r}, got {dict(value)!r}")
            found[field] = dict(value)
            continue
        values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
        accepted = (str,) if field == "source" else (str, int, float, bool)
        if not values or not all(isinstance(entry, accepted) for entry in values):
            names = " or ".join(kind.__name__ for kind in accepted)
            raise ValueError(f"where: expected {names} values of {field!r}, at least one, got {value!r}")
        found[field] = values
    for field, given in found.items():
        for entry in given.values() if isinstance(given, dict) else given:
            if isinstance(entry, int) and not -(2**63) <= entry < 2**63:
                raise ValueError(f"where: expected integers of 64 bits for {field!r}, got {entry}")
    return found


def sql_condition(where: Filter) -> tuple[str, list[Any]]:
    """The filter as an SQL expression over the columns ``source`` and ``metadata`` (JSON), and its parameters."""
    parts, parameters = ["1"], []
    for field, value in checked(where).items():
        if field == "source":
            assert isinstance(value, list)
            # a name may hold brackets, which a pattern would take for a set of characters
            parts.append("(" + " OR ".join(["source = ? OR source GLOB ?"] * len(value)) + ")")
            parameters += [name for name in value for _ in range(2)]
            continue
        path = "$." + json.dumps(field, ensure_ascii=False)
        column = "json_extract(metadata, ?)"
        if isinstance(value, dict):
            parts += [f"json_type(metadata, ?) IN ('integer', 'real') AND {column} {sign} ?" for sign in _signs(value)]
            parameters += [entry for bound in value.values() for entry in (path, path, bound)]
            continue
        # true is 1 in SQL, but not in JSON
        parts.append("(" + " OR ".join([f"({column} = ? AND json_type(metadata, ?) IN (?, ?))"] * len(value)) + ")")
        for entry in value:
            parameters += [path, int(entry) if isinstance(entry, bool) else entry, path, *_types(entry)]
    return " AND ".join(parts), parameters


def _signs(bounds: dict[str, float]) -> list[str]:
    return [">=" if name == "min" else "<=" for name in bounds]


def _types(value: Any) -> tuple[str, str]:
    if isinstance(value, bool):
        return ("true", "true") if value else ("false", "false")
    return ("text", "text") if isinstance(value, str) else ("integer", "real")


def _value(written: str) -> Any:
    if written in ("true", "false"):
        return written == "true"
    for kind in (int, float):
        try:
            number = kind(written)
        except ValueError:
            continue
        if math.isfinite(number):  # "nan" and "inf" are texts
            return number
    return written
