"""What stands in for hypothesis where it is not installed."""

from __future__ import annotations

from typing import Any

from tests.without_hypothesis import stand_in


def test_tests_that_draw_examples_are_skipped_and_their_modules_load() -> None:
    hypothesis: Any = stand_in()
    st = hypothesis.strategies
    few = hypothesis.settings(max_examples=3, suppress_health_check=[hypothesis.HealthCheck.too_slow])

    @few
    @hypothesis.given(st.lists(st.integers(1, 4).flatmap(lambda n: st.just(n))), data=st.data())
    def drawn(numbers: list[int], data: Any) -> None:
        raise AssertionError

    assert [mark.name for mark in drawn.pytestmark] == ["skip"]
