"""The server under load: clients that vanish, ten times too many requests, processes that are stopped and killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from python_model import GritLM  # noqa: E402
from python_model.generate.text import reply  # noqa: E402
from python_model.serve.service import Limits  # noqa: E402
from tests.python_model.serve.server import serving, wait_until  # noqa: E402

pytestmark = pytest.mark.load
CHAT = "/v1/chat/completions"


def question(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 20, **options}


async def vanish(url: str, source: random.Random) -> None:
    """A request whose client goes at a random moment: while it sends, waits or reads."""
    host, port = url.removeprefix("http://").split(":")
    path, body = source.choice(
        [
            (CHAT, question("What is a city? " * source.randrange(1, 6), stream=True)),
            (CHAT, question("What is a river?", n=2)),
            ("/v1/embeddings", {"input": ["a river " * source.randrange(1, 20)] * source.randrange(1, 9)}),
            ("/v1/rerank", {"query": "city", "documents": ["a city", "a river"]}),
        ]
    )
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    raw = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        if source.random() < 0.2:
            raw = raw[: source.randrange(len(raw))]
        writer.write(raw)
        await writer.drain()
        with_read = asyncio.wait_for(reader.read(1 << 16), source.expovariate(1 / 0.1))
        await asyncio.gather(with_read, return_exceptions=True)
    finally:
        if source.random() < 0.5:  # a reset instead of an orderly end
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()


def test_a_thousand_clients_that_vanish_leave_nothing_behind(served_model: GritLM) -> None:
    async def all_of_them(url: str) -> None:
        gate = asyncio.Semaphore(20)

        async def one(number: int) -> None:
            async with gate:
                await asyncio.gather(vanish(url, random.Random(number)), return_exceptions=True)

        await asyncio.gather(*(one(number) for number in range(1000)))

    with serving(served_model, arena_rows=600, reuse=False) as running:
        expected = reply(served_model, ["What is a river?"], max_new_tokens=20)
        asyncio.run(all_of_them(running.url))
        running.settle(60)
        engine = running.engine
        assert engine.arena.used == 0 and engine.scheduler.queued_tokens == 0 and engine.alive
        found = httpx.post(f"{running.url}{CHAT}", json=question("What is a river?"), timeout=30)
        assert found.json()["choices"][0]["message"]["content"] == expected


def test_ten_times_too_many_requests_are_refused_or_right_and_nobody_hangs(served_model: GritLM) -> None:
    """What is accepted equals the result alone; what is refused says when to come back; memory stays as it was."""
    texts = [f"What is the number {i}?" for i in range(10)]
    expected = [reply(served_model, [text], max_new_tokens=20) for text in texts]
    limits = Limits(requests=400)
    with serving(served_model, arena_rows=500, max_queued_tokens=600, limits=limits) as running:
        with httpx.Client(timeout=120, limits=httpx.Limits(max_connections=200)) as client:

            def ask(number: int) -> tuple[int, int, str]:
                found = client.post(f"{running.url}{CHAT}", json=question(texts[number % 10]))
                if found.status_code == 200:
                    return number, 200, found.json()["choices"][0]["message"]["content"]
                assert int(found.headers["retry-after"]) >= 1
                return number, found.status_code, ""

            with ThreadPoolExecutor(150) as pool:
                answers = list(pool.map(ask, range(600)))
        assert {status for _, status, _ in answers} == {200, 429}
        assert all(text == expected[number % 10] for number, status, text in answers if status == 200)
        running.settle()
        engine = running.engine
        assert engine.arena.used == sum(sequence.done for sequence in engine.scheduler.held) <= 500


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(checkpoint: Path, port: int, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "python_model.cli", "serve", "--model", str(checkpoint), "--dtype", "float32"]
    command += ["--port", str(port), "--kv-tokens", "1000", "--max-step-tokens", "128", "--threads", "1", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert running.poll() is None, running.communicate()[0]
        try:
            return bool(httpx.get(f"{url}/ready").status_code == 200)
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, 120, "the server did not start")
        yield running, url
    finally:
        running.kill()
        running.wait()


def test_a_stopped_server_finishes_the_stream_it_is_writing(checkpoint: Path) -> None:
    with process(checkpoint, free_port()) as (running, url):
        body = question("What is a city?", max_tokens=400, stream=True)
        with httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
        assert running.wait(30) in (0, -signal.SIGTERM)


def test_a_server_that_was_killed_starts_again_at_the_same_place(checkpoint: Path) -> None:
    port = free_port()
    answers = []
    for _ in range(2):
        with process(checkpoint, port) as (running, url):
            answers.append(httpx.post(f"{url}{CHAT}", json=question("What is a city?"), timeout=60).json())
            body = question("What is a city?", max_tokens=400, stream=True)
            with httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                running.send_signal(signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    list(lines)
            assert running.wait(30) == -signal.SIGKILL
    assert answers[0]["choices"] == answers[1]["choices"]


def test_a_large_backlog_of_texts_does_not_hold_up_a_chat(served_model: GritLM) -> None:
    """While thousands of bulk texts wait, a chat's tokens come as steps end, not when the backlog does."""
    with serving(served_model, slow=0.005, limits=Limits(texts=4000)) as running:
        with ThreadPoolExecutor(1) as pool:
            texts = [f"a text about the number {i} " * 3 for i in range(3000)]
            bulk = pool.submit(httpx.post, f"{running.url}/v1/embeddings", json={"input": texts}, timeout=None)
            wait_until(lambda: running.engine.scheduler.queued_tokens > 10_000)
            found = httpx.post(f"{running.url}{CHAT}", json=question("What is a city?"), timeout=60)
            assert found.status_code == 200 and running.engine.scheduler.queued_tokens > 1000
            assert len(bulk.result().json()["data"]) == 3000
