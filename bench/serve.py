"""One server for chat and embeddings against two processes, on the same cores under the same mixed load.

    python -m bench.serve --record serve_cpu.json

    one server     grit serve
    two processes  transformers serve --continuous-batching for the chats, and sentence-transformers behind FastAPI, which
                   embeds all waiting texts in batches of its default size

Both serve the same checkpoint in the same dtype to the same requests. The two processes have half of the threads each; all
processes, this one included, run on as many cores as there are threads.

First, clients that always wait for an answer keep both jobs busy: row ``closed``. What the two processes finish then is a load
of 100 (``--chats`` and ``--texts`` fix it instead), so neither of the two idles while the other one is full. The other loads are
open: chats and texts arrive as two Poisson processes whatever the server does. They grow until a system no longer meets the
limits: every request answered, and 99% of the times to first tokens and to embeddings within ``--first-s`` and ``--text-s``;
for the one server also 99% of the times between tokens within those of the two processes at their largest load (or within
``--between-ms``). ``times``: one server's largest load within the limits over that of the two processes, which is the ratio of
both throughputs at the same limits, as all requests are answered.

``memory_mib``: the largest memory so far, with pages of files that processes share counted once. ``cosine``: the least cosine
between a system's vectors and those of the first system.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.common import table, write_records
from python_model.support.quiet import quiet

CLOSED = "closed"

EMBEDDER = """
import asyncio, sys
from contextlib import asynccontextmanager
import torch, uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from sentence_transformers import SentenceTransformer

path, port, threads, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(threads)
model = SentenceTransformer(path, device="cpu", trust_remote_code=True, model_kwargs={"dtype": getattr(torch, dtype)})
waiting = asyncio.Queue()

async def work():
    while True:
        batch = [await waiting.get()]
        while not waiting.empty() and sum(len(texts) for texts, _ in batch) < 64:
            batch.append(waiting.get_nowait())
        texts = [text for part, _ in batch for text in part]
        options = {"prompt_name": "document", "show_progress_bar": False}
        vectors = (await asyncio.to_thread(model.encode, texts, **options)).tolist()
        for part, future in batch:
            found, vectors = vectors[: len(part)], vectors[len(part) :]
            if not future.cancelled():
                future.set_result(found)

@asynccontextmanager
async def lifespan(app):
    task = asyncio.create_task(work())
    yield
    task.cancel()

app = FastAPI(lifespan=lifespan)

@app.post("/v1/embeddings")
async def embeddings(body: dict):
    future = asyncio.get_running_loop().create_future()
    await waiting.put((body["input"], future))
    return JSONResponse({"data": [{"embedding": vector} for vector in await future]})

@app.get("/ready")
async def ready():
    return {}

