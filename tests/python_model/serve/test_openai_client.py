"""The real OpenAI client against a live server: every result is the library's own."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from python_model import GritLM  # noqa: E402
from python_model.generate.decode import Sampling  # noqa: E402
from python_model.generate.text import complete, conversation_ids, prompt_ids, reply  # noqa: E402
from python_model.model.prompts import embed_instruction  # noqa: E402
from tests.python_model.serve.server import Server, serving  # noqa: E402

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(served_model: GritLM) -> Iterator[Server]:
    with serving(served_model, query_instruction="Find the answer") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: Any, messages: Any = QUESTION, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12, **options}
    )


def test_a_chat_is_what_the_library_replies(client: Any, served_model: GritLM) -> None:
    turns = ["What is a river?", "Water that flows.", "And a city?"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    for system in ("", "You are terse."):
        given = [{"role": "system", "content": system}, *messages] if system else messages
        found = chat(client, given)
        assert found.choices[0].message.content == reply(served_model, turns, system=system, max_new_tokens=12)
        assert found.usage.prompt_tokens == len(conversation_ids(served_model, turns, system=system))
        assert found.usage.completion_tokens == 12 and found.choices[0].finish_reason == "length"


def test_a_stream_adds_up_to_the_whole_reply_and_ends_with_its_usage(client: Any) -> None:
    whole = chat(client, max_tokens=30)
    chunks = list(chat(client, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30


def test_stop_strings_end_a_reply_before_them(client: Any) -> None:
    text = chat(client, max_tokens=30).choices[0].message.content
    stop = text[6:9]
    found = chat(client, max_tokens=30, stop=[stop])
    assert found.choices[0].message.content == text[: text.index(stop)].rstrip()
    assert found.choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_choices_differ(client: Any) -> None:
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "n": 3}
    first, second = chat(client, **options), chat(client, **options)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens == 36 and first.usage.prompt_tokens < 60, "a prompt counts once"


def test_log_probabilities_are_of_the_tokens_chosen(client: Any) -> None:
    found = chat(client, logprobs=True, top_logprobs=3)
    rows = found.choices[0].logprobs.content
    assert len(rows) == 12
    for row in rows:
        assert row.logprob == max(top.logprob for top in row.top_logprobs) <= 0, "greedy takes the likeliest"
        assert row.token == row.top_logprobs[0].token and sum(math.exp(t.logprob) for t in row.top_logprobs) <= 1.0001
    streamed = [c.choices[0].logprobs for c in chat(client, logprobs=True, stream=True)]
    assert [r.token for part in streamed if part for r in part.content] == [row.token for row in rows]


def test_completions_continue_plain_text_and_tokens(client: Any, served_model: GritLM) -> None:
    texts = ["A river flows", "def add(first"]
    expected = complete(served_model, [prompt_ids(served_model, text) for text in texts], max_new_tokens=8)
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    found = client.completions.create(prompt=texts, **options)
    assert [choice.text for choice in found.choices] == expected
    ids = served_model.tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert client.completions.create(prompt=ids, **options).choices[0].text == expected[0]
    stream = client.completions.create(prompt=texts[0], stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]
    scored = client.completions.create(prompt=texts[0], logprobs=2, **options).choices[0].logprobs
    assert len(scored.tokens) == 8 and all(len(top) == 2 for top in scored.top_logprobs)


def embed(client: Any, given: Any, **options: Any) -> np.ndarray:
    return np.array([row.embedding for row in client.embeddings.create(model="tiny", input=given, **options).data])


def test_embeddings_are_those_of_encode(client: Any, served_model: GritLM) -> None:
    texts = [f"A text about the number {i}." * (1 + i % 3) for i in range(20)]
    expected = served_model.encode(texts, instruction=embed_instruction(""))
    for found in (embed(client, texts), embed(client, texts, encoding_format="float")):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(embed(client, texts[3])[0], expected[3], atol=1e-5)
    ids = [served_model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[:2]]
    np.testing.assert_allclose(embed(client, ids), expected[:2], atol=1e-5)
    np.testing.assert_allclose(embed(client, ids[0])[0], expected[0], atol=1e-5)


def test_instructions_of_queries_and_of_requests_are_kept(client: Any, served_model: GritLM) -> None:
    for extra, instruction in (
        ({"input_type": "query"}, "Find the answer"),
        ({"input_type": "search_document"}, ""),
        ({"instruction": "Name the topic"}, "Name the topic"),
    ):
        expected = served_model.encode(["a city"], instruction=embed_instruction(instruction))
        np.testing.assert_allclose(embed(client, "a city", extra_body=extra), expected, atol=1e-5)


def test_fewer_dimensions_are_the_first_of_length_one(client: Any) -> None:
    whole, part = embed(client, "a city")[0], embed(client, "a city", dimensions=16)[0]
    np.testing.assert_allclose(part, whole[:16] / np.linalg.norm(whole[:16]), atol=1e-5)


def test_base64_is_little_endian_float32(server: Server) -> None:
    import httpx

    body = {"input": "a city", "encoding_format": "base64"}
    text = httpx.post(f"{server.url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    numbers = httpx.post(f"{server.url}/v1/embeddings", json={"input": "a city"}).json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), np.array(numbers, np.float32))


def test_the_same_system_prompt_is_read_once(client: Any) -> None:
    system = {"role": "system", "content": "You answer questions about rivers, cities and words. " * 4}
    chat(client, [system, {"role": "user", "content": "What is a river?"}])
    found = chat(client, [system, {"role": "user", "content": "And what is a city?"}])
    assert found.usage.prompt_tokens_details.cached_tokens > 50


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("audio", {"voice": "x", "format": "wav"}),
    ],
)
def test_what_is_not_supported_is_a_400_that_names_it(client: Any, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **{field: value})
    assert refused.value.param == field and refused.value.code == "unsupported_parameter"


def test_penalties_are_those_of_the_library(client: Any, served_model: GritLM) -> None:
    found = chat(client, frequency_penalty=0.5, presence_penalty=0.25, max_tokens=30).choices[0].message.content
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    turns = [QUESTION[0]["content"]]
    assert found == reply(served_model, turns, max_new_tokens=30, sampling=sampling)
    assert found != reply(served_model, turns, max_new_tokens=30)


def test_values_that_ask_for_nothing_are_taken(client: Any) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}}
    found = chat(client, **neutral, extra_body={"tools": [], "seed": None})
    assert found.choices[0].message.content == chat(client).choices[0].message.content


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ],
)
def test_wrong_values_are_a_400_that_names_the_field(client: Any, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **options)
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


def test_another_model_is_not_found(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for call in (lambda: client.models.retrieve("large"), lambda: chat(client, model="large")):
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert refused.value.code == "model_not_found"


def test_a_text_that_is_too_long_or_empty_is_refused_not_cut(client: Any) -> None:
    for text in ("word " * 500, " "):
        with pytest.raises(openai.BadRequestError) as refused:
            embed(client, ["fine", text])
        assert refused.value.param == "input"
