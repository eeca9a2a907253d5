"""What a request asks of the engine, to the last token that fits, and what a reply says about the tokens that came."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")

from python_model import GritLM  # noqa: E402
from python_model.generate.text import conversation_ids, prompt_ids  # noqa: E402
from python_model.serve.engine import Generation, Token  # noqa: E402
from python_model.serve.protocol import (  # noqa: E402
    ApiError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    RerankRequest,
)
from python_model.serve.replies import LEAST_LOGPROB, ChatWriter, CompletionWriter, Trimmed  # noqa: E402
from python_model.serve.service import Limits, Service  # noqa: E402
from tests.python_model.serve.conftest import SteppedEngine, collect  # noqa: E402
from tests.python_model.serve.schedules import alone  # noqa: E402

ROWS, STEP, TEXTS = 200, 96, 18


@pytest.fixture
def service(served_model: GritLM) -> Service:
    engine = SteppedEngine(served_model, arena_rows=ROWS, max_step_tokens=STEP)
    return Service(engine, name="tiny", limits=Limits(reply_tokens=20, texts=TEXTS, seconds=5.0))


def chat(text: str = "What is it?", **options: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": text}], "temperature": 0, **options})


def embedding(given: Any, **options: Any) -> EmbeddingRequest:
    return EmbeddingRequest.model_validate({"input": given, **options})


def test_a_reply_may_fill_the_room_that_its_prompt_leaves(service: Service, served_model: GritLM) -> None:
    length = len(prompt_ids(served_model, "a river"))

    def works(limit: int) -> list[Generation]:
        return service.complete(CompletionRequest.model_validate({"prompt": "a river", "max_tokens": limit}))

    assert [work.max_tokens for work in works(ROWS - length)] == [ROWS - length]
    message = f"prompt: expected prompt and reply within {ROWS} tokens, got {length} and {ROWS - length + 1} new ones"
    with pytest.raises(ApiError, match=message):
        works(ROWS - length + 1)
    service.engine.now = 3.0  # type: ignore[attr-defined]
    (short,) = service.chat(chat())
    assert (short.max_tokens, short.deadline) == (20, 8.0), "the limits of the server"
    words = next(n for n in range(200) if ROWS - len(conversation_ids(served_model, ["it " * n])) < 20)
    room = ROWS - len(conversation_ids(served_model, ["it " * words]))
    (long,) = service.chat(chat("it " * words))
    assert 0 < long.max_tokens == room < 20
    many = next(n for n in range(200) if len(conversation_ids(served_model, ["it " * n])) >= ROWS)
    with pytest.raises(ApiError, match=f"messages: expected prompt and reply within {ROWS} tokens, got 2..$"):
        service.chat(chat("it " * many))


def test_texts_are_limited_in_number_and_in_tokens(service: Service, served_model: GritLM) -> None:
    assert len(service.embed(embedding(["a"] * TEXTS))) == TEXTS
    with pytest.raises(ApiError, match=f"input: expected at most {TEXTS}, got {TEXTS + 1}"):
        service.embed(embedding(["a"] * (TEXTS + 1)))

    def tokens(count: int) -> int:
        return len(served_model.formatter.text("<|embed|>\n", "it " * count, 512))

    fits = max(n for n in range(1, 200) if tokens(n) <= STEP)
    (work,) = service.embed(embedding("it " * fits))
    assert len(work.tokens) == tokens(fits) <= STEP and work.deadline == 5.0
    with pytest.raises(ApiError, match=f"input: expected at most {STEP} tokens, got more"):
        service.embed(embedding("it " * (fits + 1)))
    with pytest.raises(ApiError, match=f"instruction: expected fewer than {STEP} tokens"):
        service.embed(embedding("a", instruction="it " * fits))
    with pytest.raises(ApiError, match="input: expected texts that are not empty, got an empty one"):
        service.embed(embedding(["a", " "]))
    size = len(served_model.tokenizer)
    assert len(service.embed(embedding([[size - 1, 5]]))) == 1
    with pytest.raises(ApiError, match=f"input: expected token ids below {size}"):
        service.embed(embedding([[5, size]]))


@pytest.mark.parametrize(
    ("texts", "priority", "bulk"),
    [(1, None, False), (2, None, True), (1, "bulk", True), (2, "bulk", True), (2, "interactive", False)],
)
def test_a_single_text_is_interactive_unless_its_request_says_otherwise(
    service: Service, texts: int, priority: str | None, bulk: bool
) -> None:
    works = service.embed(embedding(["a river"] * texts, priority=priority))
    assert [work.bulk for work in works] == [bulk] * texts


def test_more_than_sixteen_documents_are_reranked_when_there_is_room(service: Service) -> None:
    for count, bulk in ((1, False), (16, False), (17, True)):
        request = RerankRequest.model_validate({"query": "where", "documents": ["a river"] * count})
        works, _ = service.rerank(request)
        assert [(work.bulk, work.causal, work.deadline) for work in works] == [(bulk, True, 5.0)] * count
    with pytest.raises(ApiError, match=f"documents: expected at most {TEXTS}, got {TEXTS + 1}"):
        service.rerank(RerankRequest.model_validate({"query": "q", "documents": ["a"] * (TEXTS + 1)}))


def test_the_tokenizer_is_held_for_one_text_at_a_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["A river flows.", "Paris is a city.", "A word is short."]
    for prepare, request in (
        (service.rerank, RerankRequest.model_validate({"query": "What flows?", "documents": texts})),
        (service.complete, CompletionRequest.model_validate({"prompt": texts})),
        (service.embed, embedding(texts)),
    ):
        lock = MagicMock()
        monkeypatch.setattr(service, "_lock", lock)
        prepare(request)  # type: ignore[operator]
        assert lock.__enter__.call_count == lock.__exit__.call_count == len(texts), prepare


def test_what_cannot_fit_is_refused_before_it_is_tokenised(
    service: Service, served_model: GritLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(map(len, served_model.tokenizer.get_vocab()))
    monkeypatch.setattr(service, "_lock", None)  # which is held while a text is tokenised
    requests = {
        ("messages", ROWS): lambda text: service.chat(chat(text)),
        ("prompt", ROWS): lambda text: service.complete(CompletionRequest.model_validate({"prompt": text})),
        ("input", STEP): lambda text: service.embed(embedding(text)),
        ("query", STEP): lambda text: service.rerank(RerankRequest.model_validate({"query": text, "documents": ["a"]})),
    }
    for (param, tokens), ask in requests.items():
        with pytest.raises(ApiError, match=f"^{param}: expected at most {tokens} tokens, got more"):
            ask("x" * (tokens * longest + 1))
        with pytest.raises((TypeError, AttributeError)):
            ask("x")


def test_dimensions_reach_from_one_to_all(service: Service) -> None:
    vector = torch.nn.functional.normalize(torch.arange(1.0, service.dimensions + 1), dim=0)
    for dimensions in (None, service.dimensions):
        assert service.shape(vector, dimensions) is vector
        service.embed(embedding("a", dimensions=dimensions))
    torch.testing.assert_close(service.shape(vector, 2), torch.tensor([1.0, 2.0]) / 5**0.5)
    with pytest.raises(ApiError, match=f"dimensions: expected at most {service.dimensions}"):
        service.embed(embedding("a", dimensions=service.dimensions + 1))


def replied(service: Service, works: list[Generation], writer: Any) -> dict[str, Any]:
    """The reply after the engine has done all."""
    events = [collect(work) for work in works]
    service.engine.submit(works)
    service.engine.run()  # type: ignore[attr-defined]
    for index, found in enumerate(events):
        for event in found:
            writer.add(index, event)
    request: Any = SimpleNamespace(state=SimpleNamespace())
    whole: dict[str, Any] = writer.whole(writer.usage(request))
    assert request.state.usage.items() <= whole["usage"].items()
    return whole


def test_a_chats_log_probabilities_are_those_of_the_model(service: Service, served_model: GritLM) -> None:
    request = chat(max_tokens=6, logprobs=True, top_logprobs=3, n=2)
    works = service.chat(request)
    prompt = works[0].tokens[:]
    found = replied(service, works, ChatWriter(service, request, works))
    new = works[0].tokens[len(prompt) :]
    expected = alone(served_model, prompt, new).log_softmax(dim=1)
    for choice in found["choices"]:
        rows = choice["logprobs"]["content"]
        assert [row["token"] for row in rows] == [served_model.tokenizer.decode([token]) for token in new]
        chosen = expected.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert [row["logprob"] for row in rows] == pytest.approx(chosen.tolist(), abs=1e-4)
        for row, best in zip(rows, expected.topk(3).values, strict=True):
            assert [top["logprob"] for top in row["top_logprobs"]] == pytest.approx(best.tolist(), abs=1e-4)
            assert row["bytes"] is None or bytes(row["bytes"]).decode() == row["token"]
        assert any(row["bytes"] for row in rows)
        assert choice["message"]["content"] == served_model.tokenizer.decode(new, skip_special_tokens=True).strip()
    reused = sum(work.reused for work in works[::2])
    assert found["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 12,
        "total_tokens": len(prompt) + 12,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def test_a_completions_log_probabilities_are_those_of_the_model(service: Service, served_model: GritLM) -> None:
    request = CompletionRequest.model_validate(
        {"prompt": ["a river", "the city"], "max_tokens": 5, "logprobs": 2, "temperature": 0}
    )
    works = service.complete(request)
    prompts = [work.tokens[:] for work in works]
    found = replied(service, works, CompletionWriter(service, request, works))
    for choice, work, prompt in zip(found["choices"], works, prompts, strict=True):
        new = work.tokens[len(prompt) :]
        expected = alone(served_model, prompt, new).log_softmax(dim=1)
        told = choice["logprobs"]
        assert told["tokens"] == [served_model.tokenizer.decode([token]) for token in new]
        chosen = expected.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert told["token_logprobs"] == pytest.approx(chosen.tolist(), abs=1e-4)
        for top, row in zip(told["top_logprobs"], expected, strict=True):
            alike: dict[str, list[float]] = {}
            for place in row.topk(2).indices.tolist():
                alike.setdefault(served_model.tokenizer.decode([place]), []).append(float(row[place]))
            assert top == pytest.approx({text: max(values) for text, values in alike.items()}, abs=1e-4)
        lengths = [len(text) for text in told["tokens"]]
        assert told["text_offset"] == [sum(lengths[:place]) for place in range(5)]
    assert found["usage"]["prompt_tokens"] == sum(map(len, prompts)) and found["usage"]["completion_tokens"] == 10


def test_a_completion_is_streamed_with_its_log_probabilities(service: Service) -> None:
    def chunks(token: Token, **options: Any) -> list[dict[str, Any]]:
        request = CompletionRequest.model_validate({"prompt": "a", "stream": True, **options})
        return CompletionWriter(service, request, service.complete(request)).chunks(0, token)

    (scored,) = chunks(Token(5, "x", -1.0, ((5, -1.0), (6, -2.0))), logprobs=2)
    assert scored["choices"][0]["text"] == "x" and scored["choices"][0]["logprobs"]["token_logprobs"] == [-1.0]
    (unfinished,) = chunks(Token(5, "", -1.0, ((5, -1.0),)), logprobs=1)
    assert unfinished["choices"][0]["logprobs"]["token_logprobs"] == [-1.0], "a token whose text is not complete yet"
    (plain,) = chunks(Token(5, "x"))
    assert (plain["choices"][0]["text"], plain["choices"][0]["logprobs"]) == ("x", None)
    assert chunks(Token(5, "")) == []
    (last,) = chunks(Token(None, "", finish="stop"))
    assert last["choices"][0]["finish_reason"] == "stop"


def test_json_has_a_number_for_a_token_that_cannot_be(service: Service) -> None:
    never = Token(5, "x", float("-inf"), ((5, float("-inf")), (6, -1.0)), "length")
    request = chat(logprobs=True, top_logprobs=2)
    works = service.chat(request)
    writer = ChatWriter(service, request, works)
    writer.add(0, never)
    (row,) = writer.whole({})["choices"][0]["logprobs"]["content"]
    assert row["logprob"] == LEAST_LOGPROB
    assert [top["logprob"] for top in row["top_logprobs"]] == [LEAST_LOGPROB, -1.0]
    asked = CompletionRequest.model_validate({"prompt": "a", "logprobs": 2})
    plain = CompletionWriter(service, asked, service.complete(asked))
    plain.add(0, never)
    told = plain.whole({})["choices"][0]["logprobs"]
    assert told["token_logprobs"] == [LEAST_LOGPROB] and sorted(told["top_logprobs"][0].values()) == [
        LEAST_LOGPROB,
        -1.0,
    ]


@given(st.lists(st.text(alphabet="ab \n\t", max_size=5)))
def test_pieces_of_a_text_add_up_to_it_without_the_white_space_around_it(pieces: list[str]) -> None:
    trimmed, whole = Trimmed(), ""
    for number, piece in enumerate(pieces):
        whole += trimmed.push(piece)
        assert whole == "".join(pieces[: number + 1]).strip(), "all that cannot be trailing is released at once"
