"""What embedding a corpus on Ray Data costs beside plain ``encode()`` of the same texts.

    python -m bench.corpus --rows 400 --record corpus_cpu.json

Both embed the same rows on one CPU thread, in turns. ``plain``: one call of encode(), nothing else. ``ray``: what `grit embed
--ray` does with one worker; its seconds are those that its units took (reading, encode(), writing the shard). The start of
actors and the loading of the model happen once, however large the corpus is: they are ``start_s``. ``outside`` is the share of
the units' time that was not spent in encode(). The goal is an ``overhead`` (the units' seconds over plain ones, minus 1) of at
most 5 %."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.common import table, write_records
from python_model.corpora.small_model import resolve_model
from python_model.data import sample_dir
from python_model.data.files import read_objects
from python_model.model.modeling import GritLM
from python_model.rag.corpus import Recipe, committed, embed_corpus, plan
from python_model.support.optional import require
from python_model.support.quiet import quiet

GOAL = 0.05
UNITS = 4
"""The rows are divided into about so many."""


def rows_of(source: Path, count: int) -> list[str]:
    """``count`` texts of a ``{"text": ..}`` file, from the start again where it has fewer."""
    texts = [str(row["text"]) for _, row in read_objects(source)]
    if not texts:
        raise ValueError(f"input: expected rows with a text, got none in {source}")
    return [texts[number % len(texts)] for number in range(count)]


def measure(path: str, texts: list[str], repeats: int) -> list[dict[str, Any]]:
    """The rows of the record; ``path``: a checkpoint."""
    model = GritLM(path, mode="embedding", device="cpu")
    recipe = Recipe(path)
    prefix = model.formatter.embed_instruction(recipe.instruction)
    options: dict[str, Any] = {"instruction": prefix, "max_length": recipe.max_length, "show_progress_bar": False}
    model.encode(texts[:8], **options)  # the first pass of a process takes longer
    plain, ray, outside, start = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "rows.jsonl", Path(folder) / "out"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        unit_bytes = source.stat().st_size // UNITS + 1
        for _ in range(repeats):
            before = time.perf_counter()
            model.encode(texts, **options)
            plain.append(time.perf_counter() - before)
            result = embed_corpus(str(source), str(output), recipe, workers=1, unit_bytes=unit_bytes)
            markers = [committed(str(output), unit) for unit in plan(str(source), unit_bytes)]
            busy = sum(marker["seconds"] for marker in markers if marker is not None)
            ray.append(busy)
            outside.append(result.outside)
            start.append(result.seconds - busy)
            shutil.rmtree(output)
    described = {"rows": len(texts), "units": UNITS}
    ratio = statistics.median(b / a for a, b in zip(plain, ray, strict=True))
    return [
        {"variant": "plain", **described, "median_s": statistics.median(plain), "seconds": plain},
        {
            "variant": "ray",
            **described,
            "median_s": statistics.median(ray),
            "overhead": ratio - 1,
            "outside": statistics.median(outside),
            "start_s": statistics.median(start),
            "seconds": ray,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.corpus", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--input", type=Path, help="jsonl file of rows with a text; default: the bundled sample's passages"
    )
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)  # as Ray sets for a worker with one CPU
    cluster = require("ray", "ray")
    cluster.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    texts = rows_of(arguments.input or sample_dir() / "corpus.jsonl", arguments.rows)
    rows = measure(str(resolve_model(arguments.model)), texts, arguments.repeats)
    cluster.shutdown()
    print(table(rows, ["variant", "rows", "median_s", "overhead", "outside", "start_s"]))
    print(f"overhead {rows[1]['overhead']:.1%}, goal at most {GOAL:.0%}")
    if arguments.record:
        write_records(arguments.record, rows)


if __name__ == "__main__":
    main()
