"""schemathesis on the server's OpenAPI document: whatever a request holds, the reply is one that the document tells of."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from python_model.serve.service import Limits  # noqa: E402
from tests.python_model.serve.server import serving  # noqa: E402

pytestmark = pytest.mark.load


EXCLUDED = [
    # a request that the schema allows may still be refused: a model of another name, a conversation that ends with a reply
    positive_data_acceptance,
]


def small(case: Any) -> None:
    """Fewer tokens and choices, or a test takes hours."""
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens", "n"):
            value = case.body.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 4:
                case.body[name] = 4


def test_every_reply_is_one_that_the_document_tells_of(served_model: Any) -> None:
    with serving(served_model, limits=Limits(reply_tokens=4, seconds=20)) as running:
        document = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        operations = [found.ok() for found in document.get_all_operations()]
        assert len(operations) > 10
        for operation in operations:
            for mode in schemathesis.GenerationMode:

                @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
                @given(case=operation.as_strategy(generation_mode=mode))
                def check(case: Any) -> None:
                    small(case)
                    case.call_and_validate(excluded_checks=EXCLUDED, timeout=60)

                # an operation without a body has no wrong requests
                with contextlib.suppress(*([Unsatisfiable] if operation.method == "get" else [])):
                    check()
        running.settle()
        assert running.engine.alive
