"""The training loop: one packed forward per step serves both losses."""

from __future__ import annotations

import contextlib
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

import grit_kernels as gk
from python_model.data.jsonl import EmbeddingRow, GenerativeRow
from python_model.files import new_folder, write_json
from python_model.losses import generative_loss, joint_loss
from python_model.modeling import GritLM
from python_model.prompts import IGNORE_INDEX
from python_model.train.batch import UnifiedBatch, build_batch, shuffled_epochs
from python_model.train.config import TrainConfig


@dataclass(frozen=True)
class StepLosses:
    """Losses of one batch; ``None`` where the batch has no such samples."""

    total: Tensor
    contrastive: Tensor | None
    generative: Tensor | None


def compute_losses(model: GritLM, batch: UnifiedBatch, config: TrainConfig) -> StepLosses:
    """Both losses of a batch from one packed forward pass."""
    hidden = model.hidden_states(batch.input_ids, batch.pack)
    contrastive: Tensor | None = None
    generative: Tensor | None = None
    if batch.queries:
        samples = batch.queries + batch.passages
        vectors = model.pool(
            hidden[: batch.embedding_tokens],
            batch.pack.cu_seqlens[: samples + 1],
            batch.pack.instruction_lens[:samples],
        )
        queries, passages = vectors.split([batch.queries, batch.passages])
        contrastive = cast(
            Tensor,
            gk.contrastive_loss(queries, passages, temperature=config.temperature, mask_ids=batch.mask_ids),
        )
    if batch.labels.numel():
        token_losses = next_token_losses(model, hidden[batch.embedding_tokens :], batch.labels)
        generative = generative_loss(
            token_losses, batch.labels, batch.generative_cu_seqlens, kind=config.generative_loss
        )
    total = joint_loss(
        contrastive,
        generative,
        contrastive_weight=config.contrastive_weight,
        generative_weight=config.generative_weight,
    )
    return StepLosses(total, contrastive, generative)


def next_token_losses(model: GritLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """float32 (tokens): the loss of each labelled token; only those rows meet the language-model head."""
    used = (labels != IGNORE_INDEX).nonzero()[:, 0]
    losses = gk.linear_cross_entropy(hidden[used], model.model.get_output_embeddings().weight, labels[used])
    return losses.new_zeros(labels.shape[0]).index_copy(0, used, losses)


class Trainer:
    """Trains ``model`` on rows; see :class:`TrainConfig`. Same seed, data and machine: same run."""

    def __init__(
        self,
        model: GritLM,
        config: TrainConfig,
        embedding_rows: list[EmbeddingRow],
        generative_rows: list[GenerativeRow],
    ) -> None:
        if config.embeds and not embedding_rows:
            raise ValueError(f"train_data: {config.train_data} has no embedding rows, which mode {config.mode!r} needs")
        if config.generates and not generative_rows:
            raise ValueError(
                f"train_data: {config.train_data} has no generative rows, which mode {config.mode!r} needs"
            )
        self.model, self.config = model, config
        self.generator = random.Random(config.seed)
        orders = (random.Random(config.seed + 1), random.Random(config.seed + 2))
        self.embedding = (
            shuffled_epochs(embedding_rows, config.embedding_batch_size, orders[0]) if config.embeds else None
        )
        self.generative = (
            shuffled_epochs(generative_rows, config.generative_batch_size, orders[1]) if config.generates else None
        )
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.999)
        )
        warmup = max(1, round(config.steps * config.warmup_ratio))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, max(0.0, (config.steps - step) / config.steps))
        )
        if config.gradient_checkpointing:
            model.model.gradient_checkpointing_enable()

    def next_batch(self) -> UnifiedBatch:
        """The next step's rows, tokenised and packed."""
        rows = next(self.embedding) if self.embedding is not None else []
        conversations = next(self.generative) if self.generative is not None else []
        return build_batch(self.model.tokenizer, rows, conversations, self.config, self.generator)

    def step(self, batch: UnifiedBatch) -> dict[str, Any]:
        """One optimiser step; returns what the log records."""
        batch = batch.to(self.model.device)
        autocast = (
            torch.autocast(self.model.device.type, torch.bfloat16) if self.config.bf16 else contextlib.nullcontext()
        )
        with autocast:
            losses = compute_losses(self.model, batch, self.config)
        if not bool(torch.isfinite(losses.total)):
            self._save_bad_batch(batch, losses)
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": float(losses.total.detach()),
            "contrastive_loss": None if losses.contrastive is None else float(losses.contrastive.detach()),
            "generative_loss": None if losses.generative is None else float(losses.generative.detach()),
            "gradient_norm": float(norm),
            "learning_rate": rate,
            "tokens": batch.pack.tokens,
        }

    def train(self) -> list[dict[str, Any]]:
        """Run all steps with a progress bar; the log is appended to ``output_dir/log.jsonl`` as it grows."""
        folder = Path(self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(self.config))
        torch.manual_seed(self.config.seed)
        self.model.train()
        records: list[dict[str, Any]] = []
        with (
            open(folder / "log.jsonl", "w", encoding="utf-8") as log,
            tqdm(total=self.config.steps, desc="train", unit="step") as bar,
        ):
            for index in range(self.config.steps):
                start = time.perf_counter()
                record = {"step": index + 1, **self.step(self.next_batch())}
                record["seconds"] = time.perf_counter() - start
                records.append(record)
                log.write(json.dumps(record) + "\n")
                log.flush()
                shown = {
                    "rep": record["contrastive_loss"],
                    "gen": record["generative_loss"],
                    "tok/s": record["tokens"] / record["seconds"],
                }
                bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if v is not None})
                bar.update()
        self.model.eval()
        return records

    def save(self) -> Path:
        """Write the trained checkpoint to ``output_dir/checkpoint``, whole or not at all; returns the folder."""
        target = Path(self.config.output_dir) / "checkpoint"
        with new_folder(target) as folder:
            self.model.save_pretrained(folder)
        return target

    def _save_bad_batch(self, batch: UnifiedBatch, losses: StepLosses) -> None:
        file = Path(self.config.output_dir) / "bad_batch.json"
        lengths = batch.pack.lengths.tolist()
        write_json(file, {"input_ids": batch.input_ids.tolist(), "lengths": lengths, "queries": batch.queries})
        raise FloatingPointError(
            f"loss: got {float(losses.total.detach())} (contrastive {losses.contrastive}, generative {losses.generative}); "
            f"the batch is saved in {file}"
        )