uvicorn.run(app, port=port, log_level="warning")
"""
"""The peer for embeddings, run as a file of its own so that it imports nothing from this repository."""


@dataclass
class Running:
    """A way to serve: where chats and texts go, the fields that its chats need, and the processes."""

    chats: str
    texts: str
    fields: dict[str, Any]
    processes: list[subprocess.Popen[bytes]]


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


def memory(processes: Sequence[int]) -> float:
    """MiB that the processes hold, with pages of files that they share counted once."""
    own = 0
    files: dict[str, int] = {}
    for process in processes:
        shared: dict[str, int] = {}
        name = ""
        resident = 0
        for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
            if mapping := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)", line):
                name = mapping[1]
            elif line.startswith("Rss:"):
                resident = int(line.split()[1])
            elif line.startswith("Anonymous:"):
                anonymous = int(line.split()[1])
                own += anonymous
                shared[name] = shared.get(name, 0) + resident - anonymous
        for name, size in shared.items():
            files[name] = max(size, files.get(name, 0))
    return (own + sum(files.values())) / 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(commands: dict[str, list[str]], ready: Sequence[str], limit: float = 300.0) -> Iterator[list[Any]]:
    """The processes, once all ``ready`` addresses answer."""
    import httpx

    with tempfile.TemporaryDirectory() as folder:
        logs = {name: Path(folder) / f"{name}.log" for name in commands}
        processes = []
        try:
            for name, command in commands.items():
                with logs[name].open("wb") as file:
                    processes.append(subprocess.Popen(command, stdout=file, stderr=file))
            end = time.monotonic() + limit
            for url in ready:
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if httpx.get(url).status_code < 500:
                            break
                    for (name, log), process in zip(logs.items(), processes, strict=True):
                        if process.poll() is not None:
                            raise RuntimeError(f"{name} ended: {log.read_text(errors='replace')[-2000:]}")
                    if time.monotonic() > end:
                        raise RuntimeError(f"{url} was not ready within {limit:.0f} s")
                    time.sleep(0.2)
            yield processes
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()
                process.wait()


@contextlib.contextmanager
def one_server(arguments: argparse.Namespace, checkpoint: str) -> Iterator[Running]:
    port = free_port()
    command = [sys.executable, "-m", "python_model.cli", "serve", "--model", checkpoint, "--port", str(port)]
    command += ["--dtype", arguments.dtype, "--threads", str(arguments.threads), "--format", "template"]
    command += ["--target-ms", str(arguments.target_ms), "--kv-tokens", str(arguments.kv_tokens)]
    with started({"grit serve": command}, [f"http://127.0.0.1:{port}/ready"]) as processes:
        url = f"http://127.0.0.1:{port}"
        yield Running(url, url, {"stream_options": {"include_usage": True}}, processes)


@contextlib.contextmanager
def two_processes(arguments: argparse.Namespace, checkpoint: str) -> Iterator[Running]:
    chat, embed = free_port(), free_port()
    threads = max(1, arguments.threads // 2)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "export"
        _export(checkpoint, exported)
        script = Path(folder) / "embedder.py"
        script.write_text(EMBEDDER)
        command = [_transformers(), "serve", checkpoint, "--port", str(chat), "--device", "cpu"]
        command += ["--dtype", arguments.dtype]
        if arguments.peer_batching:
            command += ["--continuous-batching", "--cb-num-blocks", str(-(-arguments.kv_tokens // 256))]
        commands = {
            "transformers serve": ["env", f"OMP_NUM_THREADS={threads}", *command],
            "sentence-transformers": [
                sys.executable,
                str(script),
                str(exported),
                str(embed),
                str(threads),
                arguments.dtype,
            ],
        }
        ready = [f"http://localhost:{chat}/health", f"http://127.0.0.1:{embed}/ready"]
        with started(commands, ready) as processes:
            yield Running(f"http://localhost:{chat}", f"http://127.0.0.1:{embed}", {"model": checkpoint}, processes)


SYSTEMS = {"one server": one_server, "two processes": two_processes}
PACKAGES = {
    "one server": ("httpx", "fastapi", "uvicorn", "prometheus_client"),
    # the last three: transformers serve, of transformers[serving]
    "two processes": ("httpx", "fastapi", "uvicorn", "sentence_transformers", "openai", "pydantic", "rich"),
}


def missing_packages(system: str) -> list[str]:
    """Packages that a system needs and this Python lacks."""
    return [name for name in PACKAGES[system] if importlib.util.find_spec(name) is None]


def _transformers() -> str:
    beside = Path(sys.executable).with_name("transformers")
    found = str(beside) if beside.exists() else shutil.which("transformers")
    if found is None:
        raise RuntimeError("transformers serve: the command is missing; pip install 'transformers[serving]'")
    return found


def _export(checkpoint: str, folder: Path) -> None:
    """The checkpoint as a sentence-transformers folder."""
    from python_model.model.export import export_sentence_transformers
    from python_model.model.modeling import GritLM

    export_sentence_transformers(GritLM(checkpoint), folder)


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


class Watch:
    """The largest memory of a system's processes, looked at every few seconds while it is measured."""

    def __init__(self, running: Running) -> None:
        self.processes, self.most = [process.pid for process in running.processes], 0.0

    async def during(self, work: Coroutine[Any, Any, Measured]) -> Measured:
        """The result of ``work``."""

        async def look() -> None:
            while True:
                await asyncio.sleep(3)
                self.most = max(self.most, await asyncio.to_thread(memory, self.processes))

        task = asyncio.create_task(look())
        try:
            return await work
        finally:
            task.cancel()
            self.most = max(self.most, memory(self.processes))


def percentile(values: Sequence[float], part: float) -> float:
    """NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def row(name: str, load: str, found: Measured, arguments: argparse.Namespace) -> dict[str, Any]:
    """A record's row; ``within``: whether the limits were met."""
    asked = found.finished_chats + len(found.texts) + found.failed
    figures = {
        "between_p50_ms": 1e3 * percentile(found.between, 0.5),
        "between_p99_ms": 1e3 * percentile(found.between, 0.99),
        "first_token_p50_s": percentile(found.first, 0.5),
        "first_token_p99_s": percentile(found.first, 0.99),
        "texts_p50_s": percentile(found.texts, 0.5),
        "texts_p99_s": percentile(found.texts, 0.99),
    }
    limits = {
        "between_p99_ms": math.inf if arguments.between_ms is None else arguments.between_ms,
        "first_token_p99_s": arguments.first_s,
        "texts_p99_s": arguments.text_s,
    }
    return {
        "variant": name,
        "load": load,
        "tokens_per_s": found.tokens / found.seconds,
        "texts_per_s": found.finished_texts / (found.text_seconds or found.seconds),
        **figures,
        "failed_share": found.failed / max(1, asked),
        "within": "yes" if not found.failed and not any(figures[name] > limits[name] for name in limits) else "no",
        "tokens_per_chat": found.tokens / max(1, found.finished_chats),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
    }


def least_cosine(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    """The least cosine between two vectors of the same text."""
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(left, right, strict=True)]
    return min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs)


