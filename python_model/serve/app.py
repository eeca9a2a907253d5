"""The HTTP side: endpoints, streams, and the gate that every request passes (key, host, size, log)."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from python_model.serve import protocol as p
from python_model.serve.engine import Engine, Event, Failure, Generation, Score, TextWork, Token, Vector
from python_model.serve.gate import Gate
from python_model.serve.metrics import Metrics
from python_model.serve.replies import ChatWriter, CompletionWriter, Trimmed, usage_of
from python_model.serve.scheduler import QueueFull
from python_model.serve.service import Service

PAGE = Path(__file__).parent / "page"
THREADS = 8
"""Threads that check and tokenise requests; each keeps memory of its own."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": p.Error} for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)
}
_STREAMED = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "Each server-sent event; its data is a piece of the reply as JSON, and at the end [DONE].",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
    }
}

_Result = TypeVar("_Result", Vector, Score)


class ClientGone(Exception):
    """The client has closed its connection."""


class Results:
    """The events of a request's works, in the event loop; ending the iteration early cancels the rest."""

    def __init__(self, engine: Engine, works: Sequence[TextWork | Generation]) -> None:
        self.engine, self.works = engine, works
        self._left = len(works)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()  # None: the client is gone
        for index, work in enumerate(works):
            work.sink = partial(self._put, index)

    def _put(self, index: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    async def submit(self) -> None:
        """Submit the works to the engine; ApiError if it does not accept them."""
        try:
            await run_in_threadpool(self.engine.submit, self.works)
        except QueueFull as error:
            raise p.ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from None
        except ValueError as error:
            raise p.ApiError(400, str(error), code="invalid_value") from None
        except RuntimeError as error:
            raise p.ApiError(503, str(error), code="stopping", retry_after=1) from None
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Cancel the works unless all have ended."""
        if self._left:
            self.engine.cancel(self.works)

    async def events(self, request: Request) -> AsyncIterator[tuple[int, Event]]:
        """Yields (index of the work, event) until every work has ended.

        Raises:
            ClientGone: the connection was closed. ApiError: a work failed; the others are cancelled.
        """
        watch = asyncio.ensure_future(self._tell_disconnect(request))
        try:
            while self._left:
                found = await self._queue.get()
                if found is None:
                    raise ClientGone
                index, event = found
                if isinstance(event, Failure):
                    status = {"timeout": 504, "stopped": 503}.get(event.kind, 500)
                    raise p.ApiError(status, event.message, code=event.kind)
                if not isinstance(event, Token) or event.finish is not None:
                    self._left -= 1
                yield index, event
        finally:
            watch.cancel()
            self.close()

    async def all_of(self, kind: type[_Result], request: Request) -> list[_Result]:
        """Submit works that end with one event of this kind each, and wait for all; in the order of the works."""
        await self.submit()
        found: dict[int, _Result] = {}
        async for index, event in self.events(request):
            assert isinstance(event, kind)
            found[index] = event
        return [found[index] for index in range(len(self.works))]

    async def _tell_disconnect(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)


def create_app(
    service: Service,
    *,
    metrics: Metrics | None = None,
    api_keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    on_index: Callable[[str], Awaitable[Any]] | None = None,
) -> FastAPI:
    """The application. It starts and stops the service's engine.

    Args:
        api_keys: keys accepted as ``Authorization: Bearer``; none: no key is required.
        hosts: names accepted in the Host header (a protection against scripts of other sites in local browsers); none: all.
        on_index: awaited with the name of every index that is queried.
    """
    metrics = metrics or Metrics()
    engine = service.engine
    engine.metrics = metrics

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        current_default_thread_limiter().total_tokens = THREADS
        engine.start()
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(
        title="grit serve",
        description="Chat and embeddings from one copy of the weights, in the formats of the OpenAI and Cohere APIs.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    app.add_middleware(Gate, metrics=metrics, api_keys=list(api_keys), hosts=list(hosts), limits=service.limits)
    _handle_errors(app)
    _add_model_endpoints(app, service)
    _add_rag(app, service, on_index)
    _add_status_endpoints(app, service, metrics)
    return app


def _handle_errors(app: FastAPI) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, p.ApiError)
        headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
        return JSONResponse(error.body, error.status, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await api_error(request, p.validation_error(list(error.errors())))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = "body: expected valid JSON in UTF-8" if error.status_code == 400 else str(error.detail)
        return JSONResponse(p.error_body(error.status_code, message), error.status_code, error.headers)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    async def unexpected(request: Request, error: Exception) -> Response:
        return JSONResponse(p.error_body(500, "an error in the server"), 500)

    app.add_exception_handler(p.ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, unexpected)


def _add_model_endpoints(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.post("/v1/chat/completions", response_model=p.ChatReply, responses={200: {"content": _STREAMED}})
    async def chat_completions(body: p.ChatRequest, request: Request) -> Any:
        """A conversation's next turn; with ``stream`` as server-sent events."""
        service.check_model(body.model)
        works = await run_in_threadpool(service.chat, body)
        return await _generate(request, engine, works, ChatWriter(service, body, works), body)

    @app.post("/v1/completions", response_model=p.CompletionReply, responses={200: {"content": _STREAMED}})
    async def completions(body: p.CompletionRequest, request: Request) -> Any:
        """The continuation of each prompt, as plain text."""
        service.check_model(body.model)
        works = await run_in_threadpool(service.complete, body)
        return await _generate(request, engine, works, CompletionWriter(service, body, works), body)

    @app.post("/v1/embeddings", response_model=p.EmbeddingReply)
    async def embeddings(body: p.EmbeddingRequest, request: Request) -> Any:
        """Vectors of texts."""
        service.check_model(body.model)
        works = await run_in_threadpool(service.embed, body)
        rows: list[Any] = []
        for event in await Results(engine, works).all_of(Vector, request):
            vector = service.shape(event.vector, body.dimensions)
            if body.encoding_format == "base64":
                rows.append(base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode())
            else:
                rows.append(vector.tolist())
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        usage = usage_of(request, sum(len(work.tokens) for work in works))
        return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})

    @app.post("/v1/rerank", response_model=p.RerankReply)
    @app.post("/v2/rerank", response_model=p.RerankReply)
    async def rerank(body: p.RerankRequest, request: Request) -> Any:
        """Documents by their relevance to a query."""
        service.check_model(body.model)
        works, truncated = await run_in_threadpool(service.rerank, body)
        scores = [event.score for event in await Results(engine, works).all_of(Score, request)]
        order = sorted(range(len(works)), key=lambda i: -scores[i])[: body.top_n]
        found: list[dict[str, Any]] = [
            {"index": i, "relevance_score": math.exp(scores[i]), "truncated": truncated[i]} for i in order
        ]
        if body.return_documents:
            for row in found:
                row["document"] = {"text": body.texts[row["index"]]}
        usage = usage_of(request, sum(len(work.tokens) for work in works))
        meta: dict[str, Any] = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        if cut := sum(truncated):
            what = (
                f"{cut} of {len(works)} documents are longer than max_tokens_per_doc ({body.max_tokens_per_doc} tokens)"
            )
            meta["warnings"] = [f"{what}; what follows is ignored"]
        identity = f"rerank-{uuid.uuid4().hex}"
        return JSONResponse({"id": identity, "model": service.name, "results": found, "usage": usage, "meta": meta})


