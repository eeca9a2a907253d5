"""``make demo``: one set of weights learns to search and can still chat, in minutes on a laptop's CPU.

Trains the small model jointly (contrastive and next-token loss, packed without padding) on the bundled sample and measures it
before and after on rows held out from training: retrieval beside BM25, next-token loss, five searches, two chats, an answer from
a retrieved document. Writes ``results.json``, ``loss.png``, ``log.jsonl`` and the trained checkpoint to the output folder.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from python_model.commands import demo_report as report
from python_model.commands.runner import SMALL_MODEL, Command, add_precision, location, tell_cut
from python_model.corpora.small_model import resolve_model
from python_model.data import sample_dir
from python_model.data.config import DataConfig
from python_model.data.reading import read_generative
from python_model.data.rows import EmbeddingRow
from python_model.data.stream import open_stream
from python_model.evaluation.held_out import HeldOut
from python_model.evaluation.language import next_token_loss
from python_model.evaluation.retrieval import embed_documents, retrieval_ranks, scores_from_ranks
from python_model.generate.decode import Sampling
from python_model.generate.text import rag_prompt, reply
from python_model.model.modeling import GritLM
from python_model.support.files import make_folder, write_json
from python_model.support.precision import computing
from python_model.train.config import LoggingConfig, LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from python_model.train.plot import plot_losses
from python_model.train.trainer import Trainer

MAX_LENGTH = 192
STEPS = 60
"""One epoch of the sample's triples."""
SEARCHES = 5
DRAW_SEED = 0
"""Seed of the examples shown; independent of the training seed, so that all runs show the same searches and chats."""
REPLY_TOKENS = 48
SAMPLING = Sampling(frequency_penalty=0.5)
"""Greedy, but a small model that repeats itself comes to an end."""


@dataclass(frozen=True)
class Measured:
    """Measurements of a model on the held-out rows."""

    scores: dict[str, Any]
    """Retrieval metrics and ``next_token_loss``."""
    ranks: list[int]
    """Rank of each query's relevant passage."""
    corpus: Tensor
    """(passages, size) embeddings."""


def measure(model: GritLM, sample: HeldOut, bf16: bool | None = None) -> Measured:
    """Retrieval and next-token loss on all held-out rows; ``bf16``: as of :class:`ModelConfig`."""
    with computing(model.device, bf16):
        corpus = embed_documents(model, sample.documents, max_length=MAX_LENGTH)
        ranks = retrieval_ranks(model, sample.queries, corpus, sample.relevant, max_length=MAX_LENGTH)
        loss = next_token_loss(model, sample.conversations, max_length=MAX_LENGTH)
    scores = asdict(scores_from_ranks(ranks, len(sample.documents)))
    return Measured({**scores, "next_token_loss": loss}, ranks.tolist(), corpus)


def draw_searches(rows: Sequence[EmbeddingRow], count: int) -> list[int]:
    """Indices of ``count`` rows, of each kind (data set) in turn, drawn regardless of how a model does on them."""
    generator = random.Random(DRAW_SEED)
    kinds: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        kinds.setdefault(row.dataset, []).append(index)
    piles = [generator.sample(kinds[kind], len(kinds[kind])) for kind in sorted(kinds)]
    turns = [pile[turn] for turn in range(count) for pile in piles if turn < len(pile)]
    return turns[:count]


def draw_chats(sample: HeldOut) -> list[str]:
    """Two first user turns: about a person or place, and about a word."""
    generator = random.Random(DRAW_SEED)
    names = read_generative(sample_dir() / "test" / "names.jsonl")
    words = [row for row in sample.conversations if row.dataset == "wordnet_dialogue"]
    return [generator.choice(rows).turns[0] for rows in (names, words)]


def chat(model: GritLM, turns: Sequence[str], bf16: bool | None = None) -> str:
    """A reply under :data:`SAMPLING`."""
    with computing(model.device, bf16):
        return reply(model, turns, max_new_tokens=REPLY_TOKENS, sampling=SAMPLING)


def find(model: GritLM, corpus: Tensor, query: tuple[str, str], bf16: bool | None = None) -> int:
    """Index of the best passage."""
    instruction, text = query
    with computing(model.device, bf16):
        vector = model.encode(
            text,
            instruction=model.formatter.embed_instruction(instruction),
            max_length=MAX_LENGTH,
            convert_to_tensor=True,
        )
    return int((corpus @ vector).argmax())


def lexical_scores(sample: HeldOut) -> dict[str, Any] | None:
    """BM25 on the same rows; None where its packages are not installed."""
    from python_model.evaluation.lexical import bm25

    try:
        return asdict(bm25([text for _, text in sample.queries], sample.documents, sample.relevant))
    except ImportError:
        return None


