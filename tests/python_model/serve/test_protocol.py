"""What requests may hold: the ends of every range, the values where a field is left out, and what an error says."""

from __future__ import annotations

import json
from typing import Any

import pytest

pydantic = pytest.importorskip("pydantic")

from python_model.serve.protocol import (  # noqa: E402
    ApiError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    RagRequest,
    Request,
    RerankRequest,
    validation_error,
)

LEAST: dict[type[Request], dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": "x"}]},
    CompletionRequest: {"prompt": "x"},
    EmbeddingRequest: {"input": "x"},
    RagRequest: {"question": "x"},
    RerankRequest: {"query": "x", "documents": ["y"]},
}
"""The fields without which there is no request."""

TINY = 5e-324
SEED = (None, [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63])
SAMPLED = {
    "temperature": (1.0, [0, 2], [-TINY, 2.0000001]),
    "top_p": (1.0, [TINY, 1], [0, 1.0000001]),
    "top_k": (0, [0, 10**6], [-1]),
    "frequency_penalty": (0.0, [-2, 2], [-2.0000001, 2.0000001]),
    "presence_penalty": (0.0, [-2, 2], [-2.0000001, 2.0000001]),
    "n": (1, [1, 16], [0, 17]),
    "stop": ([], ["a", ["a", "b", "c", "d"]], ["", [""], list("abcde")]),
    "seed": SEED,
}
RANGES: dict[type[Request], dict[str, tuple[Any, list[Any], list[Any]]]] = {
    ChatRequest: SAMPLED
    | {
        "messages": (
            ...,
            [[{"role": "user", "content": "x"}] * 2048],
            [[], [{"role": "user", "content": "x"}] * 2049],
        ),
        "max_tokens": (None, [1, 10**6], [0]),
        "max_completion_tokens": (None, [1, 10**6], [0]),
    },
    CompletionRequest: SAMPLED
    | {
        "max_tokens": (16, [1, 10**6], [0]),
        "logprobs": (None, [0, 20], [-1, 21]),
        "prompt": (..., [[0], [[0]]], [[], [-1]]),
    },
    EmbeddingRequest: {"dimensions": (None, [1, 10**6], [0]), "input": (..., [[0], ["a"]], [[], [-1], [[]]])},
    RagRequest: {
        "question": (..., ["a"], [""]),
        "k": (3, [1, 100], [0, 101]),
        "max_tokens": (64, [1, 10**6], [0]),
        "temperature": (0.0, [0, 2], [-TINY, 2.0000001]),
        "top_p": SAMPLED["top_p"],
        "seed": SEED,
    },
    RerankRequest: {
        "query": (..., ["a"], [""]),
        "documents": (..., [["a"], [{"text": "a"}]], [[]]),
        "top_n": (None, [1, 10**6], [0]),
        "max_tokens_per_doc": (512, [1, 10**6], [0]),
    },
}
"""Per field: its default (... where it must be given), values at the ends of its range, and values just outside."""


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in RANGES.items() for field in fields])
def test_a_range_holds_its_ends_and_nothing_beyond(kind: type[Request], field: str) -> None:
    default, inside, outside = RANGES[kind][field]
    if default is not ...:
        assert getattr(kind.model_validate(LEAST[kind]), field) == default
    for value in inside:
        kind.model_validate({**LEAST[kind], field: value})
    for value in outside:
        with pytest.raises(pydantic.ValidationError) as caught:
            kind.model_validate({**LEAST[kind], field: value})
        assert field in (validation_error(caught.value.errors()).param or "")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "top_p"])
@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, RagRequest])
def test_a_number_that_is_none_is_refused_as_such(kind: type[Request], field: str, number: str) -> None:
    body = json.dumps({**LEAST[kind], field: 1})[:-2] + number + "}"
    with pytest.raises(pydantic.ValidationError) as caught:
        kind.model_validate_json(body)
    assert validation_error(caught.value.errors()).message == f"{field}: Input should be a finite number"


def test_log_probabilities_of_a_chat_have_a_range() -> None:
    for number in (0, 20):
        ChatRequest.model_validate({**LEAST[ChatRequest], "logprobs": True, "top_logprobs": number})
    for number in (-1, 21):
        with pytest.raises(pydantic.ValidationError, match="top_logprobs"):
            ChatRequest.model_validate({**LEAST[ChatRequest], "logprobs": True, "top_logprobs": number})


def test_of_two_limits_of_a_reply_none_is_dropped() -> None:
    same = ChatRequest.model_validate({**LEAST[ChatRequest], "max_tokens": 7, "max_completion_tokens": 7})
    assert same.max_tokens == same.max_completion_tokens == 7
    with pytest.raises(pydantic.ValidationError) as caught:
        ChatRequest.model_validate({**LEAST[ChatRequest], "max_tokens": 9, "max_completion_tokens": 7})
    error = validation_error(caught.value.errors())
    assert (error.param, error.message) == (
        "max_tokens",
        "max_tokens: expected the same as max_completion_tokens, or none, got another",
    )


def test_an_error_of_a_whole_request_has_a_field_and_a_code() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        EmbeddingRequest.model_validate({"input": "x", "instruction": "a", "input_type": "query"})
    error = validation_error(caught.value.errors())
    assert (error.status, error.param, error.code) == (400, "instruction", "invalid_value")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (499, "invalid_request_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_the_type_of_an_error_is_openais_for_its_status(status: int, kind: str) -> None:
    error = {"message": "m", "type": kind, "param": "p", "code": "c"}
    assert ApiError(status, "m", param="p", code="c").body == {"error": error}
