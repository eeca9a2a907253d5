"""The load of :mod:`bench.serve`: chats and texts to embed, from clients that always wait or arriving at random times."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.serve_systems import Running


@dataclass
class Measured:
    """What one run under load measured, in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    texts: list[float] = field(default_factory=list)
    tokens: int = 0
    finished_chats: int = 0
    finished_texts: int = 0
    failed: int = 0
    seconds: float = 0.0
    text_seconds: float | None = None  # until the last text was finished, where it is not the end of the load


def words(source: random.Random, tokens: int) -> str:
    """A text of about this many tokens, different each time."""
    known = "river city word light stone paper number garden music letter window bread road winter".split()
    return " ".join(source.choice(known) for _ in range(tokens))


async def chat(
    client: Any, running: Running, source: random.Random, arguments: argparse.Namespace, found: Measured
) -> None:
    body = {
        **running.fields,
        "messages": [{"role": "user", "content": f"Write about this: {words(source, source.choice(arguments.words))}"}],
        "max_tokens": arguments.reply_tokens,
        "temperature": 0,
        "stream": True,
    }
    start = last = time.perf_counter()
    count, usage = 0, None
    async with client.stream("POST", f"{running.chats}/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            found.failed += 1
            return
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line.removeprefix("data: "))
            usage = data.get("usage") or usage
            choices = data.get("choices") or [{}]
            if not choices[0].get("delta", {}).get("content"):
                continue
            now = time.perf_counter()
            (found.between if count else found.first).append(now - (last if count else start))
            last = now
            count += 1
            found.tokens += 1
    if usage is None:  # the stream broke off
        found.failed += 1
    else:
        found.finished_chats += 1
        found.tokens += usage["completion_tokens"] - count  # a chunk may hold several tokens


async def vectors(client: Any, running: Running, texts: Sequence[str]) -> list[list[float]] | None:
    """The embeddings of texts, None if the server refused."""
    reply = await client.post(f"{running.texts}/v1/embeddings", json={"input": list(texts)})
    return [row["embedding"] for row in reply.json()["data"]] if reply.status_code == 200 else None


async def embed(
    client: Any, running: Running, source: random.Random, arguments: argparse.Namespace, found: Measured
) -> None:
    texts = [words(source, source.choice(arguments.words)) for _ in range(arguments.texts_per_request)]
    start = time.perf_counter()
    if await vectors(client, running, texts) is None:
        found.failed += 1
    else:
        found.texts.append(time.perf_counter() - start)
        found.finished_texts += len(texts)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Any]:
    """A client without limits."""
    import httpx

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        yield client


async def busy(running: Running, arguments: argparse.Namespace, seconds: float, seed: int) -> Measured:
    """A closed load for ``seconds``: ``--clients`` chats and as many requests to embed are always open."""
    found = Measured()

    async def again(client: Any, request: Any, source: random.Random) -> None:
        while True:
            await request(client, running, source, arguments, found)
            if request is embed:  # all clients may wait for the same batch
                found.text_seconds = time.perf_counter() - begin

    async with connected() as client:
        begin = time.perf_counter()
        sources = [random.Random(seed + number) for number in range(2 * arguments.clients)]
        tasks = [asyncio.create_task(again(client, (chat, embed)[i % 2], s)) for i, s in enumerate(sources)]
        ended, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        found.seconds = time.perf_counter() - begin
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in ended:
            task.result()  # requests only end early by an error
    return found


async def load(running: Running, arguments: argparse.Namespace, per_cent: float, seconds: float, seed: int) -> Measured:
    """An open load for ``seconds``; requests that have not ended ``--patience`` seconds later count as failed."""
    found = Measured()
    source = random.Random(seed)
    arrivals = []
    for rate, request in ((arguments.chats, chat), (arguments.texts / arguments.texts_per_request, embed)):
        now = source.expovariate(rate * per_cent / 100)
        while now < seconds:
            arrivals.append((now, request, source.randrange(2**31)))
            now += source.expovariate(rate * per_cent / 100)
    async with connected() as client:
        begin = time.perf_counter()
        tasks = []
        for when, request, number in sorted(arrivals, key=lambda arrival: arrival[0]):
            await asyncio.sleep(max(0.0, begin + when - time.perf_counter()))
            tasks.append(asyncio.create_task(request(client, running, random.Random(number), arguments, found)))
        if tasks:
            done, late = await asyncio.wait(
                tasks, timeout=max(0.1, seconds + arguments.patience - (time.perf_counter() - begin))
            )
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            found.failed += len(late) + sum(task.exception() is not None for task in done)
        found.seconds = max(seconds, time.perf_counter() - begin)
    return found
