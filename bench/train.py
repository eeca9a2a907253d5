"""One unified training step of the 135M model: one packed pass against three padded passes of stock transformers.

    python -m bench.train [--repeats 7] [--record train_cpu.json]

Same weights, same samples (random token ids, lengths log-uniform: 6 queries of 8..64 tokens, 12 passages of 16..256, 2
conversations of 64..512 with the second half as reply), same losses, bfloat16 autocast over FP32 weights unless the CPU emulates
bfloat16 (``--dtype``); losses and gradients are timed, not the optimiser, which is the same for all.
Variants, interleaved in one run:

* ``packed``: python_model.train, texts in one pass and conversations in another
* ``packed, chunks of 1024``: the same gradients by gradient caching, which embeds twice and keeps one chunk's activations
* ``packed, not fused``: as the first, patched with ``fuse=False``
* ``three padded passes``: unpatched transformers with sdpa, one padded pass each for conversations, queries and passages, full
  logits, as the public implementation trains

Memory is the growth of the peak resident set over one step, in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import grit_kernels as gk
from bench import common
from python_model import GritLM
from python_model.corpora.small_model import resolve_model
from python_model.data.config import BatchConfig
from python_model.model.prompts import IGNORE_INDEX, EncodedSample
from python_model.support.quiet import quiet
from python_model.train.config import LossConfig
from python_model.train.distributed import Ranks
from python_model.train.model import TrainingModel
from python_model.train.step import StepGradients, plan_step

VARIANTS = ("packed", "packed, chunks of 1024", "packed, not fused", "three padded passes")
TEMPERATURE = 0.02
VOCABULARY = 49152


@dataclasses.dataclass
class Batch:
    """Samples of a step; two passages per query."""

    queries: list[EncodedSample]
    passages: list[EncodedSample]
    conversations: list[EncodedSample]

    @property
    def tokens(self) -> int:
        return sum(len(s) for s in [*self.queries, *self.passages, *self.conversations])


def make_batch(seed: int, queries: int = 6, conversations: int = 2, scale: float = 1.0) -> Batch:
    """Random samples of the lengths named above, times ``scale``."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        length = round(math.exp(draw.uniform(math.log(low), math.log(high))) * scale)
        return [draw.randrange(3, VOCABULARY) for _ in range(max(4, length))]

    def talk(tokens: list[int]) -> EncodedSample:
        labels = [*tokens[1:], IGNORE_INDEX]
        return EncodedSample(tokens, labels=[IGNORE_INDEX if t < len(tokens) // 2 else x for t, x in enumerate(labels)])

    return Batch(
        [EncodedSample(ids(8, 64), 2) for _ in range(queries)],
        [EncodedSample(ids(16, 256), 2) for _ in range(2 * queries)],
        [talk(ids(64, 512)) for _ in range(conversations)],
    )


def packed(
    path: str, batch: Batch, chunk_tokens: int = 0, dtype_bf16: bool = True, fuse: bool = True
) -> tuple[Callable[[], float], Any]:
    """A step of python_model.train: the closure returns its loss; and the model."""
    chunking, losses = BatchConfig(chunk_tokens=chunk_tokens), LossConfig(temperature=TEMPERATURE)
    grit = GritLM(path, is_inference=False, device="cpu", dtype="float32")
    gk.patch(grit.model, bidirectional_window=grit.settings.bidirectional_window, fuse=fuse)
    ranks = Ranks(0, 1, torch.device("cpu"))
    gradients = StepGradients(TrainingModel(grit), losses, ranks, bf16=dtype_bf16)

    def step() -> float:
        planned = plan_step(batch.queries, batch.passages, batch.conversations, None, chunking, losses, ranks)
        loss = gradients(planned, seed=0).total
        grit.model.zero_grad()
        return loss

    return step, grit.model


def three_passes(path: str, batch: Batch, dtype_bf16: bool = True) -> tuple[Callable[[], float], Any]:
    """The same step on the unpatched model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").train()

    def pad(rows: list[list[int]], value: int = 0) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)

    def embed(samples: list[EncodedSample]) -> torch.Tensor:
        mask = pad([[1] * len(s) for s in samples])
        states = model.model(pad([s.input_ids for s in samples]), attention_mask=mask, is_causal=False, use_cache=False)
        keep = pad([[0] * s.instruction_len + [1] * (len(s) - s.instruction_len) for s in samples])[..., None]
        pooled = (states.last_hidden_state.float() * keep).sum(1) / keep.sum(1)
        return F.normalize(pooled, dim=-1)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype_bf16):
            mask = pad([[1] * len(s) for s in batch.conversations])
            ids = pad([s.input_ids for s in batch.conversations])
            logits = model(ids, attention_mask=mask, use_cache=False).logits.float()
            labels = pad([s.labels or [] for s in batch.conversations], IGNORE_INDEX)
            generative = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
            queries, passages = embed(batch.queries), embed(batch.passages)
        targets = torch.arange(len(batch.queries)) * 2
        contrastive = F.cross_entropy(queries.float() @ passages.float().T / TEMPERATURE, targets)
        total = contrastive + generative
        total.backward()
        model.zero_grad()
        return float(total.detach())

    return step, model


def make(name: str, path: str, batch: Batch, bf16: bool = True) -> tuple[Callable[[], float], Any]:
    """A variant by its name."""
    if name == "three padded passes":
        return three_passes(path, batch, bf16)
    return packed(path, batch, 1024 if "chunks" in name else 0, bf16, "not fused" not in name)


def memory_growth(name: str, seed: int, dtype: str) -> float:
    """Growth of the peak resident set (MiB) in one step of a fresh process, after a tiny one."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.train", "--memory-of", name, "--seed", str(seed), "--dtype", dtype],
        capture_output=True,
        text=True,
        check=True,
        cwd=common.ROOT,
    )
    return float(json.loads(run.stdout.splitlines()[-1]))


