"""End-to-end forward of the 135M model on mixed-length batches: one packed pass against what is commonly run today.

    python -m bench.model [--texts 24] [--repeats 3] [--record NAME.json] [--no-profile]

Lengths are log-uniform in 8..512 tokens of the bundled corpus; half of the samples are causal (chats), half bidirectional (texts
to embed). Every repeat is a batch with new lengths. Variants, interleaved in one run, in the
dtype that models compute in on this machine (``--dtype``):

* forward: ``packed``, the patched model, all samples in one pass; ``packed, not fused``, patched with ``fuse=False``;
  ``sdpa, two padded passes``, unpatched transformers, one for causal and one for bidirectional rows, each padded to its longest
* encode: python_model.GritLM.encode on the texts, with and without fused ops, against the class of the package gritlm 1.0.2
  where it is importable (``pip install --no-deps gritlm==1.0.2``)

Speeds are reported only after all variants of a group agreed, up to the rounding of the dtype. The profile shows where a
pass spends its time, per group of modules (model_profile.py).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grit_kernels as gk
from bench import common
from bench.model_profile import seconds_by_group
from python_model import GritLM
from python_model.corpora.small_model import fetch_small_model
from python_model.data import sample_dir
from python_model.model.prompts import EMBED
from python_model.support.quiet import quiet

SHORTEST, LONGEST = 8, 512
PACKED, UNFUSED, TWO_PASSES = "packed", "packed, not fused", "sdpa, two padded passes"
ENCODE, ENCODE_UNFUSED, REFERENCE = "encode", "encode, not fused", "encode, gritlm 1.0.2"


class Batch(NamedTuple):
    """Token ids of each sample, its text, and its flag."""

    samples: list[Tensor]
    texts: list[str]
    causal: Tensor


Variant = Callable[[Batch], Tensor]
"""Runs a batch and returns one row per sample, for comparing variants."""


def log_uniform_lengths(count: int, generator: random.Random) -> list[int]:
    """``count`` lengths, log-uniform in SHORTEST..LONGEST."""
    low, high = math.log(SHORTEST), math.log(LONGEST)
    return [round(math.exp(generator.uniform(low, high))) for _ in range(count)]


def draw_batch(corpus: Tensor, tokenizer: Any, count: int, generator: random.Random) -> Batch:
    """Slices of the corpus (token ids) of log-uniform lengths, every second one causal."""
    samples = []
    for length in log_uniform_lengths(count, generator):
        start = generator.randrange(len(corpus) - length)
        samples.append(corpus[start : start + length])
    return Batch(samples, [str(tokenizer.decode(ids)) for ids in samples], torch.arange(count) % 2 == 0)


def corpus_ids(tokenizer: Any) -> Tensor:
    """All texts of the bundled corpus as one row of token ids."""
    lines = (sample_dir() / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    ids = tokenizer([json.loads(line)["text"] for line in lines])["input_ids"]
    return torch.tensor([token for row in ids for token in row])


def padded(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and attention mask."""
    ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in samples], batch_first=True)
    return ids, mask


def last_states(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, hidden) state of each sample's last token."""
    return hidden[torch.arange(len(mask)), mask.sum(1) - 1]


def packed_forward(patched: Any) -> Variant:
    def run(batch: Batch) -> Tensor:
        ids, mask = padded(batch.samples)
        hidden = patched(ids, attention_mask=mask, is_causal=batch.causal, use_cache=False).last_hidden_state
        return last_states(hidden, mask)

    return run


def two_padded_passes(stock: Any) -> Variant:
    def run(batch: Batch) -> Tensor:
        states = torch.empty(len(batch.samples), stock.config.hidden_size, dtype=stock.dtype)
        for flag in (True, False):
            rows = (batch.causal == flag).nonzero()[:, 0]
            ids, mask = padded([batch.samples[i] for i in rows.tolist()])
            hidden = stock(ids, attention_mask=mask, is_causal=flag, use_cache=False).last_hidden_state
            states[rows] = last_states(hidden, mask)
        return states

    return run


def encode_variants(path: str, dtype: str) -> dict[str, Variant]:
    """GritLM.encode of this package, fused and not, and of gritlm 1.0.2 where it is installed."""

    def encoder(model: Any) -> Variant:
        # the model's tokenizer adds no BOS; GritLM would here, unless told not to
        options = {"instruction": EMBED, "max_length": LONGEST, "add_special_tokens": False}
        return lambda batch: torch.as_tensor(model.encode(batch.texts, batch_size=len(batch.texts), **options))

    ours, unfused = (GritLM(path, device="cpu", dtype=dtype) for _ in range(2))
    gk.patch(unfused.model, bidirectional_window=unfused.settings.bidirectional_window, fuse=False)
    variants = {ENCODE: encoder(ours), ENCODE_UNFUSED: encoder(unfused)}
    if importlib.util.find_spec("gritlm") is not None:
        from gritlm import GritLM as Reference

        variants[REFERENCE] = encoder(Reference(path, torch_dtype=getattr(torch, dtype), attn="bbcc", device="cpu"))
    return variants


