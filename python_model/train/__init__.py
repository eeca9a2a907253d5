"""GRIT training: ``python -m python_model.train --config FILE [--key value ...]``."""

from python_model.train.batch import UnifiedBatch, build_batch, pack_samples
from python_model.train.config import TrainConfig
from python_model.train.trainer import Trainer, compute_losses

__all__ = ["TrainConfig", "Trainer", "UnifiedBatch", "build_batch", "compute_losses", "pack_samples"]