def _measure_memory(name: str, seed: int, bf16: bool) -> None:
    batch = make_batch(seed, 2, 1, 0.1)
    step, _ = make(name, str(resolve_model("smollm2-135m")), batch, bf16)
    step()  # from here on, gradients and thread pools exist
    before = common.peak_resident_bytes()
    real = make_batch(seed)
    batch.queries[:], batch.passages[:], batch.conversations[:] = real.queries, real.passages, real.conversations
    step()
    print(json.dumps((common.peak_resident_bytes() - before) / 2**20))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--record", default="train_cpu.json", help="JSON file, a bare name goes into bench/results/KIND"
    )
    parser.add_argument(
        "--dtype", default=common.model_dtype(), choices=("bfloat16", "float32"), help="bfloat16: autocast"
    )
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    quiet()
    bf16 = arguments.dtype == "bfloat16"
    if arguments.memory_of:
        _measure_memory(arguments.memory_of, arguments.seed, bf16)
        return
    path, batch = str(resolve_model("smollm2-135m")), make_batch(arguments.seed)
    steps = {name: make(name, path, batch, bf16)[0] for name in VARIANTS}
    losses: dict[str, float] = {}
    runs = {name: (lambda name=name, step=step: losses.__setitem__(name, step())) for name, step in steps.items()}
    seconds = common.interleave(runs, arguments.repeats, warmup=1)
    speedups = common.ratios(seconds, "three padded passes")
    middle = common.medians(seconds)
    rows = [
        {
            "variant": name,
            "tokens_per_second": batch.tokens / middle[name],
            "speedup": 1 / speedups[name],
            "memory_mib": memory_growth(name, arguments.seed, arguments.dtype),
            "loss": losses[name],
            "seconds": middle[name],
            "all_seconds": seconds[name],
            "tokens": batch.tokens,
            "lengths": [[len(s) for s in kind] for kind in (batch.queries, batch.passages, batch.conversations)],
            **common.named_dtype(arguments.dtype),
        }
        for name in VARIANTS
    ]
    print(common.table(rows, ["variant", "tokens_per_second", "speedup", "memory_mib", "loss", "seconds"]))
    print(f"record: {common.write_records(arguments.record, rows)}")


if __name__ == "__main__":
    main()
