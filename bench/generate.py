"""Decoding: ``python_model.generate.decode`` against transformers' ``generate`` on the same weights, greedy, after filled caches.

    python -m bench.generate --batch 1 16 --context 512 --new 16 --record generate.json

Only decoding is timed: both start from key-value states of ``--context`` tokens and one prompt token. The baseline is the
unpatched model with its default attention and cache.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import grit_kernels as gk
from bench.common import interleave, machine, medians, model_dtype, ratios, table, write_records
from python_model.corpora.small_model import resolve_model
from python_model.generate.decode import decode
from python_model.generate.states import TextStates
from python_model.support.quiet import quiet


def variants(plain: Any, patched: Any, batch: int, context: int, new: int) -> dict[str, Any]:
    """What is timed; both produce the same number of tokens."""
    config = plain.config
    generator = torch.Generator().manual_seed(0)
    shape = (config.num_hidden_layers, 2, config.num_key_value_heads, context, config.head_dim)
    places = torch.arange(context)
    states = [
        TextStates(torch.randn(shape, generator=generator).to(plain.dtype), places, places, True) for _ in range(batch)
    ]
    layers = list(torch.stack([s.keys_values for s in states]).unbind(1))  # each (B, 2, heads, context, dim)
    prompt = torch.full((batch, 1), 5)
    mask = torch.ones(batch, context + 1, dtype=torch.int64)

    def by_transformers() -> Any:
        cache = gk.hf.new_cache((layer[:, 0], layer[:, 1]) for layer in layers)
        return plain.generate(
            prompt,
            attention_mask=mask,
            **gk.hf.cache_keyword(plain, cache),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )

    def by_decode() -> Any:
        return decode(
            patched,
            prompt.tolist(),
            states=states,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_ids=[2],
        )

    return {"transformers": by_transformers, "decode": by_decode}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default=model_dtype())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[512])
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", help="file for the record; a bare name goes into bench/results/KIND")
    arguments = parser.parse_args()
    quiet()
    from transformers import AutoModelForCausalLM

    path, dtype = str(resolve_model(arguments.model)), getattr(torch, arguments.dtype)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    patched = gk.patch(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval())
    rows = []
    for batch in arguments.batch:
        for context in arguments.context:
            runs = variants(plain, patched, batch, context, arguments.new)
            same = torch.equal(runs["transformers"]()[:, 1:], torch.tensor(runs["decode"]()))
            seconds = interleave(runs, repeats=arguments.repeats, warmup=1)
            speed = ratios(seconds, "decode")["transformers"]
            for name, median in medians(seconds).items():
                row = {"batch": batch, "context": context, "new": arguments.new, "dtype": arguments.dtype}
                row |= {"variant": name, "ms_per_token": 1000 * median / arguments.new, "same_tokens": same}
                rows.append({**row, "speedup": speed if name == "decode" else 1.0, "seconds": seconds[name]})
            print(
                table(rows[-2:], ["batch", "context", "variant", "ms_per_token", "speedup", "same_tokens"]), flush=True
            )
    if arguments.record:
        print(write_records(arguments.record, rows))
    else:
        print(machine())


if __name__ == "__main__":
    main()
