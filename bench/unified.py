"""A unified batch on a model of a real shape with random weights: one packed pass against three padded passes.

    python -m bench.unified --device cuda --shape mistral-7b --record unified_cuda.json
    python -m bench.unified --shape 1b --queries 2 --conversations 1 --scale 0.1

A batch has queries of up to 256 tokens, two passages of up to 2048 per query (bidirectional, pooled) and conversations of up to
2048 tokens (causal, next-token loss on their second half); actual lengths are 40 to 100 % of those. Timed in turn, in bfloat16:

* forward: ``packed``, the patched model on one pack; ``three padded passes``, unpatched transformers with sdpa, one pass each for
  queries, passages and conversations
* step: the same with both losses, backward pass and gradient checkpointing; no optimiser. ``packed`` uses this package's
  pooling and losses, the padded passes those of the public implementation: masked mean, scores, full logits

Speeds are reported only after both gave the same losses. FLOPs are 2 (forward) or 6 (step) per weight and real token.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from bench import common
from bench.random_model import SHAPES, random_model

PACKED, PADDED = "packed", "three padded passes"
TEMPERATURE, PASSAGES_PER_QUERY, INSTRUCTION = 0.02, 2, 3


@dataclass
class Batch:
    """Token ids (one row per sample) on the device."""

    queries: list[Tensor]
    passages: list[Tensor]
    conversations: list[Tensor]

    @property
    def tokens(self) -> int:
        return sum(map(len, (row for rows in (self.queries, self.passages, self.conversations) for row in rows)))

    def labels(self) -> list[Tensor]:
        """The next token where it is in the second half of its conversation, else -100."""
        found = []
        for ids in self.conversations:
            labels = torch.full_like(ids, -100)
            half = len(ids) // 2
            labels[half:-1] = ids[half + 1 :]
            found.append(labels)
        return found


def make_batch(queries: int, conversations: int, scale: float, device: str, vocabulary: int, seed: int = 0) -> Batch:
    draw = random.Random(seed)

    def rows(count: int, most: int) -> list[Tensor]:
        lengths = [max(INSTRUCTION + 2, round(most * scale * draw.uniform(0.4, 1.0))) for _ in range(count)]
        return [torch.randint(3, vocabulary, (length,), device=device) for length in lengths]

    return Batch(rows(queries, 256), rows(queries * PASSAGES_PER_QUERY, 2048), rows(conversations, 2048))


def packed_pass(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of queries and passages, and the conversations' states, from one pass of the patched model."""
    texts, talks = [*batch.queries, *batch.passages], batch.conversations
    lengths = [len(ids) for ids in (*texts, *talks)]
    flags = [False] * len(texts) + [True] * len(talks)
    instructions = [INSTRUCTION] * len(texts) + [0] * len(talks)
    device = texts[0].device
    pack = gk.SamplePack.from_lengths(lengths, flags, instructions, device=device)
    states = model.model(torch.cat([*texts, *talks])[None], sample_pack=pack).last_hidden_state[0]
    pooled = gk.pool(
        states,
        cu_seqlens=pack.cu_seqlens,
        instruction_lens=pack.instruction_lens,
        normalize=True,
    )
    count = len(batch.queries)
    return pooled[:count], pooled[count : len(texts)], states[sum(lengths[: len(texts)]) :]


def packed_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Contrastive and next-token loss of :func:`packed_pass`."""
    queries, passages, states = packed_pass(model, batch)
    contrastive = gk.contrastive_loss(queries, passages, temperature=TEMPERATURE)
    labels = torch.cat(batch.labels())
    losses = gk.linear_cross_entropy(states, model.lm_head.weight, labels)
    return contrastive, losses.sum() / (labels != -100).sum()


def _padded(rows: list[Tensor], value: int = 0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _padded_states(model: Any, rows: list[Tensor], causal: bool) -> tuple[Tensor, Tensor]:
    mask = _padded([torch.ones_like(ids) for ids in rows])
    output = model.model(_padded(rows), attention_mask=mask, is_causal=causal, use_cache=False)
    return output.last_hidden_state, mask


def padded_pass(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`packed_pass`, from three passes of the unpatched model; the conversations' states are padded."""

    def embed(rows: list[Tensor]) -> Tensor:
        states, mask = _padded_states(model, rows, causal=False)
        mask[:, :INSTRUCTION] = 0
        pooled = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(pooled, dim=-1)

    return embed(batch.queries), embed(batch.passages), _padded_states(model, batch.conversations, causal=True)[0]


