"""End-to-end forward of the 135M model on mixed-length batches: one packed pass against what people run today.

    python -m bench.model [--texts 32] [--repeats 7] [--record NAME.json]

Lengths are log-uniform in 8..512 tokens, half of the samples causal (chats), half bidirectional (texts to embed), random token
ids. Variants, interleaved in one run, in bfloat16:

* ``packed``: the patched model, all samples in one pass
* ``sdpa, two padded passes``: unpatched transformers, causal rows and bidirectional rows apart, each padded to its longest
* ``encode``: python_model.GritLM.encode on texts, against the class of the package gritlm 1.0.2 where it is importable
  (``pip install --no-deps gritlm==1.0.2``)
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

import grit_kernels as gk
from bench import common
from python_model import GritLM
from python_model.prompts import EMBED
from python_model.small_model import fetch_small_model

SHORTEST, LONGEST = 8, 512


def log_uniform_lengths(count: int, generator: random.Random) -> list[int]:
    """``count`` lengths, log-uniform in SHORTEST..LONGEST."""
    low, high = math.log(SHORTEST), math.log(LONGEST)
    return [round(math.exp(generator.uniform(low, high))) for _ in range(count)]


def padded(samples: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and attention mask."""
    ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in samples], batch_first=True)
    return ids, mask


def forward_variants(model: Any, samples: list[torch.Tensor], causal: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The packed pass and the two padded passes over the same samples."""
    stock = copy.deepcopy(model).eval()
    patched = gk.patch(model).eval()
    everything = padded(samples)
    chats = padded([s for s, c in zip(samples, causal, strict=True) if c])
    texts = padded([s for s, c in zip(samples, causal, strict=True) if not c])

    def packed() -> Any:
        return patched.model(everything[0], attention_mask=everything[1], is_causal=causal, use_cache=False)

    def two_passes() -> Any:
        stock.model(chats[0], attention_mask=chats[1], use_cache=False)
        return stock.model(texts[0], attention_mask=texts[1], is_causal=False, use_cache=False)

    return {"packed": packed, "sdpa, two padded passes": two_passes}


def encode_variants(path: str, texts: list[str]) -> dict[str, Callable[[], Any]]:
    """GritLM.encode of this package, and of gritlm 1.0.2 where it is installed."""
    mine = GritLM(path, device="cpu", dtype="bfloat16")
    variants: dict[str, Callable[[], Any]] = {
        "encode": lambda: mine.encode(texts, instruction=EMBED, max_length=LONGEST)
    }
    if importlib.util.find_spec("gritlm") is not None:
        from gritlm import GritLM as Reference

        theirs = Reference(path, torch_dtype=torch.bfloat16, attn="bbcc", device="cpu")
        variants["encode, gritlm 1.0.2"] = lambda: theirs.encode(
            texts, instruction=EMBED, max_length=LONGEST, batch_size=len(texts)
        )
    return variants


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", default="model_cpu.json", help="file in bench/results")
    arguments = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(fetch_small_model())
    generator = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    lengths = log_uniform_lengths(arguments.texts, generator)
    samples = [torch.randint(3, 49152, (n,)) for n in lengths]
    causal = torch.arange(arguments.texts) % 2 == 0
    tokens = sum(lengths)
    rows = []
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(path)
    groups = {
        "forward, 50 % causal": lambda: forward_variants(model, samples, causal),
        "encode": lambda: encode_variants(path, [str(tokenizer.decode(s)) for s in samples]),
    }
    for group, make in groups.items():
        variants = make()
        seconds = common.interleave(variants, arguments.repeats)
        base = next(iter(variants))
        speedups = common.ratios(seconds, base)
        for name, median in common.medians(seconds).items():
            rows.append(
                {
                    "group": group,
                    "variant": name,
                    "tokens_per_second": tokens / median,
                    "time_over_first": speedups[name],
                    "seconds": median,
                    "all_seconds": seconds[name],
                    "tokens": tokens,
                    "lengths": lengths,
                }
            )
    print(common.table(rows, ["group", "variant", "tokens_per_second", "time_over_first", "seconds"]))
    print(f"record: {common.write_records(arguments.record, rows)}")


if __name__ == "__main__":
    main()
