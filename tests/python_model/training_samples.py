"""A toy task for the training tests, and runs on it; a step of its stream is a function of its index, as of the real one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from python_model import GritLM
from python_model.data.stream import StepSamples, open_stream
from python_model.model.chunks import build_chunk
from python_model.model.prompts import EncodedSample, embed_instruction, encode_conversation, encode_text
from python_model.train import TrainConfig, Trainer
from python_model.train.distributed import Ranks
from python_model.train.model import TrainingModel
from python_model.train.setup import load_model
from tests.python_model.training_config import make_config

WORDS = ["river", "city", "code", "word", "capital", "France", "space", "line"]
LENGTH = 64
SAME = ("loss", "contrastive_loss", "generative_loss", "gradient_norm", "lr", "tokens")


class ToyStream:
    """``queries`` queries with a positive and a negative each, and ``conversations`` conversations; a rank gets its share."""

    datasets = ("even", "odd", "talks")

    def __init__(self, tokenizer: Any, queries: int, conversations: int, ranks: Ranks | None = None) -> None:
        self.tokenizer, self.queries, self.conversations, self.ranks = tokenizer, queries, conversations, ranks

    def steps(self, start: int, stop: int) -> Iterator[StepSamples]:
        for step in range(start, stop):
            yield self[step]

    def __getitem__(self, step: int) -> StepSamples:
        draw = random.Random(step)
        rows, talks = range(self.queries), range(self.conversations)
        mine = (rows, talks) if self.ranks is None else (self.ranks.share(len(rows)), self.ranks.share(len(talks)))
        samples = StepSamples()
        for row in rows:
            word, number = draw.choice(WORDS), draw.randrange(100)
            longer = "to be seen " * draw.randrange(1, 4)
            if row in mine[0]:
                samples.queries.append(self._text("Find the text", f"where is {word} {number}"))
                samples.passages.append(self._text("", f"the {word} number {number} is here"))
                samples.passages.append(self._text("", f"no {draw.choice(WORDS)} {longer}{number}"))
                samples.query_ids.append(row)
                samples.passage_ids += [row, 1000 + row]
                samples.query_origins.append(f"toy:{row}")
                samples.query_datasets.append(row % 2)
                # a teacher has seen all but the third query
                samples.passage_scores += [3.0 + number / 50, 1.0] if row != 2 else [None, 1.0]
            else:
                draw.choice(WORDS)
        for row in talks:
            word, more = draw.choice(WORDS), draw.randrange(3)
            if row in mine[1]:
                turns = [f"say {word}", f"{word} it is" + " it is" * more, "and?", "done"]
                samples.conversations.append(encode_conversation(self.tokenizer, turns, LENGTH))
                samples.conversation_origins.append(f"talk:{row}")
                samples.conversation_datasets.append(2)
        return samples

    def _text(self, instruction: str, text: str) -> EncodedSample:
        return encode_text(self.tokenizer, embed_instruction(instruction), text, LENGTH)


def toy_config(checkpoint: Path, folder: Path, **changes: Any) -> TrainConfig:
    """Settings of a run whose output is ``folder/out``."""
    options: dict[str, Any] = {
        "model": str(checkpoint),
        "train_data": str(checkpoint),
        "output_dir": str(folder / "out"),
        "embedding_batch_size": 4,
        "generative_batch_size": 2,
        "query_max_len": LENGTH,
        "passage_max_len": LENGTH,
        "generative_max_len": LENGTH,
        "bf16": False,
        "temperature": 0.1,
    }
    return make_config(**{**options, **changes})


def toy_model(config: TrainConfig) -> GritLM:
    """The model that a run starts from."""
    return load_model(
        config.model, torch.device("cpu"), mode=config.mode, settings=config.settings_given, seed=config.seed
    )


def toy_trainer(config: TrainConfig) -> Trainer:
    """A run on the toy task: the settings' queries and two conversations a step."""
    model = toy_model(config)
    queries = config.batch.embedding_batch_size if config.embeds else 0
    return Trainer(model, config, ToyStream(model.tokenizer, queries, 2 if config.generates else 0))


def figures(records: list[dict[str, Any]]) -> list[list[Any]]:
    """What must repeat exactly: everything but times and memory."""
    return [[record[name] for name in SAME] for record in records]


def data_folder(folder: Path) -> Path:
    """The same kind of rows as files."""
    folder.mkdir()
    embedding = [
        {
            "query": ["Find the text", f"where is {word} {n}"],
            "pos": [["", f"the {word} number {n} is here"]],
            "neg": [["", f"no {word} to be seen"], ["", "nothing"]],
        }
        for n, word in enumerate(WORDS)
    ]
    generative = [{"text": [f"say {word}", f"{word} it is", "and?", "done"]} for word in WORDS]
    for name, rows in (("emb", embedding), ("gen", generative)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def held_out_folder(folder: Path) -> Path:
    """Queries under four instructions, three of them in the second half, a corpus and conversations."""
    (folder / "test").mkdir(parents=True)
    rows = [
        {"query": [f"Find {max(n - 4, 0)}", f"where is {w}"], "pos": [["", f"{w} is here"]], "key": w}
        for n, w in enumerate(WORDS)
    ]
    corpus = [{"key": row["key"], "text": row["pos"][0][1]} for row in rows]  # type: ignore[index]
    talks = [{"text": [f"say {w}", f"{w} it is"]} for w in WORDS[:5]]
    for name, lines in (("test/embedding", rows), ("test/generative", talks), ("corpus", corpus)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def router_model(tokenizer: Any, folder: Path) -> tuple[TrainingModel, TrainConfig]:
    """A tiny Mixtral, and settings in which every conversation is a chunk and only the router loss counts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    settings = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
    )  # fmt: skip
    MixtralForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = toy_config(folder, folder, chunk_tokens=LENGTH, generative_weight=0.0, mode="generative")
    return TrainingModel(toy_model(config), router_loss=True), config


def step_vectors(
    checkpoint: Path,
    folder: Path,
    instruction: str,
    query: str,
    document: str,
    prepare: Callable[[GritLM], Any] = lambda model: None,
) -> torch.Tensor:
    """Embeddings (2, size) that a training step of ``checkpoint``, after ``prepare``, computes of a query and its document."""
    row = {"query": [instruction, query], "pos": [["", document]], "neg": [["", "nothing"]]}
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    config = toy_config(
        checkpoint,
        folder,
        train_data=str(folder / "data.jsonl"),
        mode="embedding",
        embedding_batch_size=1,
        query_max_len=512,
        passage_max_len=512,
    )
    model = toy_model(config)
    prepare(model)
    samples = open_stream(config.data, config.batch, model.tokenizer, settings=model.settings, mode=config.mode)[0]
    chunk = build_chunk([samples.queries[0], samples.passages[0]], [], attention=model.attention)
    vectors = TrainingModel(model)(chunk)[0]
    assert vectors is not None
    return vectors.detach()
