"""Evaluates a run on held-out rows while it trains, keeps the best state, and stops a run that no longer improves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from python_model.evaluation.held_out import HeldOut, cut_line, evaluate
from python_model.model.modeling import GritLM
from python_model.train.checkpointer import Checkpointer, Stateful
from python_model.train.config import EvaluationConfig
from python_model.train.distributed import Ranks, forwards_apart
from python_model.train.trackers import StepLog

HIGHER_IS_BETTER = {"ndcg_at_10": True, "mrr_at_10": True, "recall_at_10": True, "next_token_loss": False}


class Validation:
    """Scores of a run in ``evaluation.jsonl``, and the state with the best ``config.metric`` in ``checkpointer``.

    Every rank makes one and calls it after every step; they share the work, and the first one writes.

    Args:
        model: the module being trained, which wraps ``grit``, the model to evaluate; ``trained``: the module whose state is kept.
        start: steps already done; later lines of an earlier run are dropped, except up to the best state where that is later.

    Raises:
        As :func:`check_evaluation`.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        model: nn.Module,
        grit: GritLM,
        trained: Stateful,
        folder: Path,
        checkpointer: Checkpointer,
        ranks: Ranks,
        *,
        bf16: bool,
        start: int = 0,
    ) -> None:
        self.config, self.model, self.grit, self.trained = config, model, grit, trained
        self.checkpointer, self.ranks, self.bf16 = checkpointer, ranks, bf16
        self.held_out = check_evaluation(config, grit.mode)
        self._log = _open_log(folder / "evaluation.jsonl", start, checkpointer) if ranks.first else None
        self._told = False

    def __call__(self, step: int, steps: int) -> bool:
        """Evaluate if due after ``step`` of ``steps`` steps; returns whether the run should stop."""
        if step % self.config.every and step != steps:
            return False
        if not self._from_first(any(record["step"] == step for record in self._records)):
            before = self.grit.texts_cut
            scores = self._measure()
            self._tell_cut(self.grit.texts_cut - before)
            if self._log is not None:
                self._log.log(step, scores)
            if self.best() == step:
                self.checkpointer.save(step, self.trained)
        return self.enough()

    def enough(self) -> bool:
        """Whether there was no improvement in ``patience`` evaluations."""
        if not self.config.patience:
            return False
        best = self.best()
        later = sum(record["step"] > best for record in self._records)
        return bool(self._from_first(later >= self.config.patience))

    def best(self) -> int:
        """The step after which the metric was best, the earliest if there are several; 0 before the first evaluation."""
        records = self._records
        return self._from_first(int(_best(records, self.config.metric)["step"]) if records else 0)

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()

    @property
    def _records(self) -> list[dict[str, Any]]:
        return self._log.records if self._log is not None else []

    def _from_first(self, value: int) -> int:
        """The first rank's value, on every rank."""
        return int(self.ranks.all_values([value])[0, 0])

    def _tell_cut(self, cut: int) -> None:
        """Say once how many of the held-out texts were truncated; ``cut``: those that this rank has read."""
        if not self._told:
            self._told = True
            total = int(self.ranks.all_values([cut])[:, 0].sum())
            if total and self.ranks.first:
                tqdm.write(cut_line(total, self.held_out, f"evaluation.max_length ({self.config.max_length} tokens)"))

    @torch.no_grad()
    def _measure(self) -> dict[str, Any]:
        config, inference = self.config, self.grit.is_inference
        self.model.eval()
        self.grit.is_inference = True  # embed without a graph
        try:
            with forwards_apart(self.model, self.ranks) as ranks:
                return evaluate(self.grit, self.held_out, max_length=config.max_length, bf16=self.bf16, ranks=ranks)[0]
        finally:
            self.grit.is_inference = inference


def _open_log(file: Path, start: int, checkpointer: Checkpointer) -> StepLog:
    """The evaluations of a run that resumes after ``start`` steps.

    A run killed between its best evaluation and its next state goes on from before the best state. That one and its scores stay:
    the best before it is gone, and on GPUs the repeated steps come out otherwise.
    """
    best = checkpointer.latest() if start else None
    if best is not None and (step := Checkpointer.step(best)) > start:
        log = StepLog(file, step)
        if any(record["step"] == step for record in log.records):
            return log
        log.close()  # the best state is an earlier run's
    return StepLog(file, start)


def check_evaluation(config: EvaluationConfig, mode: str) -> HeldOut:
    """The held-out rows; a run in ``mode`` calls it before it loads a model.

    Raises:
        FileNotFoundError, DataError: the folder lacks a file, or has a broken one.
        ValueError: the metric is unavailable for this data or mode.
    """
    try:
        held_out = HeldOut(config.data)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"evaluation.{error}") from error
    available = [name for name in HIGHER_IS_BETTER if name != "next_token_loss" and held_out.rows]
    available += ["next_token_loss"] if mode != "embedding" and held_out.conversations else []
    if config.metric not in available:
        raise ValueError(
            f"evaluation.metric: expected one available for this mode and data ({available}), got {config.metric!r}"
        )
    return held_out


def best_scores(file: Path, metric: str) -> dict[str, Any] | None:
    """The scores of the best evaluation in an ``evaluation.jsonl``; None without any."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return _best(records, metric) if records else None


def _best(records: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    sign = -1 if HIGHER_IS_BETTER[metric] else 1
    return min(records, key=lambda record: (sign * record[metric], record["step"]))
