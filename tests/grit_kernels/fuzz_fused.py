"""Random calls of the fused ops for fuzz.py."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from tests.grit_kernels.fuzz_call import DTYPES, Call, Results, magnitudes


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _some_shape(rng: random.Random, columns: int) -> tuple[int, ...]:
    return (*(rng.choice([1, 2, 5, 9]) for _ in range(rng.randint(0, 2))), columns)


def rms_norm_call(rng: random.Random) -> Call:
    dtype, columns = rng.choice(DTYPES), rng.choice([1, 7, 16, 33, 64, 96, 257])
    shape, eps, offset = _some_shape(rng, columns), rng.choice([1e-6, 1e-5, 0.1]), rng.choice([0.0, 0.0, 1.0])
    added = rng.choice([None, dtype, torch.float32])
    total_dtype = dtype if added is None else torch.promote_types(dtype, added)
    result = rng.choice([None, None, torch.float32, *([dtype] if total_dtype == torch.float32 else [])])
    weight_dtype = rng.choice([dtype, torch.float32])
    inputs = [magnitudes(torch.randn(shape), rng, dtype, 6), torch.randn(columns).to(weight_dtype)]
    if added is not None:
        inputs.append(magnitudes(torch.randn(shape), rng, dtype, 6).to(added))

    def definition(x: Tensor, weight: Tensor, residual: Tensor | None = None, fixed: bool = False) -> Results:
        total = x if residual is None else x + residual
        wide = _wide(total)
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        out = wide * (inverse.detach() if fixed else inverse) * (weight.to(wide.dtype) + offset)
        if x.dtype != torch.float64:
            out = out.to(total.dtype if result is None else result)
        return [out] if residual is None else [out, total]

    def kernel(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Results:
        if residual is None:
            return [gk.rms_norm(x, weight, eps, offset=offset, dtype=result)]
        return list(gk.rms_norm(x, weight, eps, residual=residual, offset=offset, dtype=result))

    return Call(inputs, kernel, definition, None, functools.partial(definition, fixed=True))


def rotary_call(rng: random.Random) -> Call:
    dtype, batch, length = rng.choice(DTYPES), rng.randint(1, 3), rng.choice([1, 2, 7, 20])
    heads_kv, group, dim = rng.randint(1, 3), rng.randint(1, 3), rng.choice([2, 8, 32, 34, 64, 80, 128])
    rotated = rng.choice([dim, dim, 2 * rng.randint(1, dim // 2)])
    q, k = (magnitudes(torch.randn(batch, length, heads, dim), rng, dtype, 6) for heads in (heads_kv * group, heads_kv))
    angle = torch.rand(rng.choice([1, batch]), length, rotated) * 7
    table_dtype = rng.choice([dtype, torch.float32])
    scaling = rng.choice([1.0, 1.0, 1.2])  # yarn and longrope scale both tables
    cos, sin = ((x * scaling).to(table_dtype) for x in (angle.cos(), angle.sin()))

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = _wide(x)[..., :rotated].chunk(2, dim=-1)
        cos, sin = (_wide(table).detach()[:, :, None] for table in (cos, sin))
        swapped = torch.cat([-second, first], dim=-1)
        moved = torch.cat([first, second], dim=-1) * cos + swapped * sin
        return torch.cat([moved, _wide(x)[..., rotated:]], dim=-1).to(x.dtype)

    def definition(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
        return [turned(q, cos, sin), turned(k, cos, sin)]

    def kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
        return list(gk.rotary(q, k, cos.detach(), sin.detach()))

    return Call([q, k, cos, sin], kernel, definition)


def _gated_call(
    op: Callable[[Tensor, Tensor], Tensor], activation: Callable[[Tensor], Tensor], rng: random.Random
) -> Call:
    dtype, columns = rng.choice(DTYPES), rng.choice([1, 7, 16, 33, 96, 257])
    shape = _some_shape(rng, columns)
    gate, up = (magnitudes(torch.randn(shape) * 3, rng, dtype, most) for most in (6, 6))

    def definition(gate: Tensor, up: Tensor) -> Results:
        return [(activation(_wide(gate)) * up).to(gate.dtype)]

    return Call([gate, up], lambda gate, up: [op(gate, up)], definition)


def silu_call(rng: random.Random) -> Call:
    return _gated_call(gk.silu_mul, F.silu, rng)


def gelu_call(rng: random.Random) -> Call:
    return _gated_call(gk.gelu_tanh_mul, functools.partial(F.gelu, approximate="tanh"), rng)