def run(config: TrainConfig) -> dict[str, Any]:
    """The whole demo, printed as it goes; returns what results.json holds."""
    start = time.perf_counter()
    bf16 = config.model.bf16
    make_folder(Path(config.output_dir))  # now, rather than after measuring
    torch.manual_seed(config.seed)
    sample = HeldOut(sample_dir())
    model = GritLM(
        resolve_model(config.model.name), **config.settings_given, is_inference=True, device="cpu", dtype="float32"
    )
    print(report.opening(len(sample.queries), len(sample.documents), len(sample.conversations)), flush=True)
    before = measure(model, sample, bf16)
    tell_cut("demo", model, f"the demo's {MAX_LENGTH}")
    questions = draw_chats(sample)
    chats: list[dict[str, str]] = [
        {"question": question, "before": chat(model, [question], bf16)} for question in questions
    ]
    print(report.measured(before.scores), flush=True)

    with contextlib.redirect_stdout(io.StringIO()):  # no memory plan and the like: the bar says enough here
        stream = open_stream(config.data, config.batch, model.tokenizer, settings=model.settings, seed=config.seed)
        trainer = Trainer(model, config, stream)
        records = trainer.train()

    after = measure(model, sample, bf16)
    print(report.measured(after.scores), flush=True)
    searches: list[dict[str, Any]] = []
    for index in draw_searches(sample.rows, SEARCHES):
        found = find(model, after.corpus, sample.queries[index], bf16)
        searches.append(
            {
                "kind": sample.rows[index].dataset,
                "query": sample.queries[index][1],
                "rank_before": before.ranks[index],
                "rank_after": after.ranks[index],
                "found": sample.documents[found],
                "right": sample.documents[sample.relevant[index]],
            }
        )
    for shown in chats:
        shown["after"] = chat(model, [shown["question"]], bf16)
    words = [row for row in searches if row["kind"] == "wordnet_definition"]
    word = next((row for row in words if row["found"] == row["right"]), words[0])
    question = f'What does the word "{re.split(r", | [(]", word["query"])[0]}" mean?'
    answer: dict[str, Any] = {
        "question": question,
        "document": word["found"],
        "is_right": word["found"] == word["right"],
    }
    answer["answer"] = chat(model, rag_prompt(question, word["found"]), bf16)
    checkpoint = trainer.save()
    output = Path(config.output_dir)
    plot_losses(records, output / "loss.png")
    seconds = [record["seconds"] for record in records]
    results = {
        "before": before.scores,
        "after": after.scores,
        "bm25": lexical_scores(sample),
        "searches": searches,
        "chats": chats,
        "answer": answer,
        "config": config.to_dict(),
        "seconds": {
            "total": time.perf_counter() - start,
            "training": sum(seconds),
            "per_step_median": sorted(seconds)[len(seconds) // 2],
        },
        "tokens_per_second": sum(r["tokens"] for r in records) / sum(seconds),
        "checkpoint": str(checkpoint),
    }
    write_json(output / "results.json", results)
    return results


def demo_config(
    output_dir: str, steps: int = STEPS, seed: int = 0, model: str = SMALL_MODEL, bf16: bool | None = None
) -> TrainConfig:
    """The demo's recipe, that of configs/demo.yaml."""
    return TrainConfig(
        output_dir=output_dir,
        steps=steps,
        seed=seed,
        model=ModelConfig(name=model, bf16=bf16),
        data=DataConfig(
            train_data=str(sample_dir() / "train"),
            query_max_len=MAX_LENGTH,
            passage_max_len=MAX_LENGTH,
            generative_max_len=MAX_LENGTH,
        ),
        optimizer=OptimizerConfig(lr=1e-4, warmup_ratio=0.2, objective_grad_norm=1.0),
        losses=LossConfig(temperature=0.05),
        logging=LoggingConfig(resume=False),
    )


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit demo``."""
    parser.add_argument(
        "--model", type=location, default=SMALL_MODEL, help="checkpoint to start from; the default is the small model"
    )
    parser.add_argument(
        "--output-dir", type=location, default="demo_output", help="folder for the checkpoint, the figures and the plot"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    add_precision(parser)
    parser.add_argument("--started", type=float, help="Unix time at which the installation began, to report it as well")


def show(arguments: Namespace) -> None:
    """Run the demo and print what it found."""
    results = run(demo_config(arguments.output_dir, arguments.steps, arguments.seed, arguments.model, arguments.bf16))
    since = None if arguments.started is None else time.time() - arguments.started
    print("\n".join(report.lines(results, arguments.output_dir, since)))
    if not report.both_better(results):
        raise SystemExit(1)


COMMAND = Command(
    "demo", "One set of weights learns to search and goes on chatting, on a real small model.", configure, show
)
