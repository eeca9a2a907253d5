"""What the random calls of fuzz.py are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Results = list[Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_ROUNDING = torch.finfo(torch.float32).eps / 2
FEW_ROUNDINGS = 8 * torch.finfo(torch.float32).eps


@dataclass
class Call:
    """``kernel`` takes the inputs as they are stored; ``definition`` computes in the dtype it is given, in plain torch.

    ``fixed_norms``: the definition with norms that no gradient goes through, where it has norms.
    """

    inputs: list[Tensor]
    kernel: Callable[..., Results]
    definition: Callable[..., Results]
    # (inputs, definition's results, their gradients) in float64 -> per input, what the rounding of an intermediate may change
    rounding: Callable[[list[Tensor], Results, Results], list[Tensor | float]] | None = None
    fixed_norms: Callable[..., Results] | None = None
    # the definition with a few FP32 roundings of what it has between its steps, where the inputs' say nothing of them
    jittered: Callable[..., Results] | None = None
    # absolute, of every result
    result_rounding: float = 0.0
    differentiable: bool = True


def magnitudes(x: Tensor, rng: random.Random, dtype: torch.dtype, most: float) -> Tensor:
    """``x`` as it is, or with rows of mixed sizes, or huge, or tiny; 10 ** most at most (float16: 100)."""
    most = min(most, 2) if dtype == torch.float16 else most
    kind = rng.choice(["plain", "plain", "mixed", "huge", "tiny"])
    if kind == "mixed":
        x = x * 10 ** (torch.rand(*x.shape[:-1], 1) * 2 * most - most).clamp(max=most)
    elif kind == "huge":
        x = x * 10 ** rng.uniform(0, most)
    elif kind == "tiny":
        x = x * 10 ** -rng.uniform(0, 4 if dtype == torch.float16 else 15)
    return x.to(dtype)


def stored(x: Tensor, rng: random.Random) -> Tensor:
    """``x`` in memory of random strides, NaN wherever it is not."""
    steps = [rng.choice([1, 1, 1, 2, 3]) for _ in x.shape]
    extra = [rng.choice([0, 0, 1, 8]) for _ in x.shape]
    order = list(range(x.ndim))
    if rng.random() < 0.3:
        rng.shuffle(order)
    sizes = [x.shape[d] * steps[d] + extra[d] for d in order]
    memory = torch.full(sizes, float("nan"), dtype=x.dtype)
    view = memory.permute([order.index(d) for d in range(x.ndim)])
    view = view[tuple(slice(0, n * s, s) for n, s in zip(x.shape, steps, strict=True))]
    view.copy_(x)
    return view


def unit_rows(x: Tensor, fixed: bool) -> Tensor:
    length = x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return x / (length.detach() if fixed else length)
