"""What requests may hold: the ends of every range, the values where a field is left out, and what an error says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pydantic = pytest.importorskip("pydantic")

from python_model import GritLM  # noqa: E402
from python_model.serve.app import create_app  # noqa: E402
from python_model.serve.engine import Engine  # noqa: E402
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
from python_model.serve.service import Service  # noqa: E402

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


@pytest.fixture(scope="module")
def client(served_model: GritLM) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    with TestClient(
        create_app(Service(Engine(served_model, arena_rows=64, max_step_tokens=64), name="tiny"))
    ) as opened:
        yield opened


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
    assert validation_error(caught.value.errors()).message == f"{field}: expected a finite number"


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


TEXTS = "a text, a non-empty list of token ids, or a non-empty list of texts or of such lists"


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("embeddings", {"input": []}, "input", f"expected {TEXTS}, got an empty list"),
        ("embeddings", {"input": [[1], []]}, "input", f"expected {TEXTS}, got a list with an empty entry"),
        ("embeddings", {"input": ["a", 5]}, "input", f"expected {TEXTS}, got a list with other entries"),
        ("embeddings", {"input": {}}, "input", f"expected {TEXTS}, got an empty object"),
        ("embeddings", {"input": None}, "input", f"expected {TEXTS}, got none"),
        ("embeddings", {}, "input", f"expected {TEXTS}, got none"),
        ("embeddings", {"input": ""}, "input", "expected texts that are not empty, got an empty one"),
        ("embeddings", {"input": ["a", " "]}, "input", "expected texts that are not empty, got an empty one"),
        ("chat/completions", {"messages": []}, "messages", "expected a list of 1 to 2048 messages, got an empty list"),
        ("chat/completions", {"messages": ""}, "messages", "expected a list of 1 to 2048 messages, got an empty text"),
        ("chat/completions", {}, "messages", "expected a list of 1 to 2048 messages, got none"),
        ("chat/completions", {"messages": [{}]}, "messages.0.role", "expected a value, got none"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": None}]},
            "messages.0.content",
            "expected a text, or a list of parts of type text, got none",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": []}]},
            "messages",
            "expected a last message that is not empty, got an empty one",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "stop": [""]},
            "stop",
            "expected a text or a list of up to 4, none of them empty, got a list with an empty entry",
        ),
        ("completions", {"prompt": []}, "prompt", f"expected {TEXTS}, got an empty list"),
        ("completions", {"prompt": [[]]}, "prompt", f"expected {TEXTS}, got a list with an empty entry"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "expected a number greater than or equal to 1"),
        (
            "rerank",
            {"query": "q", "documents": []},
            "documents",
            "expected a list of at least one text, or object with a text, got an empty list",
        ),
        ("rerank", {"query": "q", "documents": [{}]}, "documents.0.text", "expected a value, got none"),
        ("rerank", {"query": "", "documents": ["a"]}, "query", "expected a text that is not empty, got an empty text"),
        ("rerank", {"query": " ", "documents": ["a"]}, "query", "expected a text that is not empty, got an empty text"),
        ("rag", {"question": ""}, "question", "expected a text that is not empty, got an empty text"),
        ("rag", [], None, "expected a JSON object, got an empty list"),
        ("rag", None, None, "expected a JSON object, got none"),
    ],
)
def test_what_is_empty_is_refused_with_what_is_accepted(
    client: Any, path: str, body: Any, param: str | None, message: str
) -> None:
    answer = client.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["message"], error["param"]) == (f"{param or 'body'}: {message}", param)
    assert error["type"] == "invalid_request_error"


def test_an_empty_prompt_is_continued_where_the_tokenizer_begins_texts_with_a_token(
    client: Any, checkpoint_without_bos: Path
) -> None:
    assert client.post("/v1/completions", json={"prompt": "", "max_tokens": 1}).status_code == 200
    other = Service(
        Engine(GritLM(checkpoint_without_bos, device="cpu"), arena_rows=64, max_step_tokens=64), name="tiny"
    )
    with pytest.raises(ApiError, match="prompt: expected a text that is not empty, as this model's tokenizer adds no"):
        other.complete(CompletionRequest.model_validate({"prompt": ""}))
