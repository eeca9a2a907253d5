"""The samples of a training step as token ids: a function of (settings, data, step).

So a run can resume at any step without saved state, worker processes have no effect on it, and each rank can request its share.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from python_model.data.config import BatchConfig, DataConfig
from python_model.data.datasets import DataSet, EachPositive, select
from python_model.data.encoding import RowEncoder
from python_model.data.files import data_files, dataset_name, unread_note
from python_model.data.index import FileIndex, index_files
from python_model.data.order import BatchOrder, rank_share
from python_model.data.report import DataReport
from python_model.data.rows import DataError, EmbeddingRow, GenerativeRow, InstructedText
from python_model.model.prompts import EncodedSample, TooLong
from python_model.settings import GritSettings


@dataclass
class StepSamples:
    """What a rank trains on in one step.

    ``passages`` are laid out ``[pos_0, neg_0.., pos_1, ...]``. ``query_ids`` and ``passage_ids`` number the texts of the step,
    the same on all ranks: a passage with the id of a query has the text of that query's positive, or of the positive of an
    identical query, so it is no negative of it. ``passage_scores`` are a teacher's, None where a row has none. The origins are
    ``file:line``, the data sets places in the stream's ``datasets``.
    """

    queries: list[EncodedSample] = field(default_factory=list)
    passages: list[EncodedSample] = field(default_factory=list)
    conversations: list[EncodedSample] = field(default_factory=list)
    query_ids: list[int] = field(default_factory=list)
    passage_ids: list[int] = field(default_factory=list)
    passage_scores: list[float | None] = field(default_factory=list)
    query_origins: list[str] = field(default_factory=list)
    conversation_origins: list[str] = field(default_factory=list)
    query_datasets: list[int] = field(default_factory=list)
    conversation_datasets: list[int] = field(default_factory=list)


@dataclass
class _Group:
    """A query with the passages drawn for it, and the example shown by its instruction."""

    row: EmbeddingRow
    passages: list[InstructedText]
    scores: list[float | None]
    example: tuple[str, str] | None


class TrainingStream(Dataset[StepSamples]):
    """``stream[step]`` for any step, and ``stream.steps(start, stop)`` in order, prefetched by worker processes.

    Per query one random positive and ``train_group_size - 1`` negatives without replacement (of the list repeated where it is
    short).

    Args:
        data: data sets (:func:`open_stream` reads them); those that the mode does not train on are ignored.
        encoder: tokenises rows.
        config, batch: how rows become samples, and how many there are per step.
        mode: ``"unified"``, or ``"embedding"`` or ``"generative"`` for rows of one kind.
        seed: seed of every random choice.
        rank, world: determine this process's share of each step, see :func:`rank_share`.
        digest: digest of the files' contents.

    Attributes:
        datasets: names of the data sets, each once.
    """

    def __init__(
        self,
        data: Sequence[Sequence[Any]],
        encoder: RowEncoder,
        config: DataConfig,
        batch: BatchConfig,
        *,
        mode: str = "unified",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        report: DataReport | None = None,
        digest: str = "",
    ) -> None:
        self.encoder, self.config, self.batch, self.rank, self.world = encoder, config, batch, rank, world
        self.mode, self.seed = mode, seed
        self.report, self.digest = report or DataReport(), digest
        generative = [isinstance(rows[0], GenerativeRow) for rows in data]
        self._embedding = [
            rows for rows, kind in zip(data, generative, strict=True) if mode != "generative" and not kind
        ]
        self._generative = [rows for rows, kind in zip(data, generative, strict=True) if mode != "embedding" and kind]
        self.datasets = sorted({_name(rows) for rows in (*self._embedding, *self._generative)})
        self._number_of = {name: number for number, name in enumerate(self.datasets)}
        self._embedding_order = self._order("embedding") if mode != "generative" else None
        self._generative_order = self._order("generative") if mode != "embedding" else None

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
            generator=torch.Generator(),  # the default generator would be advanced, and the run would depend on the workers
            multiprocessing_context="spawn",
            worker_init_fn=_leave_signals,
        )

    def __getitem__(self, step: int) -> StepSamples:
        samples = StepSamples()
        if self._embedding_order is not None:
            batch = self._embedding_order.batch(step)
            share = rank_share(len(batch), self.rank, self.world)
            # a rank reads its own rows, and those of others whose query occurs more than once in the step
            groups = {
                place: self._draw(dataset, row, random.Random(f"{self.seed}:{step}:{place}"))
                for place in sorted({*share, *self._repeated(batch)})
                for dataset, row in (batch[place],)
            }
            number = _numbering(list(groups.values()))
            for place in share:
                group = groups[place]
                self._add_query(samples, group)
                ids = [number(passage.text) for passage in group.passages]
                samples.query_ids.append(ids[0])
                samples.passage_ids += ids
                samples.passage_scores += group.scores
                samples.query_datasets.append(self._number_of[group.row.dataset])
        if self._generative_order is not None:
            batch = self._generative_order.batch(step)
            for place in rank_share(len(batch), self.rank, self.world):
                dataset, index = batch[place]
                row = self._generative[dataset][index]
                with _naming(row.origin):
                    samples.conversations.append(self.encoder.conversation(row))
                samples.conversation_origins.append(row.origin)
                samples.conversation_datasets.append(self._number_of[row.dataset])
        self.encoder.flush()
        return samples

    def _order(self, kind: str) -> BatchOrder:
        data = self._embedding if kind == "embedding" else self._generative
        config = self.config
        if not data:
            raise ValueError(_lacking(config.train_data, self.mode, kind))
        weights = [config.dataset_weights.get(_name(rows), 1.0) for rows in data]
        wanted = [
            0 if not weight else max(1, round(weight * len(rows))) for weight, rows in zip(weights, data, strict=True)
        ]
        if not any(wanted):
            raise ValueError(f"dataset_weights: got {config.dataset_weights}, which leave no {kind} rows")
        embeds = kind == "embedding"
        return BatchOrder(
            [len(rows) for rows in data],
            self.batch.embedding_batch_size if embeds else self.batch.generative_batch_size,
            2 * self.seed + embeds,
            same_dataset=embeds and config.same_dataset,
            rows_per_epoch=wanted,
        )

    def _repeated(self, batch: Sequence[tuple[int, int]]) -> list[int]:
        """Places of a batch whose query occurs in it more than once."""
        places: dict[int, list[int]] = {}
        for place, (dataset, row) in enumerate(batch):
            places.setdefault(_query_hash(self._embedding[dataset], row), []).append(place)
        return [place for same in places.values() if len(same) > 1 for place in same]

    def _draw(self, dataset: int, index: int, draw: random.Random) -> _Group:
        rows = self._embedding[dataset]
        row = rows[index]
        positive = draw.randrange(len(row.pos))
        negatives = _negatives(row, self.config.train_group_size - 1, draw)
        passages = [row.pos[positive], *(row.neg[i] for i in negatives)]
        scores: list[float | None] = [None] * len(passages)
        if row.pos_scores:
            scores = [row.pos_scores[positive], *(row.neg_scores[i] for i in negatives)]
        example = None
        if len(rows) > 1 and draw.random() < self.config.few_shot:
            other = draw.randrange(len(rows) - 1)
            shown = rows[other + (other >= index)]
            if shown.query != row.query:  # its answer is this query's
                example = (shown.query.text, draw.choice(shown.pos).text)
        return _Group(row, passages, scores, example)

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


def check_data(
    config: DataConfig,
    mode: str = "unified",
    *,
    batch: BatchConfig | None = None,
    in_batch_negatives: bool = True,
    teacher: bool = False,
) -> list[str]:
    """Raise what :func:`open_stream` would, except for texts that are too long: this needs no tokenizer, so a run can call it
    before loading a model.

    Returns:
        What is odd about the data, as far as that is known by then: files that are not read or have no rows, and fewer rows than
        a ``batch``.
    """
    indexes = _indexed(config, mode, in_batch_negatives, teacher)
    notes = unread_note(config.train_data)
    notes += [note for index in indexes if index.kind is None for note in index.report.notes]
    counts = {kind: sum(len(i.facts) for i in indexes if i.kind is kind and _wanted(mode, i)) for kind in (False, True)}
    if config.positives == "each":  # a row is as many as it has positives
        counts[False] = 0
    return notes if batch is None else notes + _too_few(counts, batch)


def _too_few(counts: Mapping[bool, int], batch: BatchConfig) -> list[str]:
    """Of rows by whether they are generative: which are fewer than a batch."""
    sizes = {False: batch.embedding_batch_size, True: batch.generative_batch_size}
    return [
        f"{counts[kind]} {'generative' if kind else 'embedding'} rows are fewer than a batch of {size}: rows are repeated within "
        "a step"
        for kind, size in sizes.items()
        if 0 < counts[kind] < size
    ]


def open_stream(
    config: DataConfig,
    batch: BatchConfig,
    tokenizer: Any,
    *,
    settings: GritSettings | None = None,
    mode: str = "unified",
    in_batch_negatives: bool = True,
    teacher: bool = False,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> TrainingStream:
    """The stream over ``config.train_data``; rank 0 prints which rows are used and left out.

    ``settings``: of the model that is trained. ``in_batch_negatives``, ``teacher``: whether its loss takes them, and a teacher's
    scores. The others as in :class:`TrainingStream`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        DataError: there are no rows, or more than ``max_left_out`` of a file is left out.
        ValueError: the mode needs rows of a kind that the data lack, a setting names a data set that is not there, or no row has
            a teacher's scores.
    """
    encoder = RowEncoder(tokenizer, config, settings)
    report, scored = DataReport(notes=unread_note(config.train_data)), 0
    data: list[DataSet | EachPositive] = []
    contents = hashlib.blake2b(digest_size=16)
    for index in _indexed(config, mode, in_batch_negatives, teacher):
        if _wanted(mode, index):
            contents.update(f"{dataset_name(index.file)} {index.digest}".encode())
            found, left_out = select(index, encoder)
            _check_left_out(config, index.file, left_out)
            chosen = [rows.choice(config.max_rows_per_dataset or len(rows), seed) for rows in found]
            scored += sum(int(rows.facts("scored").sum()) for rows in chosen if not rows.generative)
            each = config.positives == "each"
            data += [EachPositive(rows) if each and not rows.generative else rows for rows in chosen]
            report.add(left_out)
        else:
            report.notes += index.report.notes if index.kind is None else []
    report.used = {}
    for rows in data:
        report.used[rows.name] = report.used.get(rows.name, 0) + len(rows)
    counts = {kind: sum(len(rows) for rows in data if rows.generative == kind) for kind in (False, True)}
    report.notes += _too_few(counts, batch)
    if teacher or scored:
        unused = "" if teacher else ", which are not used: losses.distillation_weight is 0"
        report.notes.append(f"{scored} rows have a teacher's scores{unused}")
    if rank == 0:
        print("\n".join(report.lines()), flush=True)
    share = {"rank": rank, "world": world}
    return TrainingStream(
        data, encoder, config, batch, mode=mode, seed=seed, **share, report=report, digest=contents.hexdigest()
    )


def _indexed(config: DataConfig, mode: str, in_batch_negatives: bool, teacher: bool) -> list[FileIndex]:
    files = data_files(config.train_data)
    indexes = index_files(files)
    names = {*map(dataset_name, files)}
    for index in indexes:
        names |= set(index.names)
        if _wanted(mode, index):
            _check_left_out(config, index.file, index.report)
            folder = Path(index.file).parent.name
            if "no_in_batch_neg" in f"{folder} {dataset_name(index.file)}" and not index.kind and in_batch_negatives:
                raise DataError(
                    f"{index.file}: its name, or that of its folder, says no_in_batch_neg: FlagEmbedding takes no other query's "
                    "passage as a negative. Here in_batch_negatives holds for all data sets: set it to false for a run on such "
                    "files, or rename them"
                )
    kinds = {index.kind for index in indexes}
    for generative, needed in ((False, mode != "generative"), (True, mode != "embedding")):
        if needed and generative not in kinds:
            raise ValueError(_lacking(config.train_data, mode, "generative" if generative else "embedding"))
    embedding = [index for index in indexes if index.kind is False]
    if teacher and mode != "generative" and not any(index.facts["scored"].any() for index in embedding):
        raise ValueError(
            f"losses.distillation_weight: expected 0, for no row of {config.train_data} has pos_scores and neg_scores (grit mine "
            "--scores writes them)"
        )
    if unknown := sorted(set(config.dataset_weights) - names):
        close = difflib.get_close_matches(unknown[0], names, 1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"dataset_weights: expected names from {sorted(names)}, got {unknown[0]!r}{meant}")
    return indexes


def _wanted(mode: str, index: FileIndex) -> bool:
    """Whether the mode trains on the file's rows; a file without valid rows counts, whatever is wrong with it."""
    return (
        index.kind is None
        and bool(index.report.left_out)
        or (index.kind is not None and mode != ("embedding" if index.kind else "generative"))
    )