def _add_rag(app: FastAPI, service: Service, on_index: Callable[[str], Awaitable[Any]] | None) -> None:
    engine = service.engine

    @app.post("/v1/rag", response_model=p.RagReply, responses={200: {"content": _STREAMED}})
    async def rag(body: p.RagRequest, request: Request) -> Any:
        """An answer from the documents of an index, with its sources; with ``stream`` the sources come first."""
        service.check_model(body.model)
        if not engine.generates:
            raise p.ApiError(400, "model: expected one that generates, for answering", param="model")
        where = service.searchable(body.index)
        if on_index is not None:
            await on_index(where.name)
        hits: list[Any] = []
        question_tokens = 0
        if body.mode != "none":
            question = await run_in_threadpool(service.question, body, where)
            question_tokens = len(question.tokens)
            results = Results(engine, [question])
            await results.submit()
            async for _, event in results.events(request):
                assert isinstance(event, Vector)
                hits = await run_in_threadpool(service.search, where, body.question, event.vector, body.k)
        work, mode = await run_in_threadpool(service.answer, body, where, hits)
        sources = [
            {"index": i, "id": h.document.key, "title": h.document.title, "text": h.document.text, "score": h.score}
            for i, h in enumerate(hits)
        ]
        results = Results(engine, [work])
        await results.submit()
        identity, created = f"rag-{uuid.uuid4().hex}", int(time.time())
        head = {"id": identity, "created": created, "model": service.name}
        text = Trimmed()

        def last(finish: str | None, completion: int) -> dict[str, Any]:
            usage = usage_of(request, question_tokens + work.prompt, completion, work.reused)
            return {"finish_reason": finish, "usage": usage}

        async def pieces() -> AsyncIterator[dict[str, Any]]:
            yield {"object": "rag.sources", **head, "mode": mode, "sources": sources}
            count = 0
            async for _, event in results.events(request):
                assert isinstance(event, Token)
                count += event.token is not None
                yield {"object": "rag.chunk", **head, "delta": text.push(event.text)}
                if event.finish is not None:
                    yield {"object": "rag.end", **head, **last(event.finish, count)}

        if body.stream:
            return EventStream(results, pieces())
        answer, end = "", {}
        async for piece in pieces():
            answer += piece.get("delta", "")
            end = piece
        return JSONResponse(
            {
                "object": "rag.answer",
                **head,
                "answer": answer,
                "mode": mode,
                "sources": sources,
                "finish_reason": end["finish_reason"],
                "usage": end["usage"],
            }
        )


