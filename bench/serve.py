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
import math
import os
import random
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import torch

from bench.common import model_dtype, table, write_records
from bench.serve_load import Measured, busy, connected, load, vectors, words
from bench.serve_systems import SYSTEMS, Running, memory, missing_packages
from python_model.support.quiet import quiet

CLOSED = "closed"


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
    add("--dtype", default=model_dtype())
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
