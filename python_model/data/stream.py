"""The samples of a training step as token ids: a function of (settings, data, step).

So a run resumes at any step without saved state, worker processes change nothing, and every rank can ask for its own share.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from python_model.data.datasets import DataReport, DataSet, open_file
from python_model.data.encoding import RowEncoder
from python_model.data.jsonl import EmbeddingRow, GenerativeRow, InstructedText, data_files, dataset_name
from python_model.data.order import BatchOrder
from python_model.model.prompts import EncodedSample, TooLong


@dataclass
class StepSamples:
    """What a rank trains on in one step.

    ``passages`` are laid out ``[pos_0, neg_0.., pos_1, ...]``. ``query_ids`` and ``passage_ids`` number the texts of the step,
    the same on all ranks: a passage with the id of a query has the text of that query's positive, or of the positive of an
    identical query, so it is no negative of it. The origins are ``file:line``.
    """

    queries: list[EncodedSample] = field(default_factory=list)
    passages: list[EncodedSample] = field(default_factory=list)
    conversations: list[EncodedSample] = field(default_factory=list)
    query_ids: list[int] = field(default_factory=list)
    passage_ids: list[int] = field(default_factory=list)
    query_origins: list[str] = field(default_factory=list)
    conversation_origins: list[str] = field(default_factory=list)


@dataclass
class _Group:
    """A query with the passages drawn for it, and the example its instructions show."""

    row: EmbeddingRow
    passages: list[InstructedText]
    example: tuple[str, str] | None


class TrainingStream(Dataset[StepSamples]):
    """``stream[step]`` for any step, and ``stream.steps(start, stop)`` in order, read ahead by worker processes.

    Per query one random positive and ``train_group_size - 1`` negatives without replacement (of the list repeated where it is
    short).

    Args:
        data: data sets (:func:`open_stream` reads them); those that the mode does not train on are ignored.
        encoder: tokenises.
        config: a :class:`python_model.train.config.TrainConfig`.
        rank, world: this process' share of each step: rows ``n * rank // world`` to ``n * (rank + 1) // world``.
    """

    def __init__(
        self,
        data: Sequence[Sequence[Any]],
        encoder: RowEncoder,
        config: Any,
        rank: int = 0,
        world: int = 1,
        report: DataReport | None = None,
    ) -> None:
        self.encoder, self.config, self.rank, self.world = encoder, config, rank, world
        self.report = report or DataReport()
        generative = [isinstance(rows[0], GenerativeRow) for rows in data]
        self._embedding = [rows for rows, kind in zip(data, generative, strict=True) if config.embeds and not kind]
        self._generative = [rows for rows, kind in zip(data, generative, strict=True) if config.generates and kind]
        self._embedding_order = self._order("embedding") if config.embeds else None
        self._generative_order = self._order("generative") if config.generates else None

    def steps(self, start: int, stop: int) -> Iterator[StepSamples]:
        """The samples of steps ``start`` .. ``stop - 1``, the same for any number of ``data_workers``."""
        if self.config.data_workers == 0:
            for step in range(start, stop):
                yield self[step]
            return
        # spawn: forking a process that has threads (torch, tokenizers) may deadlock
        yield from DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.config.data_workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # the default one would be drawn from, and the run would depend on the workers
            multiprocessing_context="spawn",
            worker_init_fn=_leave_signals,
        )

    def __getitem__(self, step: int) -> StepSamples:
        samples = StepSamples()
        if self._embedding_order is not None:
            # every rank draws for the whole step, so that all number its texts alike; it tokenises its share only
            groups = [
                self._draw(dataset, row, random.Random(f"{self.config.seed}:{step}:{place}"))
                for place, (dataset, row) in enumerate(self._embedding_order.batch(step))
            ]
            numbers = _numbers(groups)
            for place in self._share(len(groups)):
                self._add_query(samples, groups[place])
                ids = [numbers[passage.text] for passage in groups[place].passages]
                samples.query_ids.append(ids[0])
                samples.passage_ids += ids
        if self._generative_order is not None:
            batch = self._generative_order.batch(step)
            for place in self._share(len(batch)):
                dataset, index = batch[place]
                row = self._generative[dataset][index]
                with _naming(row.origin):
                    samples.conversations.append(self.encoder.conversation(row))
                samples.conversation_origins.append(row.origin)
        self.encoder.flush()
        return samples

    def _order(self, kind: str) -> BatchOrder:
        data = self._embedding if kind == "embedding" else self._generative
        config = self.config
        if not data:
            raise ValueError(f"train_data: {config.train_data} has no {kind} rows, which mode {config.mode!r} needs")
        weights = [config.dataset_weights.get(_name(rows), 1.0) for rows in data]
        wanted = [
            0 if not weight else max(1, round(weight * len(rows))) for weight, rows in zip(weights, data, strict=True)
        ]
        if not any(wanted):
            raise ValueError(f"dataset_weights: got {config.dataset_weights}, which leave no {kind} rows")
        embeds = kind == "embedding"
        return BatchOrder(
            [len(rows) for rows in data],
            config.embedding_batch_size if embeds else config.generative_batch_size,
            2 * config.seed + embeds,
            same_dataset=embeds and config.same_dataset,
            rows_per_epoch=wanted,
        )

    def _share(self, count: int) -> range:
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def _draw(self, dataset: int, index: int, draw: random.Random) -> _Group:
        rows = self._embedding[dataset]
        row = rows[index]
        passages = [draw.choice(row.pos), *_negatives(row, self.config.train_group_size - 1, draw)]
        example = None
        if len(rows) > 1 and draw.random() < self.config.few_shot:
            other = draw.randrange(len(rows) - 1)
            shown = rows[other + (other >= index)]
            example = (shown.query.text, draw.choice(shown.pos).text)
        return _Group(row, passages, example)

    def _add_query(self, samples: StepSamples, group: _Group) -> None:
        with _naming(group.row.origin):
            try:
                query, passages = self._encode(group, group.example)
            except TooLong:
                if group.example is None:
                    raise
                query, passages = self._encode(group, None)  # the example is too long; the row is not
        samples.queries.append(query)
        samples.passages += passages
        samples.query_origins.append(group.row.origin)

    def _encode(self, group: _Group, example: tuple[str, str] | None) -> tuple[EncodedSample, list[EncodedSample]]:
        encode, config = self.encoder.text, self.config
        query = encode(group.row.query, config.query_max_len, example)
        return query, [encode(passage, config.passage_max_len, example) for passage in group.passages]


def open_stream(config: Any, tokenizer: Any, rank: int = 0, world: int = 1) -> TrainingStream:
    """The stream over ``config.train_data``; rank 0 prints what is used and what is left out.

    Raises:
        FileNotFoundError: there is no such file or folder.
        DataError: a file has no rows.
        ValueError: the mode needs rows of a kind that the data lack, or a setting names a data set that is not there.
    """
    encoder = RowEncoder(tokenizer, config)
    check_key = f"{encoder.key} {config.query_max_len} {config.passage_max_len} {config.generative_max_len}"
    report, data = DataReport(), []
    files = data_files(config.train_data)
    for file in files:
        found, left_out = open_file(
            file,
            encoder.problem,
            check_key=f"{check_key} {config.train_group_size > 1}",
            wanted=lambda generative: bool(config.generates if generative else config.embeds),
        )
        data += [rows.choice(config.max_rows_per_dataset or len(rows), config.seed) for rows in found]
        report.add(left_out)
    report.used = {}
    for rows in data:
        report.used[rows.name] = report.used.get(rows.name, 0) + len(rows)
    if rank == 0:
        print("\n".join(report.lines()), flush=True)
    names = {*report.used, *map(dataset_name, files)}
    if unknown := sorted(set(config.dataset_weights) - names):
        raise ValueError(f"dataset_weights: there is no data set {unknown[0]!r}, the data hold {sorted(names)}")
    return TrainingStream(data, encoder, config, rank, world, report)


def _name(rows: Sequence[Any]) -> str:
    return rows.name if isinstance(rows, DataSet) else str(rows[0].dataset)


def _negatives(row: EmbeddingRow, count: int, draw: random.Random) -> list[InstructedText]:
    if count == 0:
        return []
    if not row.neg:
        raise ValueError(f"{row.origin}: neg: got an empty list, which train_group_size > 1 needs")
    pool = list(row.neg)
    while len(pool) < count:
        pool += row.neg
    return draw.sample(pool, count)


def _numbers(groups: Sequence[_Group]) -> dict[str, int]:
    """A number per passage text; texts that are positives of identical queries share one."""
    same: dict[str, str] = {}  # text -> a text it shares its number with

    def root(text: str) -> str:
        while text in same:
            text = same[text]
        return text

    first: dict[InstructedText, str] = {}
    for group in groups:
        positive = group.passages[0].text
        mine, other = root(positive), root(first.setdefault(group.row.query, positive))
        if mine != other:
            same[mine] = other
    texts = dict.fromkeys(passage.text for group in groups for passage in group.passages)
    numbers: dict[str, int] = {}
    return {text: numbers.setdefault(root(text), len(numbers)) for text in texts}


class _naming:
    """Puts ``file:line`` in front of an error about a row."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self.origin}: {error}") from error


def _unchanged(samples: Any) -> Any:
    return samples


def _leave_signals(worker: int) -> None:
    """A stop signal sent to all processes of a run is the main process' to answer: it finishes the step and saves."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