def best(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The row of a system's largest open load within the limits."""
    found = [r for r in rows if r["variant"] == name and r.get("within") == "yes" and r["load"] != CLOSED]
    return max(found, key=lambda r: int(r["load"]), default=None)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both systems at their largest load within the limits, and how one server compares with two processes."""
    one, two = (best(rows, name) for name in SYSTEMS)
    found = [{**row, "load": f"largest within: {row['load']}"} for row in (one, two) if row is not None]
    if one is not None and two is not None:
        found[0]["times"] = int(one["load"]) / int(two["load"])
        found[0]["tokens_times"] = one["tokens_per_s"] / two["tokens_per_s"]
        found[0]["texts_times"] = one["texts_per_s"] / two["texts_per_s"]
        found[0]["memory_share"] = one["memory_mib"] / two["memory_mib"]
    return found


def measure(
    name: str, arguments: argparse.Namespace, checkpoint: str, reference: list[list[float]]
) -> Iterator[dict[str, Any]]:
    """The rows of one system. Where ``--chats`` and ``--texts`` are not given, they become what it finishes when busy; where
    ``--between-ms`` is not given, it becomes the system's own at its largest load within the other limits.
    """
    with SYSTEMS[name](arguments, checkpoint) as running:
        watch = Watch(running)

        async def first() -> list[list[float]]:
            async with connected() as client:
                source = random.Random(0)
                found = await vectors(client, running, [words(source, size) for size in arguments.words])
                assert found is not None, name
                return found

        asyncio.run(busy(running, arguments, 5.0, seed=1))  # warm-up
        here = asyncio.run(first())
        reference[:] = reference or here
        same = {"cosine": least_cosine(here, reference)}
        found = asyncio.run(watch.during(busy(running, arguments, arguments.seconds, seed=2)))
        own = None
        yield row(name, CLOSED, found, arguments) | {"memory_mib": watch.most} | same
        if arguments.chats is None:
            arguments.chats = max(found.tokens / arguments.reply_tokens, 1) / found.seconds
            arguments.texts = max(found.finished_texts, 1) / (found.text_seconds or found.seconds)
        for per_cent in sorted(arguments.loads):
            asyncio.run(first())  # after what was cancelled
            found = asyncio.run(watch.during(load(running, arguments, per_cent, arguments.seconds, seed=per_cent)))
            told = row(name, str(per_cent), found, arguments) | {"memory_mib": watch.most} | same
            yield told
            if told["within"] == "no":
                break
            own = told["between_p99_ms"]
        if arguments.between_ms is None:
            arguments.between_ms = own


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--dtype", default="bfloat16")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    add("--loads", type=int, nargs="+", default=[25, 50, 75, 100, 125, 150, 200, 250, 300, 400], help="in per cent")
    add("--chats", type=float, help="chats per second at a load of 100; default: what the two processes finish")
    add("--texts", type=float, help="texts to embed per second at a load of 100")
    add("--words", type=int, nargs="+", default=[10, 60, 200], help="lengths of prompts and texts")
    add("--texts-per-request", type=int, default=4)
    add("--reply-tokens", type=int, default=32)
    add("--clients", type=int, default=4, help="of each kind, in the closed load")
    add("--seconds", type=float, default=30.0, help="of each load")
    add("--patience", type=float, default=15.0, help="seconds that late requests may take in addition")
    add("--between-ms", type=float, help="limit of the time between tokens, for 99%% of them")
    add("--first-s", type=float, default=5.0, help="limit of the time to the first token, for 99%% of chats")
    add("--text-s", type=float, default=15.0, help="limit of a request to embed, for 99%% of them")
    add("--target-ms", type=float, default=100.0, help="grit serve's target for the time between tokens")
    add("--kv-tokens", type=int, default=8192, help="key-value memory, of grit serve and of --peer-batching")
    add(
        "--peer-batching", action=argparse.BooleanOptionalAction, default=True, help="--continuous-batching of the peer"
    )
    add("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args(argv)
    if (arguments.chats is None) != (arguments.texts is None):
        parser.error("--chats and --texts: expected both or neither")
    quiet()
    from python_model.corpora.small_model import resolve_model

    checkpoint = str(resolve_model(arguments.model))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # inherited by the servers
    rows: list[dict[str, Any]] = []
    reference: list[list[float]] = []
    for name in (system for system in reversed(SYSTEMS) if system in arguments.systems):  # the two define a load of 100
        if missing := missing_packages(name):
            rows.append({"variant": name, "load": "", "note": f"not installed: {', '.join(missing)}"})
            print(table(rows[-1:], list(rows[-1])), flush=True)
            continue
        for told in measure(name, arguments, checkpoint, reference):
            rows.append(told)
            print(table([told], [column for column in told if column not in ("dtype", "threads")]), flush=True)
            if arguments.record:
                write_records(arguments.record, rows)
    ending = summary(rows)
    if ending:
        print(table(ending, [column for column in ending[0] if column not in ("dtype", "threads")]), flush=True)
    if arguments.record:
        write_records(arguments.record, [*rows, *ending])


if __name__ == "__main__":
    main()
