"""Clients that go, queues that are full, time that is up: what a request holds is free again, and others are answered."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from starlette.requests import ClientDisconnect  # noqa: E402

from python_model import GritLM  # noqa: E402
from python_model.serve.app import EventStream, Results  # noqa: E402
from python_model.serve.service import Limits  # noqa: E402
from tests.python_model.serve.server import (  # noqa: E402
    CHAT,
    Server,
    error_of,
    post,
    question,
    serving,
    wait_until,
)


def raw_request(server: Server, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_memory_and_its_place(served_model: GritLM, stream: bool) -> None:
    with serving(served_model, slow=0.02, arena_rows=400, reuse=False) as running:
        body = question("What is a city?", max_tokens=300, stream=stream)
        first, second = raw_request(running, body), raw_request(running, body)
        scheduler = running.engine.scheduler
        wait_until(lambda: len(scheduler.running) == 1 and len(scheduler.waiting) == 1)
        second.close()  # the one that waits
        wait_until(lambda: not scheduler.waiting)
        assert len(scheduler.running) == 1
        first.close()
        wait_until(lambda: not scheduler.running)
        assert running.engine.arena.used == 0
        assert post(running, CHAT, question()).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/rag"])
def test_a_client_that_goes_before_its_stream_begins_is_not_computed_for(
    served_model: GritLM, documents: tuple[Path, Path], path: str
) -> None:
    from python_model.commands.serve import add_indexes

    works: list[Any] = []
    gone = threading.Event()

    def prepare(service: Any) -> None:
        add_indexes(service, [f"docs={documents[0]}"], [], "")
        name = "chat" if path == CHAT else "answer"
        prepared = getattr(service, name)

        def late(*arguments: Any) -> Any:
            found = prepared(*arguments)
            works.extend(found if path == CHAT else found[:1])
            assert gone.wait(20)
            return found

        setattr(service, name, late)

    body = question(max_tokens=300, stream=True)
    if path != CHAT:
        body = {"question": "What is a river?", "mode": "none", "max_tokens": 300, "stream": True}
    with serving(served_model, slow=0.02, prepare=prepare) as running:
        connection = raw_request(running, body, path)
        wait_until(lambda: len(works) == 1)
        connection.close()
        time.sleep(0.5)  # until the server has noticed
        gone.set()
        wait_until(lambda: works[0].cancelled, what="the reply of a client that is gone is computed to its end")
        running.settle()


def test_a_stream_whose_first_event_cannot_be_sent_cancels_its_works() -> None:
    """The iteration, at whose end works are cancelled, has not begun then."""
    cancelled: list[Any] = []
    engine: Any = SimpleNamespace(cancel=cancelled.append)
    works: list[Any] = [SimpleNamespace()]

    async def pieces() -> AsyncIterator[dict[str, Any]]:
        pytest.fail("the iteration has begun")
        yield {}

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise OSError("the connection is closed")

    async def answer() -> None:
        stream = EventStream(Results(engine, works), pieces())
        await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)

    with pytest.raises(ClientDisconnect):
        asyncio.run(answer())
    assert cancelled == [works]


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_that_wait_for_the_tokenizer_hold_up_nobody_else(served_model: GritLM, stream: bool) -> None:
    works: list[Any] = []

    def prepare(service: Any) -> None:
        chat = service.chat

        def locking(body: Any) -> Any:
            works.extend(chat(body))
            service._lock.acquire()  # as while a long text is tokenised
            return works

        service.chat = locking

    with serving(served_model, prepare=prepare) as running, ThreadPoolExecutor() as pool:
        found = pool.submit(post, running, CHAT, question(logprobs=True, stream=stream))
        wait_until(lambda: bool(works) and works[0].decoding and running.engine.scheduler.idle)
        try:
            time.sleep(0.2)  # until the tokens have reached the event loop
            assert httpx.get(f"{running.url}/health", timeout=30).status_code == 200
            assert not found.done()
        finally:
            running.service._lock.release()
        assert found.result().status_code == 200


def test_a_full_queue_is_a_429_that_says_when_to_come_back(served_model: GritLM) -> None:
    with serving(served_model, slow=0.05, max_queued_tokens=60, max_sequences=1) as running:
        scheduler = running.engine.scheduler
        held = [raw_request(running, question("What is a city? " * 4, max_tokens=200))]
        wait_until(lambda: len(scheduler.running) == 1 and scheduler.queued_tokens == 0)
        held.append(raw_request(running, question("What is a city? " * 4, max_tokens=200)))
        wait_until(lambda: len(scheduler.waiting) == 1)
        found = post(running, CHAT, question("What is a city? " * 4))
        assert found.status_code == 429 and error_of(found)["type"] == "rate_limit_error"
        assert int(found.headers["retry-after"]) >= 1
        for connection in held:
            connection.close()
        running.settle()
        assert post(running, CHAT, question()).status_code == 200


def test_a_request_that_takes_too_long_is_a_504_and_a_stream_says_so(served_model: GritLM) -> None:
    with serving(served_model, slow=0.05, limits=Limits(seconds=0.5)) as running:
        found = post(running, CHAT, question("What is a city?", max_tokens=200))
        assert found.status_code == 504 and error_of(found)["code"] == "timeout"
        text = post(running, CHAT, question("What is a city?", max_tokens=200, stream=True)).text
        assert '"code": "timeout"' in text and text.endswith("data: [DONE]\n\n")
        running.settle()


def test_a_server_that_stops_ends_what_runs_and_refuses_what_comes_with_a_503(served_model: GritLM) -> None:
    with serving(served_model, slow=0.05) as running, ThreadPoolExecutor() as pool:
        for path, told in (("/health", "ok"), ("/ready", "ready")):
            assert httpx.get(f"{running.url}{path}").json() == {"status": told}
        open_one = pool.submit(post, running, CHAT, question("What is a city?", max_tokens=200))
        wait_until(lambda: len(running.engine.scheduler.running) == 1)
        running.engine.close(drain_seconds=0.05)
        ended, refused = open_one.result(), post(running, CHAT, question())
        assert (ended.status_code, error_of(ended)["code"]) == (503, "stopped")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "stopping")
        assert int(refused.headers["retry-after"]) >= 1
        for path, code in (("/health", "engine"), ("/ready", "not_ready")):
            found = httpx.get(f"{running.url}{path}")
            assert (found.status_code, error_of(found)["code"]) == (503, code)


def test_too_many_open_requests_are_a_429(served_model: GritLM) -> None:
    with serving(served_model, slow=0.05, limits=Limits(requests=2)) as running:
        held = [raw_request(running, question("What is a city?", max_tokens=200)) for _ in range(2)]
        wait_until(lambda: len(running.engine.scheduler.running) == 2)
        assert post(running, CHAT, question()).status_code == 429
        for connection in held:
            connection.close()
