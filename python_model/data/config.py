"""Settings of what is read and how much of it forms a step."""

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
            ``text`` generative rows.
        train_group_size: passages per query, including the positive.
        query_max_len: maximum tokens of a query; longer ones are truncated.
        passage_max_len: maximum tokens of a passage.
        generative_max_len: maximum tokens of a conversation.
        causal_documents: share of the conversations with documents whose documents are read causally instead of with the
            attention of a text to embed.
        positives: for rows with several: ``draw`` takes a random one each time the row is visited; ``each`` visits the row once
            per positive in an epoch.
        same_dataset: draw each batch of texts to embed from one data set; the remainders form mixed batches.
        dataset_weights: rows per epoch as a multiple of the data set's size, by name (the file's name up to its first dot);
            default 1; 0 excludes a data set.
        max_rows_per_dataset: use a random subset of this many rows of each larger data set; 0: all rows.
        max_left_out: share of a file's rows that may be unusable; if there are more, the run stops.
        few_shot: share of the queries whose instruction is followed by an example from another row of the data set.
        few_shot_style: wording of the example.
        data_workers: processes that read and tokenise ahead; 0: none. The samples do not depend on it.
        token_cache: SQLite file that keeps tokenised texts between runs; empty: none.
    """

    train_data: str = ""
    train_group_size: Count = 2
    query_max_len: Count = 256
    passage_max_len: Count = 2048
    generative_max_len: Count = 2048
    causal_documents: Share = 0.0
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
    """The samples of a step, and the chunks in which they are computed.

    Attributes:
        embedding_batch_size: queries per step, over all ranks.
        generative_batch_size: conversations per step, over all ranks.
        chunk_tokens: maximum tokens of a forward and backward pass; 0: one pass for the texts to embed and one for the
            conversations. The gradients are those of the whole step either way (gradient caching), and memory depends on this
            number, not on the batch size.
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
