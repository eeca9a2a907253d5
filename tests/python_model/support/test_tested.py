"""The lock: what it may hold, and what is named as outside of what was tested."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from python_model.support import tested
from python_model.support.tested import CONSTRAINTS, Outside, differences, lowest_versions, outside_of_tested

TEXT = """# tested: Python 3.10 3.11, torch 2.13.0 2.15.0, triton 3.9.0
numpy==2.2.6 ; python_full_version < '3.11'
numpy==2.3.5 ; python_full_version >= '3.11'
Jinja2==3.1.6
"""


def test_the_lock_names_no_index_and_nothing_that_a_torch_brings() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert all(re.match(r"[\w.-]+==[^ ]+( ; .*)?$", line) for line in lines)
    assert not [line for line in lines if re.match(r"(torch|triton)==|nvidia-|cuda-", line)]


def test_the_lock_has_one_version_of_every_requirement() -> None:
    locked = tested.tested_versions()
    # Triton and torch stand in the header; mteb and TRL need Python 3.11
    assert set(lowest_versions()) - set(locked) <= {"mteb", "trl", tested.DISTRIBUTION}
    assert {"torch", "triton", "transformers", "python"} <= set(locked)


def test_versions_follow_the_python_that_runs() -> None:
    found = tested.tested_versions(TEXT)
    assert found["torch"] == "2.13.0 2.15.0" and found["python"] == "3.10 3.11" and found["jinja2"] == "3.1.6"
    assert found["numpy"] in ("2.2.6", "2.3.5")


@pytest.mark.parametrize(
    ("installed", "outside"),
    [("1.0", True), ("2.0", False), ("2.5", False), ("3.0", False), ("3.10+cpu", False), ("3.11", True)],
)
def test_only_versions_outside_of_the_span_are_named(
    installed: str, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tested, "tested_versions", lambda: {"thing": "3.0 3.10", "python": f"2.7 {_python()}"})
    monkeypatch.setattr(tested, "lowest_versions", lambda: {"thing": "2.0", "absent": ""})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    expected = [Outside("thing", installed, "2.0 to 3.10")] if outside else []
    assert outside_of_tested() == expected


def test_a_python_that_was_not_tested_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "tested_versions", lambda: {"python": "2.6 2.7"})
    assert [str(found) for found in outside_of_tested()] == [f"Python {_python()} (tested: 2.6, 2.7)"]


def test_differences_name_indirect_packages_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "tested_versions", lambda: {"pytest": "0.1", "absent-package": "1"})
    assert differences() == {"pytest": (pytest.__version__, "0.1")}
    monkeypatch.setattr(tested, "tested_versions", lambda: {"pytest": f"0.1 {pytest.__version__}"})
    assert differences() == {}


def test_the_lock_is_part_of_the_package() -> None:
    assert CONSTRAINTS.is_file() and Path(tested.__file__).parent == CONSTRAINTS.parent


def _python() -> str:
    import sys

    return ".".join(map(str, sys.version_info[:2]))
