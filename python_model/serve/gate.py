"""What every request passes through: checks of key, host, body size and number of requests, and a log without contents."""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from python_model.serve.protocol import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from python_model.serve.metrics import Metrics
    from python_model.serve.service import Limits

access = logging.getLogger("python_model.serve.access")

OPEN_PATHS = frozenset({"/", "/page.js", "/page.css", "/health", "/ready"})
"""Paths served without a key: nothing there depends on the model or on other requests."""


class Gate:
    """ASGI middleware; see the top of the file. Refusals have the same format as any other error."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, api_keys: Sequence[str], hosts: Sequence[str], limits: Limits
    ) -> None:
        self.app, self.metrics, self.limits = app, metrics, limits
        self.keys, self.hosts = [key.encode() for key in api_keys], set(hosts)
        self.open = 0
        self.process = uuid.uuid4().hex[:12].encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, identity = time.perf_counter(), 500, uuid.uuid4().hex
        read = 0
        started = refused = False

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limits.body_bytes:
                raise self._too_large()
            return message

        async def counted(message: Message) -> None:
            nonlocal status, started
            if read > self.limits.body_bytes and not refused:
                return  # however the application reacts to a body that ends early
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", identity.encode()),
                    (b"x-served-by", self.process),  # distinguishes replicas
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        self.open += 1
        try:
            self._check(scope)
            await self.app(scope, limited, counted)
            if read > self.limits.body_bytes:
                raise self._too_large()
        except ApiError as error:
            refused = True
            if not started:
                await _refuse(counted, error)
        finally:
            self.open -= 1
            seconds = time.perf_counter() - start
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.request(endpoint, status, seconds)
            row = {
                "time": round(time.time(), 3),
                "id": identity,
                "method": scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other",
                "endpoint": endpoint,
                "status": status,
                "seconds": round(seconds, 4),
                "body_bytes": read,
                **scope.get("state", {}).get("usage", {}),
            }
            access.info(json.dumps(row))

    def _check(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts and _name(host) not in self.hosts:
            raise ApiError(403, "host: expected a name of this server", code="host")
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] != "GET":
            # a page of another site in a local browser
            if urlsplit(origin.decode("latin-1").lower()).netloc != host:
                raise ApiError(403, "origin: expected this server's own pages", code="origin")
        if self.keys and scope["path"] not in OPEN_PATHS:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            known = [hmac.compare_digest(given.strip(), key) for key in self.keys]
            if kind.lower() != b"bearer" or not any(known):
                raise ApiError(401, "authorization: expected 'Bearer' and a valid API key", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.body_bytes:
            raise self._too_large()
        if self.open > self.limits.requests:
            raise ApiError(
                429, f"the server already has {self.limits.requests} open requests", code="requests", retry_after=1
            )

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self.limits.body_bytes} bytes, got more", code="body_too_large")


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    return host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host


async def _refuse(send: Any, error: ApiError) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(round(error.retry_after)).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
