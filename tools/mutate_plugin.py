"""The pytest plugin of tools/mutate.py: for the coverage map, it tells coverage which test is running and records how long each
took; for a mutant, it runs the chosen tests in the chosen order.

Child processes of a test are measured as well: coverage's configuration takes its context from the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

CONTEXT, DURATIONS, SELECTED = "MUTATE_CONTEXT", "MUTATE_DURATIONS", "MUTATE_SELECTED"
"""Environment variables: the running test; the file for the durations; the file with the chosen tests."""

if SELECTED in os.environ:
    with contextlib.suppress(ImportError):
        from hypothesis import Phase, settings

        # the first failure decides: it is not made smaller; profiles that are made later start from this one
        settings.register_profile("first failure", phases=(Phase.explicit, Phase.reuse, Phase.generate))
        settings.load_profile("first failure")

_seconds: dict[str, float] = {}
_not_passed: set[str] = set()


def _used() -> float:
    """CPU seconds of this process and of the children it has waited for: the cost of a test, even on a busy machine."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = _used()
    try:
        return (yield from _measured(item))
    finally:
        _seconds[item.nodeid] = _used() - before


def _measured(item: pytest.Item) -> Iterator[None]:
    if "COVERAGE_PROCESS_START" not in os.environ:
        return (yield)
    import coverage

    measured = coverage.Coverage.current()
    if measured is None:
        raise RuntimeError("coverage: expected to be running in this process")
    measured.switch_context(item.nodeid)
    os.environ[CONTEXT] = item.nodeid
    try:
        return (yield)
    finally:
        measured.switch_context("")
        os.environ[CONTEXT] = ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SELECTED not in os.environ:
        return
    wanted = {test: place for place, test in enumerate(json.loads(Path(os.environ[SELECTED]).read_text()))}
    others = [item for item in items if item.nodeid not in wanted]
    if others:
        config.hook.pytest_deselected(items=others)
    items[:] = sorted((item for item in items if item.nodeid in wanted), key=lambda item: wanted[item.nodeid])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome != "passed":
        _not_passed.add(report.nodeid)


def pytest_sessionfinish() -> None:
    if DURATIONS in os.environ:
        passed = {test: round(seconds, 4) for test, seconds in _seconds.items() if test not in _not_passed}
        Path(os.environ[DURATIONS]).write_text(json.dumps({"passed": passed, "not_passed": sorted(_not_passed)}))
