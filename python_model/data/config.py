"""Settings of what is read and how much of it makes a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from python_model.model.few_shot import Style
from python_model.support.checked import Checked, Count, CountOrNone, NotNegative, Range, Share


@dataclass
class DataConfig(Checked):
    """Which rows are trained on, and how they become samples.

    Attributes:
        train_data: jsonl file or folder of files, one data set per file; rows with ``query`` are embedding rows, rows with
            ``text`` generative ones.
        train_group_size: passages per query, the positive included.
        query_max_len: tokens of a query; longer texts lose their end.
        passage_max_len: tokens of a passage.
        generative_max_len: tokens of a conversation.
        positives: of a row with several, ``draw`` takes a random one each time the row comes; with ``each`` the row comes once
            per positive in an epoch.
        same_dataset: batches of texts to embed hold rows of one data set; left-overs make mixed ones.
        dataset_weights: rows of a data set per epoch as a multiple of its size, by name (the file's name up to its first dot);
            1 for those not named, 0 leaves a data set out.
        max_rows_per_dataset: a random choice of that many rows of each larger data set; 0: all rows.
        max_left_out: share of a file's rows that may be unusable; more stop the run.
        few_shot: share of the queries whose instructions get one example from another row of the data set.
        few_shot_style: wording of the example.
        data_workers: processes that read and tokenise ahead; 0: none. The samples are the same for any number.
        token_cache: SQLite file that keeps tokenised texts between runs; empty: none.
    """

    train_data: str = ""
    train_group_size: Count = 2
    query_max_len: Count = 256
    passage_max_len: Count = 2048
    generative_max_len: Count = 2048
    positives: Literal["draw", "each"] = "draw"
    same_dataset: bool = True
    dataset_weights: dict[str, NotNegative] = field(default_factory=dict)
    max_rows_per_dataset: CountOrNone = 0
    max_left_out: Share = 0.1
    few_shot: Share = 0.0
    few_shot_style: Style = "retrieval"
    data_workers: CountOrNone = 0
    token_cache: str = ""


@dataclass
class BatchConfig(Checked):
    """Samples of a step, and the chunks that they are computed in.

    Attributes:
        embedding_batch_size: queries per step, over all ranks.
        generative_batch_size: conversations per step, over all ranks.
        chunk_tokens: tokens of one forward and backward pass; 0: one pass for the texts to embed and one for the conversations.
            The gradients are those of the whole step either way (gradient caching), and memory depends on this number, not on
            the batch size.
        chunking: ``tokens`` fills chunks of ``chunk_tokens``; ``triplet`` is the paper's split: one pass each for positives,
            negatives and queries.
    """

    embedding_batch_size: Count = 12
    generative_batch_size: Count = 3
    chunk_tokens: Annotated[int, Range(0)] = 0
    chunking: Literal["tokens", "triplet"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunking == "triplet" and self.chunk_tokens:
            raise ValueError(f"chunk_tokens: expected 0 with chunking 'triplet', got {self.chunk_tokens}")
