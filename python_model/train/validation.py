"""Measuring a run on held-out rows while it trains: the best state is kept, and a run that no longer improves stops."""

from __future__ import annotations

from pathlib import Path

import torch

from python_model.evaluation.held_out import HeldOut, evaluate
from python_model.model.modeling import GritLM
from python_model.train.checkpointer import Checkpointer, Stateful
from python_model.train.config import EvaluationConfig
from python_model.train.trackers import StepLog

HIGHER_IS_BETTER = {"ndcg_at_10": True, "mrr_at_10": True, "recall_at_10": True, "next_token_loss": False}


class Validation:
    """Scores of a run in ``evaluation.jsonl``, and the state with the best ``config.metric`` in ``checkpointer``.

    Args:
        model: what is measured; ``trained``: whose state is kept.
        start: steps that are done; later lines of an earlier run are dropped.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        model: GritLM,
        trained: Stateful,
        folder: Path,
        checkpointer: Checkpointer,
        *,
        bf16: bool,
        start: int = 0,
    ) -> None:
        self.config, self.model, self.trained, self.checkpointer = config, model, trained, checkpointer
        self.bf16 = bf16
        self.held_out = HeldOut(config.data)
        self.log = StepLog(folder / "evaluation.jsonl", start)

    def __call__(self, step: int, steps: int) -> bool:
        """Measure where it is due after ``step`` of ``steps`` steps; returns whether the run should stop.

        Raises:
            ValueError: the metric is not measured on this data or in this mode.
        """
        if step % self.config.every and step != steps:
            return False
        if not any(record["step"] == step for record in self.log.records):
            self.model.eval()
            with torch.no_grad():
                scores, _ = evaluate(self.model, self.held_out, max_length=self.config.max_length, bf16=self.bf16)
            if scores.get(self.config.metric) is None:
                measured = [name for name in HIGHER_IS_BETTER if scores.get(name) is not None]
                raise ValueError(
                    f"evaluation.metric: expected one that mode and data give ({measured}), got {self.config.metric!r}"
                )
            self.log.log(step, scores)
            if self.best() == step:
                self.checkpointer.save(step, self.trained)
        return self.enough()

    def enough(self) -> bool:
        """Whether ``patience`` measurements brought nothing better."""
        if not self.config.patience or not self.log.records:
            return False
        return sum(record["step"] > self.best() for record in self.log.records) >= self.config.patience

    def best(self) -> int:
        """The step after which the metric was best; the earliest where several were."""
        sign = -1 if HIGHER_IS_BETTER[self.config.metric] else 1
        best = min(self.log.records, key=lambda record: (sign * record[self.config.metric], record["step"]))
        return int(best["step"])
