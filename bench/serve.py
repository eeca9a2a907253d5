"""One server for chat and embeddings against two processes, on the same cores under the same mixed load.

    python -m bench.serve --seconds 60 --loads 50 100 200 --record serve_cpu.json

The load is open: chats and texts to embed arrive as two Poisson processes whatever the server does, so a server that falls
behind shows it in its times. ``--loads`` are percentages of ``--chats`` and ``--texts`` per second.

    one server     grit serve
    two processes  transformers serve for the chats (with --continuous-batching where --peer-batching says so), and
                   sentence-transformers behind FastAPI, which embeds all waiting texts as one batch

Both read the same checkpoint in the same dtype, each with half of the threads in the second case. A row has the time to
the first token, the time between tokens, finished texts and tokens per second, and the largest resident memory of all processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import table, write_records
from python_model.support.quiet import quiet

EMBEDDER = """
import asyncio, sys
from contextlib import asynccontextmanager
import torch, uvicorn
from fastapi import FastAPI
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
        vectors = (await asyncio.to_thread(model.encode, texts, batch_size=64, show_progress_bar=False)).tolist()
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
    return {"data": [{"embedding": vector} for vector in await future]}

@app.get("/ready")
async def ready():
    return {}

uvicorn.run(app, port=port, log_level="warning")
"""
"""The peer for embeddings, run as a file of its own so that it imports nothing from this repository."""


@dataclass
class Running:
    """A way to serve: where chats and texts go, which model name chats ask for, and the processes."""

    chats: str
    texts: str
    model: str
    processes: list[subprocess.Popen[bytes]]

    def peak_memory(self) -> float:
        """The largest resident sets of all processes so far, in MiB."""
        found = 0
        for process in self.processes:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    found += int(line.split()[1])
        return found / 1024


@dataclass
class Measured:
    """What one run under load measured, in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    texts: list[float] = field(default_factory=list)
    tokens: int = 0
    finished_texts: int = 0
    failed: int = 0
    seconds: float = 0.0


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
                with logs[name].open("wb") as log:
                    processes.append(subprocess.Popen(command, stdout=log, stderr=log))
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
    command += [
        "--dtype",
        arguments.dtype,
        "--threads",
        str(arguments.threads),
        "--target-ms",
        str(arguments.target_ms),
    ]
    command += ["--format", "template"]
    with started({"grit serve": command}, [f"http://127.0.0.1:{port}/ready"]) as processes:
        url = f"http://127.0.0.1:{port}"
        yield Running(url, url, "", processes)


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
        command += ["--dtype", arguments.dtype, *(["--continuous-batching"] if arguments.peer_batching else [])]
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
            yield Running(f"http://localhost:{chat}", f"http://127.0.0.1:{embed}", checkpoint, processes)


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
        "model": running.model,
        "messages": [{"role": "user", "content": f"Write about this: {words(source, source.choice(arguments.words))}"}],
        "max_tokens": arguments.reply_tokens,
        "temperature": 0,
        "stream": True,
    }
    start = last = time.perf_counter()
    count = 0
    async with client.stream("POST", f"{running.chats}/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            found.failed += 1
            return
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
            if not choices[0].get("delta", {}).get("content"):
                continue
            now = time.perf_counter()
            (found.between if count else found.first).append(now - (last if count else start))
            last = now
            count += 1
    found.tokens += count


async def embed(
    client: Any, running: Running, source: random.Random, arguments: argparse.Namespace, found: Measured
) -> None:
    texts = [words(source, source.choice(arguments.words)) for _ in range(arguments.texts_per_request)]
    start = time.perf_counter()
    reply = await client.post(f"{running.texts}/v1/embeddings", json={"input": texts})
    if reply.status_code == 200:
        found.texts.append(time.perf_counter() - start)
        found.finished_texts += len(texts)
    else:
        found.failed += 1


async def load(running: Running, arguments: argparse.Namespace, per_cent: int, seconds: float, seed: int) -> Measured:
    """An open load for ``seconds``; requests that have not ended ``--patience`` seconds later count as failed."""
    import httpx

    found = Measured()
    source = random.Random(seed)
    arrivals = []
    rates = ((arguments.chats, chat), (arguments.texts / arguments.texts_per_request, embed))
    for rate, request in rates:
        now = source.expovariate(rate * per_cent / 100)
        while now < seconds:
            arrivals.append((now, request, source.randrange(2**31)))
            now += source.expovariate(rate * per_cent / 100)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
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


def percentile(values: Sequence[float], part: float) -> float:
    """NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def row(name: str, per_cent: int, found: Measured, memory: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """A record's row; times in milliseconds."""
    lasted = found.seconds
    first = [1e3 * x for x in found.first]
    between = [1e3 * x for x in found.between]
    return {
        "variant": name,
        "load_per_cent": per_cent,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "reply_tokens": arguments.reply_tokens,
        "first_token_p50_ms": percentile(first, 0.5),
        "first_token_p99_ms": percentile(first, 0.99),
        "between_p50_ms": percentile(between, 0.5),
        "between_p99_ms": percentile(between, 0.99),
        "texts_p50_s": statistics.median(found.texts) if found.texts else float("nan"),
        "tokens_per_s": found.tokens / lasted,
        "texts_per_s": found.finished_texts / lasted,
        "failed_share": found.failed / max(1, len(found.first) + len(found.texts) + found.failed),
        "memory_mib": memory,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--loads", type=int, nargs="+", default=[50, 100, 200], help="percentages of the rates")
    parser.add_argument("--chats", type=float, default=0.5, help="chats per second, at a load of 100")
    parser.add_argument("--texts", type=float, default=8.0, help="texts to embed per second, at a load of 100")
    parser.add_argument("--words", type=int, nargs="+", default=[10, 60, 200], help="lengths of prompts and texts")
    parser.add_argument("--texts-per-request", type=int, default=4)
    parser.add_argument("--reply-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that late requests may take in addition")
    parser.add_argument(
        "--target-ms", type=float, default=100.0, help="grit serve's target for the time between tokens"
    )
    parser.add_argument("--peer-batching", action="store_true", help="transformers serve --continuous-batching")
    parser.add_argument("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args(argv)
    quiet()
    from python_model.corpora.small_model import resolve_model

    checkpoint = str(resolve_model(arguments.model))
    rows: list[dict[str, Any]] = []
    for per_cent in arguments.loads:
        for name in arguments.systems:
            if missing := missing_packages(name):
                rows.append(
                    {"variant": name, "load_per_cent": per_cent, "note": f"not installed: {', '.join(missing)}"}
                )
            else:
                # a new server for each load, so that memory and caches start alike
                with SYSTEMS[name](arguments, checkpoint) as running:
                    asyncio.run(load(running, arguments, 100, 5.0, seed=1))  # warm-up
                    found = asyncio.run(load(running, arguments, per_cent, arguments.seconds, seed=2))
                    rows.append(row(name, per_cent, found, running.peak_memory(), arguments))
            print(table(rows[-1:], [c for c in rows[-1] if c not in ("dtype", "threads", "reply_tokens")]), flush=True)
            if arguments.record:
                write_records(arguments.record, rows)


if __name__ == "__main__":
    main()
