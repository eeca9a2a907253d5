"""Random calls for fuzz.py of the attention that serving needs: a cache that grows, and key ranges anywhere in one memory.

Neither has a gradient. Every slot that no sample owns holds NaN, before the call and after it.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import grit_kernels as gk
from tests.grit_kernels.attention.paged import in_pages, in_rows
from tests.grit_kernels.fuzz_call import DTYPES, Call, Results, magnitudes


class _Samples:
    """What the queries of a batch see; drawn at random."""

    def __init__(self, rng: random.Random, lens_q: list[int], lens_k: list[int]) -> None:
        self.lens_q, self.lens_k, batch = lens_q, lens_k, len(lens_q)
        self.heads_kv, self.group = rng.randint(1, 2), rng.randint(1, 4)
        self.dim = rng.choice([32, 40, 64, 72, 96, 128])
        self.causal = [rng.random() < 0.5 for _ in range(batch)]
        self.window = [(rng.choice([-1, -1, 0, 9]), rng.choice([-1, -1, 0, 9])) for _ in range(batch)]
        self.scale, self.softcap = rng.choice([None, None, 0.3, -0.2]), rng.choice([0.0, 0.0, 20.0])
        self.hi: list[list[int]] | None = None
        if rng.random() < 0.3:
            self.hi = [sorted(rng.randint(0, m) for _ in range(n)) for n, m in zip(lens_q, lens_k, strict=True)]
        self.sinks: Tensor | None = None
        if rng.random() < 0.4:
            self.sinks = torch.randn(self.heads_kv * self.group) * rng.choice([1, 5, 50])

    def options(self) -> dict[str, Any]:
        window = torch.tensor(self.window, dtype=torch.int32)
        softmax = {"softmax_scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        return {"window_size": window, **softmax, "return_lse": True}

    def visible(self, sample: int) -> Tensor:
        """bool (queries, keys): the queries are the last of the keys."""
        n, m, (left, right) = self.lens_q[sample], self.lens_k[sample], self.window[sample]
        row, column = torch.arange(n)[:, None] + m - n, torch.arange(m)[None]
        seen = torch.ones(n, m, dtype=torch.bool) if left < 0 else column >= row - left
        if self.hi is not None:
            return seen & (column < torch.tensor(self.hi[sample], dtype=torch.int64)[:, None])
        right = 0 if self.causal[sample] else right
        return seen & (column <= row + right) if right >= 0 else seen

    def attention(self, sample: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q (n, heads, dim), k and v (m, heads_kv, dim) -> the output and the log-sum-exp (n, heads)."""
        scale = self.dim**-0.5 if self.scale is None else self.scale
        score = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(self.group, 1)) * scale
        if self.softcap:
            score = self.softcap * torch.tanh(score / self.softcap)
        mask = self.visible(sample)
        score = score.masked_fill(~mask, float("-inf"))
        empty = ~mask.any(dim=1)[None, :, None]
        if self.sinks is not None:
            of_rows = self.sinks.to(score.dtype)[:, None, None].masked_fill(empty, float("-inf"))
            score = torch.cat([score, of_rows], dim=-1)
        p = torch.where(empty, 0.0, score.masked_fill(empty, 0.0).softmax(dim=-1))[..., : len(k)]
        wide = score if score.dtype == torch.float64 else score.float()
        return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(self.group, 1)), wide.logsumexp(dim=-1).T


def _judged(out: Tensor, lse: Tensor) -> Results:
    """Rows that see nothing have lse -inf, which is compared as a flag."""
    nothing = lse == float("-inf")
    return [out, lse.masked_fill(nothing, 0.0), nothing.to(lse.dtype)]