def padded_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The losses of :func:`padded_pass`, with all scores and all logits."""
    queries, passages, states = padded_pass(model, batch)
    targets = torch.arange(len(queries), device=queries.device) * PASSAGES_PER_QUERY
    contrastive = F.cross_entropy(queries @ passages.T / TEMPERATURE, targets)
    logits = model.lm_head(states).float()
    return contrastive, F.cross_entropy(logits.flatten(0, 1), _padded(batch.labels(), -100).flatten())


Losses = Callable[[Any, Batch], tuple[Tensor, Tensor]]


def step(model: Any, losses: Losses, batch: Batch) -> tuple[float, float]:
    """Gradients of the sum of both losses, which are then discarded."""
    model.train()
    contrastive, generative = losses(model, batch)
    (contrastive + generative).backward()
    model.zero_grad(set_to_none=True)
    return float(contrastive.detach()), float(generative.detach())


def packed_runs(plain: Any, batch: Batch) -> dict[str, Callable[[], Any]]:
    """What this package runs, by kind of work; ``plain`` is patched."""
    model = gk.patch(plain)
    gk.hf.checkpoint_activations(model)

    @torch.no_grad()
    def forward() -> None:
        packed_pass(model.eval(), batch)

    return {"step": lambda: step(model, packed_losses, batch), "forward": forward}


def measure(plain: Any, batch: Batch, device: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of both kinds of work."""
    dtype = next(plain.parameters()).dtype
    packed = packed_runs(copy.deepcopy(plain), batch)
    gk.hf.checkpoint_activations(plain)

    @torch.no_grad()
    def padded_forward() -> None:
        padded_pass(plain.eval(), batch)

    padded = {"step": lambda: step(plain, padded_losses, batch), "forward": padded_forward}
    variants = {PACKED: packed, PADDED: padded}
    values = {name: runs["step"]() for name, runs in variants.items()}
    if any(abs(a - b) > 0.02 * abs(b) + 0.02 for a, b in zip(values[PACKED], values[PADDED], strict=True)):
        raise AssertionError(f"the losses differ: {values}; no speed is reported")

    def peak(run: Callable[[], Any]) -> float | None:
        """MiB above what was allocated before, on a GPU."""
        if device != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    weights = sum(p.numel() for p in plain.parameters()) - plain.model.embed_tokens.weight.numel()
    gemm, flops = common.gemm_ceiling(device, dtype)
    rows = []
    for work, factor in (("forward", 2.0), ("step", 6.0)):
        runs = {name: variants[name][work] for name in variants}
        seconds = common.interleave({**runs, "gemm": gemm}, repeats, common.synchronizer(device), warmup=1)
        middle, times = common.medians(seconds), common.ratios(seconds, PACKED)
        ceiling = flops / middle["gemm"]
        for name in variants:
            rate = factor * weights * batch.tokens / middle[name]
            rows.append(
                {
                    "work": work, "variant": name, "tokens": batch.tokens, "tokens_per_second": batch.tokens / middle[name],
                    "times_packed": times[name], "tflops": rate / 1e12, "of_gemm": rate / ceiling,
                    "memory_mib": peak(runs[name]), "losses": values[name], "seconds": seconds[name],
                }
            )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.unified", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="1b", choices=sorted(SHAPES))
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all lengths")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    plain = random_model(arguments.shape, device=arguments.device, dtype=torch.bfloat16)
    shape = (arguments.queries, arguments.conversations, arguments.scale)
    batch = make_batch(*shape, arguments.device, plain.config.vocab_size)
    rows = measure(plain, batch, arguments.device, arguments.repeats)
    for row in rows:
        row |= {"shape": arguments.shape, "dtype": "bfloat16"}
    columns = ["work", "variant", "tokens_per_second", "times_packed", "tflops", "of_gemm", "memory_mib"]
    print(common.table(rows, columns))
    if arguments.record:
        print(f"record: {common.write_records(arguments.record, rows)}")


if __name__ == "__main__":
    main()
