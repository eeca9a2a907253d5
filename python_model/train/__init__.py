"""GRIT training: ``python -m python_model.train --config FILE [--key value ...]``.

config.py       every setting
run.py          settings -> a finished checkpoint, or a memory estimate
setup.py        settings -> model (adapters.py: LoRA), memory plan (memory.py)
trainer.py      the loop: samples -> plan -> gradients -> update -> log -> state
model.py        the module whose forward takes a chunk
step.py         gradients of a step, exact over chunks and ranks
balance.py      the gradients of the two objectives, clipped and added
optimizers.py   optimiser, schedule, temperature
distributed.py  ranks, FSDP2, DDP
checkpointer.py saving and resuming
validation.py   evaluation on held-out rows, best state, early stopping
trackers.py     logging of figures
plot.py         the losses as a picture
flops.py        operations of a step, MFU
profiling.py    traces of some steps
ablation.py     variants one after another, in one table
"""

from python_model.train.config import TrainConfig
from python_model.train.trainer import Interrupted, Trainer

__all__ = ["Interrupted", "TrainConfig", "Trainer"]