def kvcache_call(rng: random.Random) -> Call:
    dtype, batch, append = rng.choice(DTYPES), rng.randint(1, 4), rng.random() < 0.6
    most_q = rng.choice([1, 1, 1, 3, 20])
    lens_q = [rng.choice([most_q, rng.randint(0, most_q)]) for _ in range(batch)]
    before = [rng.choice([0, 1, 5, 17, 40, 130]) for _ in range(batch)]
    leftpad = [rng.choice([0, 0, 3]) for _ in range(batch)]
    lens_k = [n + (m if append else 0) for n, m in zip(before, lens_q, strict=True)]
    slots = max(pad + n for pad, n in zip(leftpad, lens_k, strict=True)) + rng.choice([0, 0, 5])
    slots = max(slots, 1)
    s = _Samples(rng, lens_q, lens_k)

    def draw(count: int, heads: int, most: float) -> Tensor:
        return magnitudes(torch.randn(batch, count, heads, s.dim), rng, dtype, most)

    q, keys, values = draw(most_q, s.heads_kv * s.group, 6), draw(slots, s.heads_kv, 6), draw(slots, s.heads_kv, 4)
    inputs = [q, keys, values]
    if append:
        inputs += [draw(most_q, s.heads_kv, 6), draw(most_q, s.heads_kv, 4)]
    slot, row = torch.arange(slots)[None], torch.arange(most_q)[None]
    first = torch.tensor(leftpad)[:, None]
    old = (slot >= first) & (slot < first + torch.tensor(before)[:, None])
    real = row < torch.tensor(lens_q)[:, None]
    block_size = rng.choice([0, 0, 1, 7, 16, 64])  # 0: not in pages

    def definition(q: Tensor, keys: Tensor, values: Tensor, *new: Tensor) -> Results:
        caches = [x.masked_fill(~old[:, :, None, None], 0.0) for x in (keys, values)]
        for cache, states in zip(caches, new, strict=False):
            for b, (pad, n, m) in enumerate(zip(leftpad, before, lens_q, strict=True)):
                cache[b, pad + n : pad + n + m] = states[b, :m]
        out = q.new_zeros(q.shape)
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=q.dtype if q.dtype == torch.float64 else torch.float32)
        for b, (pad, n, m) in enumerate(zip(leftpad, lens_q, lens_k, strict=True)):
            mine = (cache[b, pad : pad + m] for cache in caches)
            out[b, :n], lse[b, :n] = s.attention(b, q[b, :n], *mine)
        return [*_judged(out, lse), *caches]

    def kernel(q: Tensor, keys: Tensor, values: Tensor, *new: Tensor) -> Results:
        for x, owned in ((q, real), (keys, old), (values, old), *((x, real) for x in new)):
            x.masked_fill_(~owned[:, :, None, None], float("nan"))
        hi = None
        if s.hi is not None:
            hi = torch.zeros(batch, most_q, dtype=torch.int32)
            for b, bounds in enumerate(s.hi):
                hi[b, : len(bounds)] = torch.tensor(bounds)
        caches, table = [keys, values], None
        if block_size:
            caches, table = in_pages(caches, leftpad, [a + b for a, b in zip(leftpad, lens_k, strict=True)], block_size)
        found = gk.switch_attention_with_kvcache(
            q,
            *caches,
            torch.tensor(before) + torch.tensor(leftpad),
            torch.tensor(s.causal),
            **dict(zip("kv", new, strict=False)),
            cache_leftpad=torch.tensor(leftpad),
            block_table=table,
            hi=hi,
            seqlens_q=torch.tensor(lens_q),
            **s.options(),
        )
        if table is not None:
            keys, values = (in_rows(pages, table, slots) for pages in caches)
        for b, (pad, m) in enumerate(zip(leftpad, lens_k, strict=True)):
            for cache in (keys, values):  # what was not the sample's before is not now
                assert bool(torch.cat([cache[b, :pad], cache[b, pad + m :]]).isnan().all()), (
                    "a slot of nobody was written"
                )
        return [*_judged(*found), keys.nan_to_num(0.0), values.nan_to_num(0.0)]

    return Call(inputs, kernel, definition, differentiable=False)


def key_ranges_call(rng: random.Random) -> Call:
    dtype, batch, memory = rng.choice(DTYPES), rng.randint(1, 5), rng.choice([40, 200])
    lens_k = [rng.choice([0, 1, 5, 17, 40, memory]) for _ in range(batch)]
    starts = [rng.choice([0, rng.randint(0, memory - n)]) for n in lens_k]
    lens_q = [rng.choice([1, 1, n, rng.randint(0, 33)]) for n in lens_k]
    s = _Samples(rng, lens_q, lens_k)
    q = magnitudes(torch.randn(sum(lens_q), s.heads_kv * s.group, s.dim), rng, dtype, 6)
    keys, values = (magnitudes(torch.randn(memory, s.heads_kv, s.dim), rng, dtype, most) for most in (6, 4))
    owned = torch.zeros(memory, dtype=torch.bool)
    for start, n in zip(starts, lens_k, strict=True):
        owned[start : start + n] = True

    def definition(q: Tensor, keys: Tensor, values: Tensor) -> Results:
        parts = [
            s.attention(b, rows, keys[start : start + n], values[start : start + n])
            for b, (rows, start, n) in enumerate(zip(q.split(lens_q), starts, lens_k, strict=True))
        ]
        return _judged(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def kernel(q: Tensor, keys: Tensor, values: Tensor) -> Results:
        for x in (keys, values):
            x.masked_fill_(~owned[:, None, None], float("nan"))
        found = gk.switch_attention_varlen(
            q,
            keys,
            values,
            torch.tensor(s.causal),
            torch.tensor([0, *lens_q]).cumsum(0).int(),
            None,
            max([*lens_q, 1]),
            max([*lens_k, 1]),
            hi=None if s.hi is None else torch.tensor(sum(s.hi, []), dtype=torch.int32),
            k_starts=torch.tensor(starts),
            seqlens_k=torch.tensor(lens_k),
            **s.options(),
        )
        return _judged(*found)

    return Call([q, keys, values], kernel, definition, differentiable=False)