def _add_status_endpoints(app: FastAPI, service: Service, metrics: Metrics) -> None:
    engine = service.engine

    def card() -> dict[str, Any]:
        return p.ModelCard(id=service.name, created=service.created, indexes=list(service.indexes)).model_dump()

    @app.get("/v1/models", response_model=p.ModelList)
    async def models() -> Any:
        """The model that is served."""
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}", response_model=p.ModelCard)
    async def model(name: str) -> Any:
        """One model."""
        service.check_model(name)
        return card()

    @app.get("/health", responses={200: {"content": {"application/json": {}}}})
    async def health() -> Any:
        """Whether the process works."""
        if not engine.alive:
            raise p.ApiError(503, "the engine has stopped", code="engine")
        return {"status": "ok"}

    @app.get("/ready", responses={200: {"content": {"application/json": {}}}})
    async def ready() -> Any:
        """Whether requests are accepted."""
        if not engine.accepts:
            raise p.ApiError(503, "the server accepts no requests", code="not_ready")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics_page() -> Any:
        """For Prometheus."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    for path, name, kind in (
        ("/", "index.html", "text/html"),
        ("/page.js", "page.js", "text/javascript"),
        ("/page.css", "page.css", "text/css"),
    ):
        app.add_api_route(path, partial(_page, name, kind), include_in_schema=False)


async def _page(name: str, kind: str) -> Response:
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Cache-Control": "no-cache"}
    return FileResponse(PAGE / name, media_type=kind, headers=headers)


async def _generate(
    request: Request, engine: Engine, works: list[Generation], writer: ChatWriter | CompletionWriter, body: Any
) -> Response:
    results = Results(engine, works)
    await results.submit()
    if body.stream:

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            for chunk in writer.opening():
                yield chunk
            async for index, event in results.events(request):
                assert isinstance(event, Token)
                if writer.spells:
                    found = await run_in_threadpool(writer.chunks, index, event)
                else:
                    found = writer.chunks(index, event)
                for chunk in found:
                    yield chunk
            usage = writer.usage(request)
            if body.stream_options is not None and body.stream_options.include_usage:
                yield writer.closing(usage)

        return EventStream(results, chunks())
    async for index, event in results.events(request):
        assert isinstance(event, Token)
        writer.add(index, event)
    usage = writer.usage(request)
    return JSONResponse(await run_in_threadpool(writer.whole, usage) if writer.spells else writer.whole(usage))


class EventStream(StreamingResponse):
    """Server-sent events; an error after the first one is sent as an event."""

    def __init__(self, results: Results, pieces: AsyncIterator[dict[str, Any]]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(pieces), media_type="text/event-stream", headers=headers)
        self._results = results

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; whatever ends this early cancels the works."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._results.close()  # where the head cannot be sent, the iteration never begins

    @staticmethod
    async def _lines(pieces: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
        try:
            async for piece in pieces:
                yield b"data: " + json.dumps(piece, ensure_ascii=False).encode() + b"\n\n"
        except p.ApiError as error:
            yield b"data: " + json.dumps(error.body).encode() + b"\n\n"
        except ClientGone:
            return
        yield b"data: [DONE]\n\n"
