"""A live server on the loopback address, in a thread of the test process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from python_model import GritLM
from python_model.serve.engine import Engine

CHAT = "/v1/chat/completions"


@dataclass
class Server:
    """``url`` ends without a slash."""

    url: str
    service: Any
    engine: Engine

    def settle(self, seconds: float = 20.0) -> None:
        """Wait until the engine has nothing left to do."""
        wait_until(lambda: self.engine.scheduler.idle, seconds, "the engine is busy")


def wait_until(condition: Callable[[], bool], seconds: float = 20.0, what: str = "it did not happen") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@contextlib.contextmanager
def serving(
    model: GritLM,
    *,
    api_keys: list[str] | None = None,
    hosts: list[str] | None = None,
    prepare: Callable[[Any], None] | None = None,
    limits: Any = None,
    query_instruction: str = "",
    format: Any = "grit",
    slow: float = 0.0,
    **options: Any,
) -> Iterator[Server]:
    """Serve ``model``; ``slow``: seconds that each step takes more, ``prepare`` gets the service before the start."""
    import uvicorn

    from python_model.serve.app import create_app
    from python_model.serve.service import Service

    engine = Engine(model, **{"arena_rows": 1000, "max_step_tokens": 128, **options})
    if slow:
        step = engine.packed_step

        class Slow:
            logits, label_losses = step.logits, step.label_losses

            def __call__(self, items: Any) -> Any:
                time.sleep(slow)
                return step(items)

        engine.packed_step = Slow()  # type: ignore[assignment]
    service = Service(engine, name="tiny", limits=limits, query_instruction=query_instruction, format=format)
    if prepare is not None:
        prepare(service)
    app = create_app(service, api_keys=api_keys or [], hosts=hosts or [])
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1, server_header=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", service, engine)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not engine.alive


def question(text: str = "What is a river?", **options: Any) -> dict[str, Any]:
    """The body of a chat."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **options}


def post(server: Server, path: str, body: Any = None, **options: Any) -> Any:
    import httpx

    return httpx.post(f"{server.url}{path}", **({"json": body} if body is not None else {}), timeout=30, **options)


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
