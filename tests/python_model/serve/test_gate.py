"""The gate alone, around an application that reads the whole body: sizes to the byte, headers of refusals, the log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest

pytest.importorskip("pydantic")

from python_model.serve.gate import Gate, _name  # noqa: E402
from python_model.serve.protocol import ApiError  # noqa: E402

LIMIT = 10


class Noted:
    """Metrics that remember what they are told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int, float]] = []

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        self.requests.append((endpoint, status, seconds))


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def gate(app: Any = echo, **options: Any) -> tuple[Gate, Noted]:
    from python_model.serve.service import Limits

    noted = Noted()
    settings: dict[str, Any] = {"api_keys": [], "hosts": [], "limits": Limits(body_bytes=LIMIT, requests=2), **options}
    return Gate(app, metrics=noted, **settings), noted  # type: ignore[arg-type]


def asked(
    gate: Gate, pieces: list[bytes], *, method: str = "POST", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to a request in pieces."""
    left, sent = list(pieces), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/v1/models", "headers": given}
    asyncio.run(gate(scope, receive, send))  # type: ignore[arg-type]
    start, *rest = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(message["body"] for message in rest)


def test_a_body_may_have_as_many_bytes_as_the_limit_says() -> None:
    whole = [b"12345", b"67890"]
    assert asked(gate()[0], whole)[::2] == (200, b"1234567890")
    assert asked(gate()[0], whole, content_length="10")[0] == 200
    for pieces, headers in (
        ([*whole, b"x"], {}),
        (whole, {"content_length": "11"}),
        (whole, {"content_length": "ten"}),
    ):
        status, _, body = asked(gate()[0], pieces, **headers)
        assert status == 413 and json.loads(body)["error"]["code"] == "body_too_large"


def test_a_refusal_says_what_to_do() -> None:
    keyed, noted = gate(api_keys=["secret"])
    status, headers, _ = asked(keyed, [b""])
    assert status == 401 and headers["www-authenticate"] == "Bearer" and "retry-after" not in headers
    assert asked(keyed, [b""], authorization="bearer  secret")[0] == 200
    status, headers, body = asked(gate(hosts=["here"])[0], [b""], host="there")
    assert status == 403 and "www-authenticate" not in headers and headers["content-length"] == str(len(body))
    assert headers["x-content-type-options"] == "nosniff" and len(headers["x-request-id"]) == 32
    assert [request[:2] for request in noted.requests] == [("other", 401), ("other", 200)]


def test_requests_beyond_the_limit_are_told_to_come_back() -> None:
    busy, _ = gate()
    found = []
    for others in (1, 2):
        busy.open = others
        status, headers, _ = asked(busy, [b""])
        found.append((status, headers.get("retry-after")))
        assert busy.open == others, "the request is over"
    assert found == [(200, None), (429, "1")]


def test_a_row_of_the_log_has_the_figures_of_its_request(caplog: pytest.LogCaptureFixture) -> None:
    async def uses(scope: Any, receive: Any, send: Any) -> None:
        scope["state"] = {"usage": {"prompt_tokens": 3}}
        await asyncio.sleep(0.02)
        await echo(scope, receive, send)

    mine, noted = gate(uses)
    with caplog.at_level(logging.INFO, logger="python_model.serve.access"):
        begin = time.perf_counter()
        _, headers, _ = asked(mine, [b"123", b"4"], method="BREW")
        whole = time.perf_counter() - begin
        asked(mine, [b""], method="GET")
    first, second = (json.loads(record.getMessage()) for record in caplog.records)
    assert (first["method"], second["method"]) == ("other", "GET") and first["body_bytes"] == 4
    assert (first["status"], first["prompt_tokens"], first["id"]) == (200, 3, headers["x-request-id"])
    assert 0.02 <= first["seconds"] <= whole + 1e-4 and noted.requests[0][2] == pytest.approx(
        first["seconds"], abs=1e-4
    )
    assert abs(first["time"] - time.time()) < 3600


def test_an_error_after_the_answer_has_begun_is_not_a_second_answer() -> None:
    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ApiError(500, "too late")

    assert asked(gate(breaks)[0], [b""])[0] == 200


@pytest.mark.parametrize(
    ("host", "name"),
    [("here", "here"), ("here:80", "here"), ("127.0.0.1:1", "127.0.0.1"), ("[::1]", "[::1]"), ("[::1]:80", "[::1]")],
)
def test_the_name_of_a_host_is_what_stands_before_the_port(host: str, name: str) -> None:
    assert _name(host) == name
