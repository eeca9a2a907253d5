"""Saved states of a run: what resuming needs, written whole or not at all, the oldest removed.

A state is a folder ``states/step-00000040`` of torch.distributed.checkpoint files (weights that are trained, optimiser,
temperature; every rank writes its shards) with ``state.json`` (step, settings). Data order, sampling and dropout are functions of
seed and step, so nothing else has to be kept. DCP's index is a pickle: resume only folders that you wrote.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from python_model.support.files import write_json
from python_model.train.config import TrainConfig
from python_model.train.distributed import Ranks
from python_model.train.optimizers import Learner

# what may differ between the run that saved and the run that resumes
FREE_SETTINGS = frozenset(
    ("output_dir", "train_data", "model", "save_steps", "save_total", "resume", "trackers", "chunk_tokens", "chunking")
    + (
        "gradient_checkpointing",
        "parallel",
        "shard_size",
        "reduce_each_chunk",
        "cpu_offload",
        "exploding_loss",
        "dry_run",
        "architecture",
        "device_memory",
    )
    + ("data_workers", "token_cache")
)


class States:
    """The states of one run in ``folder``."""

    def __init__(self, folder: Path, config: TrainConfig, ranks: Ranks) -> None:
        self.folder, self.config, self.ranks = folder, config, ranks

    def newest(self) -> Path | None:
        """The last state that was written completely."""
        found = sorted(path.parent for path in self.folder.glob("step-*/state.json"))
        return found[-1] if found else None

    def save(self, step: int, learner: Learner) -> Path:
        """Write the state after ``step`` steps; then drop the oldest beyond ``save_total``."""
        import torch.distributed.checkpoint as dcp

        target = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".step-{step:08d}"
        if self.ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.ranks.barrier()
        dcp.save(learner.tensors(), checkpoint_id=temporary, no_dist=self.ranks.group is None)
        if self.ranks.first:
            write_json(temporary / "state.json", {"step": step, "config": asdict(self.config)})
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            for old in sorted(self.folder.glob("step-*"))[: -self.config.save_total]:
                shutil.rmtree(old)
            for broken in self.folder.glob(".step-*"):
                shutil.rmtree(broken)
        self.ranks.barrier()
        return target

    def load(self, path: Path, learner: Learner) -> int:
        """Restore everything from ``path``; returns how many steps it has done.

        Raises:
            ValueError: the state was written under settings that make another run; names the first that differs.
        """
        import torch.distributed.checkpoint as dcp

        saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name, value in asdict(self.config).items():
            if name not in FREE_SETTINGS and saved["config"].get(name, value) != value:
                raise ValueError(
                    f"{name}: expected {saved['config'][name]!r}, with which {path} was written, got {value!r}; "
                    "give the same value, resume=false, or another output_dir"
                )
        tensors = learner.tensors()
        dcp.load(tensors, checkpoint_id=path, no_dist=self.ranks.group is None)
        learner.restore(tensors)
        return int(saved["step"])