def _check_left_out(config: DataConfig, file: str, report: DataReport) -> None:
    """Raise if more than ``max_left_out`` of a file's rows cannot be used."""
    bad, used = sum(report.left_out.values()), sum(report.used.values())
    if bad > config.max_left_out * (bad + used):
        detail = "\n".join(DataReport(left_out=report.left_out, examples=report.examples).lines()[1:])
        advice = ""
        if report.left_out.get("no negatives"):
            advice = (
                "\nRows without negatives train with train_group_size 1 (in-batch negatives only), or mine some: "
                f"grit mine {file} ROWS.jsonl"
            )
        limit = f"more than max_left_out ({config.max_left_out}) allows"
        raise DataError(f"{file}: {bad} of {bad + used} rows cannot be used, {limit}\n{detail}{advice}")


def _lacking(train_data: str, mode: str, kind: str) -> str:
    other = "embedding" if kind == "generative" else "generative"
    needs = f"which mode {mode!r} needs; mode {other!r} trains without them"
    return f"train_data: {train_data} has no {kind} rows, {needs}"


def _name(rows: Sequence[Any]) -> str:
    return rows.name if isinstance(rows, DataSet | EachPositive) else str(rows[0].dataset)


def _query_hash(rows: Sequence[Any], index: int) -> int:
    if isinstance(rows, DataSet | EachPositive):
        return rows.query_hash(index)
    return hash(rows[index].query)


def _negatives(row: EmbeddingRow, count: int, draw: random.Random) -> list[int]:
    """Indices of the drawn negatives of the row."""
    if count == 0:
        return []
    if not row.neg:
        raise ValueError(f"{row.origin}: neg: expected at least one with train_group_size {count + 1}, got none")
    return draw.sample(list(range(len(row.neg))) * -(-count // len(row.neg)), count)


def _numbering(groups: Sequence[_Group]) -> Callable[[str], int]:
    """A number for a passage's text, its hash; texts that are positives of identical queries share one."""
    same: dict[str, str] = {}  # text -> the text whose number it shares

    def root(text: str) -> str:
        while text in same:
            text = same[text]
        return text

    first: dict[InstructedText, str] = {}
    for group in groups:
        positive = group.passages[0].text
        mine, other = root(positive), root(first.setdefault(group.row.query, positive))
        if mine != other:
            same[max(mine, other)] = min(mine, other)  # independent of the order of the groups

    def number(text: str) -> int:
        digest = hashlib.blake2b(root(text).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1  # int64

    return number


class _naming:
    """Prefixes an error about a row with ``file:line``."""

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
    """Ignore stop signals sent to all processes of a run: the main process handles them by finishing the step and saving."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
