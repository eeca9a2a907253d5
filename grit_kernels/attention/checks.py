"""Argument checks of switch attention. Shapes, dtypes and devices always; values only where they lie on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grit_kernels.checks import check_cu_seqlens, check_device, dense_rows, described, is_integer, readable
from grit_kernels.precision import autocast_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 512


def check_qkv(
    q: Tensor, k: Tensor, v: Tensor, ndim: int, names: tuple[str, str, str] = ("q", "k", "v"), pages: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the three tensors against each other; returns them with a contiguous last dimension.

    ``pages``: k and v are (num_blocks, block_size, H, D), and returned as they are.
    """
    for name, x in zip(names, (q, k, v), strict=True):
        layout = "(tokens, H, D)" if ndim == 3 else "(B, T, H, D)"
        if pages and name != names[0]:
            layout = "(num_blocks, block_size, H, D)"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor {layout}, got {type(x).__name__}")
        if x.ndim != ndim:
            raise ValueError(f"{name}: expected {layout}, got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype and autocast_dtype(q.device) is None:
            raise TypeError(f"{name}: expected {q.dtype} as q has, got {x.dtype}")
        check_device(name, x, q.device)
    dim = q.shape[-1]
    if dim % 8 or not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim that is a multiple of 8 in {MIN_HEAD_DIM}..{MAX_HEAD_DIM}, got {dim}")
    if k.shape[-1] != dim or v.shape != k.shape:
        raise ValueError(
            f"{names[1]}, {names[2]}: expected equal shapes with the head dim of q {tuple(q.shape)}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if ndim == 4:
        if q.shape[0] == 0:
            raise ValueError(f"q: expected at least one sample, got shape {tuple(q.shape)}")
        if k.shape[0] != q.shape[0] and not pages:
            raise ValueError(f"{names[1]}: expected batch {q.shape[0]} as q has, got {k.shape[0]}")
    if k.shape[-2] == 0 or q.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q: expected a multiple of {names[1]}'s {k.shape[-2]} heads, got {q.shape[-2]}")
    return (dense_rows(q), k, v) if pages else (dense_rows(q), dense_rows(k), dense_rows(v))


def check_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """Check sinks (H_q) against q (..., H_q, D), and where they may be read that none is NaN or +inf: a share of inf / inf."""
    if sinks is None:
        return None
    heads = q.shape[-2]
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks: expected a tensor ({heads},), one score per head of q, got {type(sinks).__name__}")
    if sinks.shape != (heads,):
        raise ValueError(f"sinks: expected ({heads},), one score per head of q, got shape {tuple(sinks.shape)}")
    if sinks.dtype not in (torch.float32, q.dtype):
        raise TypeError(f"sinks: expected float32 or the {q.dtype} of q, got {sinks.dtype}")
    check_device("sinks", sinks, q.device)
    if readable(sinks) and not bool((sinks < float("inf")).all()):  # a NaN is not smaller either
        head = int((~(sinks < float("inf"))).nonzero()[0])
        raise ValueError(f"sinks: expected finite numbers, or -inf for none, got {float(sinks[head])} for head {head}")
    return sinks


def causal_flags(causal: bool | Tensor, batch: int, device: torch.device) -> Tensor:
    """``causal`` as a bool tensor (B) on ``device``."""
    if isinstance(causal, bool):
        return torch.full((batch,), causal, dtype=torch.bool, device=device)
    if not isinstance(causal, Tensor):
        raise TypeError(f"causal: expected a bool or a bool tensor ({batch},), got {type(causal).__name__}")
    if causal.dtype != torch.bool or causal.shape != (batch,):
        raise ValueError(f"causal: expected torch.bool ({batch},), got {described(causal)}")
    return causal.to(device)


def window_argument(window_size: tuple[int, int] | Tensor, batch: int) -> tuple[int, int] | Tensor:
    """Check ``window_size``: a pair of ints >= -1 or an integer tensor (B, 2)."""
    if isinstance(window_size, Tensor):
        if not is_integer(window_size, batch, 2):
            raise ValueError(
                f"window_size: expected a pair of ints or an int32 tensor ({batch}, 2), got {described(window_size)}"
            )
        if readable(window_size) and bool((window_size < -1).any()):
            raise ValueError(f"window_size: expected entries >= -1, got {window_size.tolist()}")
        return window_size
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(
            f"window_size: expected a pair (left, right) or an int tensor ({batch}, 2), got {window_size!r}"
        )
    left, right = window_size
    for side, value in (("left", left), ("right", right)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"window_size: expected an int, got {side} {value!r}")
        if value < -1:
            raise ValueError(f"window_size: expected -1 (unlimited) or a distance >= 0, got {side} {value}")
    return left, right


def upper_bounds(
    hi: Tensor | None, shape: tuple[int, ...], device: torch.device, q_len: Tensor, q_start: Tensor | None = None
) -> Tensor | None:
    """Check ``hi`` and flatten it to int32 (rows). ``q_start``: first row of each sample, None for ``shape`` (B, T).

    Kernels bisect it, so it must not decrease within a sample; this is checked where it lies on the CPU.
    """
    if hi is None:
        return None
    if not is_integer(hi, *shape):
        raise ValueError(f"hi: expected int32 {shape}, got {described(hi)}")
    check_device("hi", hi, device)
    flat = hi.reshape(-1).to(torch.int32).contiguous()
    if readable(flat) and flat.numel():
        if q_start is None:
            q_start = torch.arange(shape[0], device=flat.device) * shape[1]
        # rows that see less than the row before; most of them are first rows
        lower = (flat[1:] < flat[:-1]).nonzero()[:, 0] + 1
        sample = torch.searchsorted(q_start, lower.to(q_start.dtype), right=True) - 1
        row = lower - q_start[sample]
        inside = (row > 0) & (row < q_len[sample])
        if bool(inside.any()):
            first = int(inside.nonzero()[0])
            raise ValueError(
                f"hi: expected values that never decrease within a sample, "
                f"got a lower one at row {int(row[first])} of sample {int(sample[first])}"
            )
    return flat


def length_tensor(
    name: str, lengths: Tensor | None, batch: int, limit: int, device: torch.device, default: int | None = None
) -> Tensor:
    """``lengths`` as contiguous int32 (B) on ``device``; values within 0..limit are checked where they lie on the CPU."""
    if lengths is None:
        return torch.full((batch,), limit if default is None else default, dtype=torch.int32, device=device)
    if not is_integer(lengths, batch):
        raise ValueError(f"{name}: expected int32 ({batch},), got {described(lengths)}")
    if readable(lengths) and bool(((lengths < 0) | (lengths > limit)).any()):
        raise ValueError(f"{name}: expected values in 0..{limit}, got {lengths.tolist()}")
    return lengths.to(device=device, dtype=torch.int32).contiguous()


def _check_longest(name: str, max_seqlen: int) -> None:
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(max_seqlen).__name__}")


def check_lengths(
    name: str, cu_seqlens: Tensor, tokens: int, max_name: str, max_seqlen: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Check a ``cu_seqlens`` (int32 (B + 1)); returns starts and lengths, int32 (B)."""
    longest = check_cu_seqlens(name, cu_seqlens, tokens)
    _check_longest(max_name, max_seqlen)
    if longest is not None and longest > max_seqlen:
        raise ValueError(f"{max_name}: expected at least {longest}, the length of the longest sample, got {max_seqlen}")
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    lengths = lengths.to(device=device, dtype=torch.int32)
    return cu_seqlens[:-1].to(device=device, dtype=torch.int32).contiguous(), lengths


def check_ranges(
    cu_seqlens_k: Tensor | None,
    k_starts: Tensor | None,
    seqlens_k: Tensor | None,
    batch: int,
    rows: int,
    max_seqlen_k: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Check key ranges that lie anywhere in k's ``rows``; returns starts and lengths, int32 (B)."""
    if k_starts is None or seqlens_k is None:
        raise ValueError("k_starts, seqlens_k: expected both or none of them, got one")
    if cu_seqlens_k is not None:
        raise ValueError(f"cu_seqlens_k: expected None beside k_starts and seqlens_k, got {described(cu_seqlens_k)}")
    _check_longest("max_seqlen_k", max_seqlen_k)
    starts = length_tensor("k_starts", k_starts, batch, rows, device)
    lengths = length_tensor("seqlens_k", seqlens_k, batch, rows, device)
    if readable(k_starts) and readable(seqlens_k):
        for b, (start, length) in enumerate(zip(k_starts.tolist(), seqlens_k.tolist(), strict=True)):
            if start + length > rows:
                raise ValueError(
                    f"k_starts, seqlens_k: expected ranges within k's {rows} rows, "
                    f"got [{start}, {start + length}) for sample {b}"
                )
            if length > max_seqlen_k:
                raise ValueError(f"max_seqlen_k: expected at least the longest sample's {length}, got {max_seqlen_k}")
    return starts, lengths


def check_writable(k_cache: Tensor, v_cache: Tensor) -> None:
    """ValueError if several elements of a cache lie in one place, as after expand(): new states would replace each other."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{name}: expected memory of its own for each element, to write new states, got an expanded tensor"
            )
    if k_cache is v_cache:
        raise ValueError("v_cache: expected another tensor than k_cache, to write new states, got the same")


def refuse_gradients(argument: str, **tensors: Tensor | None) -> None:
    """ValueError where a call that is not differentiable (because of ``argument``) would lose a gradient."""
    for name, x in tensors.items():
        if x is not None and torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without gradients beside {argument}, which is not differentiable, "
                "got requires_grad=True; call it under torch.no_grad()"
            )


def check_softmax_options(softmax_scale: float | None, softcap: float, dim: int) -> tuple[float, float]:
    """``softmax_scale`` (default ``dim ** -0.5``) and ``softcap`` as floats."""
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    # comparisons, not math.isfinite: a compiled graph may have a symbol for the number, and isfinite would break it
    if not -math.inf < scale < math.inf:
        raise ValueError(f"softmax_scale: expected a finite number, got {softmax_scale}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number >= 0 (0 switches it off), got {softcap}")
    return scale, float(softcap)
