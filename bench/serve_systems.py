"""The two ways to serve that :mod:`bench.serve` compares: their processes, and the memory that these hold."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