def check_agreement(variants: dict[str, Variant], batch: Batch) -> None:
    """Check that all variants give the same rows, up to the rounding of bfloat16 over 30 layers (a few per cent on the shortest
    texts); the tests compare them in FP32. This also warms them up."""
    results = {name: run(batch).float() for name, run in variants.items()}
    (base, want), *others = results.items()
    for name, got in others:
        cosines = torch.nn.functional.cosine_similarity(got, want)
        if cosines.median() < 0.99 or cosines.min() < 0.9:
            raise AssertionError(f"{name!r} differs from {base!r}, cosines {cosines.tolist()}; no speed is reported")


def measure(group: str, variants: dict[str, Variant], batches: list[Batch], counts: list[int]) -> list[dict[str, Any]]:
    """One row per variant; every repeat runs all variants in turn on one batch."""
    check_agreement(variants, batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for batch in batches:
        for name, run in variants.items():
            start = time.perf_counter()
            run(batch)
            seconds[name].append(time.perf_counter() - start)
    base = next(iter(variants))
    return [
        {
            "group": group,
            "variant": name,
            "tokens_per_second": sum(counts) / sum(own),
            "time_over_first": statistics.median(a / b for a, b in zip(own, seconds[base], strict=True)),
            "seconds": own,
            "tokens": counts,
        }
        for name, own in seconds.items()
    ]


def profile_rows(variants: dict[str, Variant], decoders: dict[str, Any], batch: Batch) -> list[dict[str, Any]]:
    """Seconds and share of each group of modules, per variant."""
    rows = []
    for name, run in variants.items():
        seconds = seconds_by_group(decoders[name], lambda run=run: run(batch))
        total = sum(seconds.values())
        rows += [
            {"group": "profile", "variant": name, "part": part, "seconds": own, "share": own / total}
            for part, own in seconds.items()
        ]
    return rows


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=24, help="samples of a batch")
    parser.add_argument("--repeats", type=int, default=3, help="batches, each with new lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--record", default="model_cpu.json", help="JSON file, a bare name goes into bench/results/KIND"
    )
    parser.add_argument("--dtype", default=common.model_dtype())
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args(argv)
    quiet()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, dtype = str(fetch_small_model()), getattr(torch, arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    corpus, generator = corpus_ids(tokenizer), random.Random(arguments.seed)
    batches = [draw_batch(corpus, tokenizer, arguments.texts, generator) for _ in range(arguments.repeats)]
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval().model
    decoders = {
        PACKED: gk.patch(copy.deepcopy(stock)),
        UNFUSED: gk.patch(copy.deepcopy(stock), fuse=False),
        TWO_PASSES: stock,
    }
    forwards = {name: packed_forward(decoders[name]) for name in (PACKED, UNFUSED)}
    forwards[TWO_PASSES] = two_padded_passes(stock)
    rows = measure("forward, 50 % causal", forwards, batches, [sum(map(len, batch.samples)) for batch in batches])
    if arguments.profile:
        rows += profile_rows(forwards, decoders, batches[0])
    encoded = [
        tokenizer([EMBED + text for text in batch.texts], truncation=True, max_length=LONGEST)["input_ids"]
        for batch in batches
    ]
    rows += measure("encode", encode_variants(path, arguments.dtype), batches, [sum(map(len, ids)) for ids in encoded])
    gemm, flops = common.gemm_ceiling("cpu", dtype)
    ceiling = flops / statistics.median(common.interleave({"gemm": gemm}, 5)["gemm"])
    rows.append(
        {
            "group": "ceiling",
            "variant": f"{arguments.dtype} matrix product {common.GEMM_SIZE['cpu']}^3",
            "tflops": ceiling / 1e12,
        }
    )
    speeds = [row for row in rows if "tokens_per_second" in row]
    print(common.table(speeds, ["group", "variant", "tokens_per_second", "time_over_first"]))
    print(common.table([row for row in rows if "part" in row], ["variant", "part", "seconds", "share"]))
    rows = [row | common.named_dtype(arguments.dtype) for row in rows]
    print(f"record: {common.write_records(arguments.record, rows)}")


if __name__ == "__main__":
    main()
