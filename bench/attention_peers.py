"""The problems of the attention benchmark, and who solves them: this package and its peers, as functions.

A peer is a function ``build(problem) -> run | None``: None where it does not support the problem, else a function of no
arguments that returns the output as (tokens, H_q, D). What a peer can prepare once per batch (index lists, masks) is prepared
in ``build``; what it must do to every layer's q, k and v (gather, pad, scatter) happens in ``run``.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import grit_kernels as gk
from grit_kernels.visibility import key_range

Run = Callable[[], Tensor]
DIFFERS = "differs"
"""How the reason begins for a peer that has no time because it computes something else."""
LARGEST_ERROR = 0.02
"""Largest error of a peer's result, as a norm relative to that of this package's result."""
NO_KERNEL = ("No available kernel", "No viable backend")
"""How SDPA reports that the one kernel it may use does not support the problem."""


@dataclass(frozen=True)
class Regime:
    """What is computed: samples by length and mode, heads, window (inclusive distances, -1 is unlimited)."""

    name: str
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    causal: tuple[bool, ...]
    heads: int
    heads_kv: int
    dim: int
    window: tuple[int, int] = (-1, -1)
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False

    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        total = 0
        for len_q, len_k, causal in zip(self.q_lens, self.k_lens, self.causal, strict=True):
            left, right = (len_k if w < 0 else w for w in self.window)
            position = torch.arange(len_q) + (len_k - len_q)
            lo, hi = key_range(position, len_k, left, 0 if causal else right)
            total += int((hi - lo).clamp(min=0).sum())
        return total

    def flops(self) -> float:
        """4 D per visible pair and query head; the backward pass counts 2.5 times that."""
        return 4.0 * self.dim * self.heads * self.pairs() * (2.5 if self.backward else 1.0)

    def kv_bytes(self) -> float:
        return 2.0 * sum(self.k_lens) * self.heads_kv * self.dim * self.dtype.itemsize

    @property
    def mode(self) -> str:
        return "causal" if all(self.causal) else "mixed" if any(self.causal) else "bidirectional"


def unwindowed(regime: Regime) -> Regime:
    """The regime without its window."""
    return replace(regime, window=(-1, -1))


@dataclass
class Problem:
    """A regime with random data on a device: q, k, v are packs."""

    regime: Regime
    device: str
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    prepare_seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Why a peer has no time: the error that it raised, or how far its result is from that of this package."""

    def __post_init__(self) -> None:
        r = self.regime

        def data(rows: int, heads: int) -> Tensor:
            x = torch.randn(rows, heads, r.dim, device=self.device, dtype=r.dtype)
            return x.requires_grad_(r.backward)

        self.q = data(sum(r.q_lens), r.heads)
        self.k, self.v = data(sum(r.k_lens), r.heads_kv), data(sum(r.k_lens), r.heads_kv)
        self.flags = torch.tensor(r.causal, device=self.device)
        self.cu_q, self.cu_k = self.table(r.q_lens), self.table(r.k_lens)

    def table(self, lens: tuple[int, ...] | list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=self.device)

    def groups(self) -> list[tuple[bool, list[int]]]:
        """The samples divided by mode: what a kernel with one flag per call must launch."""
        flags = self.regime.causal
        both = [(mode, [b for b, c in enumerate(flags) if c == mode]) for mode in (True, False)]
        return [(mode, samples) for mode, samples in both if samples]

    def rows(self, lens: tuple[int, ...], samples: list[int]) -> Tensor:
        """Rows of ``samples`` in the whole pack."""
        bounds = [0, *itertools.accumulate(lens)]
        return torch.cat([torch.arange(bounds[b], bounds[b + 1], device=self.device) for b in samples])


def grit(p: Problem, deterministic: bool = True) -> Run:
    r = p.regime
    given = (p.q, p.k, p.v, p.flags, p.cu_q, p.cu_k, max(r.q_lens), max(r.k_lens))
    return lambda: gk.switch_attention_varlen(*given, window_size=r.window, deterministic=deterministic)


def grit_atomics(p: Problem) -> Run | None:
    """This package with one kernel for the backward pass, which adds up the gradient of q by atomics."""
    return grit(p, deterministic=False) if p.regime.backward and p.q.device.type != "cpu" else None


def grit_split(p: Problem) -> Run | None:
    """This package with one flag per call: two launches, gather and scatter."""
    if p.regime.mode != "mixed":
        return None

    def launch(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int]
    ) -> Tensor:
        return gk.switch_attention_varlen(q, k, v, causal, cu_q, cu_k, *longest, window_size=p.regime.window)

    return _per_group(p, launch)


def _per_group(p: Problem, launch: Callable[..., Tensor]) -> Run:
    """``launch`` for the causal and for the bidirectional samples, on packs gathered from the batch and scattered back."""
    r = p.regime
    prepared = []
    for causal, samples in p.groups():
        q_lens, k_lens = [r.q_lens[b] for b in samples], [r.k_lens[b] for b in samples]
        tables = (causal, p.table(q_lens), p.table(k_lens), (max(q_lens), max(k_lens)))
        prepared.append((p.rows(r.q_lens, samples), p.rows(r.k_lens, samples), tables))
    if len(prepared) == 1:
        return lambda: launch(p.q, p.k, p.v, *prepared[0][2])

    def run() -> Tensor:
        out = torch.empty_like(p.q)
        for rows_q, rows_k, tables in prepared:
            q, k, v = p.q.index_select(0, rows_q), p.k.index_select(0, rows_k), p.v.index_select(0, rows_k)
            out = out.index_copy(0, rows_q, launch(q, k, v, *tables))
        return out

    return run


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """(B, T, H, D) in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def _on_backend(run: Run, backend: SDPBackend | None) -> Run | None:
    """``run`` with one of SDPA's kernels (None: SDPA's choice); None where this torch has no such kernel for the problem."""
    if backend is None:
        return run

    def run_on_backend() -> Tensor:
        with sdpa_kernel(backend):
            return run()

    try:
        run_on_backend()
    except RuntimeError as error:
        if not any(text in str(error) for text in NO_KERNEL):
            raise
        return None
    return run_on_backend


def sdpa_loop(p: Problem, backend: SDPBackend | None = None) -> Run | None:
    """One call per sample; bottom-right causal needs square samples or one query."""
    r = p.regime
    if r.window != (-1, -1) or any(c and q not in (1, k) for q, k, c in zip(r.q_lens, r.k_lens, r.causal, strict=True)):
        return None
    spans = list(zip(p.cu_q.tolist(), r.q_lens, p.cu_k.tolist(), r.k_lens, r.causal, strict=False))

    def run() -> Tensor:
        outs = []
        for first_q, len_q, first_k, len_k, causal in spans:
            q, k, v = p.q[None, first_q : first_q + len_q], *(x[None, first_k : first_k + len_k] for x in (p.k, p.v))
            outs.append(_sdpa(q, k, v, causal and len_q == len_k)[0])
        return torch.cat(outs)

    return _on_backend(run, backend)


def _padded(p: Problem, samples: list[int], cu: Tensor, lens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Index (B, T) of the rows of ``samples``, right-padded with row 0, and which entries are real."""
    longest = max(lens[b] for b in samples)
    step = torch.arange(longest, device=p.device)
    real = step < torch.tensor([lens[b] for b in samples], device=p.device)[:, None]
    return torch.where(real, cu[torch.tensor(samples, device=p.device)][:, None] + step, 0), real


def sdpa_masked(p: Problem) -> Run | None:
    """All samples in one call, padded, with a bool mask (B, 1, T_q, T_k)."""
    r = p.regime
    samples = list(range(len(r.q_lens)))
    if len(samples) * max(r.q_lens) * max(r.k_lens) * r.heads > 2**34:
        return None
    index_q, real_q = _padded(p, samples, p.cu_q, r.q_lens)
    index_k, _ = _padded(p, samples, p.cu_k, r.k_lens)
    lens_q, lens_k = (torch.tensor(x, device=p.device)[:, None, None] for x in (r.q_lens, r.k_lens))
    position = torch.arange(max(r.q_lens), device=p.device)[None, :, None] + lens_k - lens_q
    key = torch.arange(max(r.k_lens), device=p.device)
    far = max(r.k_lens) + max(r.q_lens)
    left, right = (far if w < 0 else w for w in r.window)
    right_b = torch.where(p.flags[:, None, None], 0, right)
    mask = ((key >= position - left) & (key <= position + right_b) & (key < lens_k))[:, None]

    def run() -> Tensor:
        return _sdpa(p.q[index_q], p.k[index_k], p.v[index_k], mask=mask)[real_q]

    return run


def sdpa_split(p: Problem, backend: SDPBackend | None = None) -> Run | None:
    """One launch for the causal and one for the bidirectional samples, each padded to its longest and scattered back.

    Padding at the end needs no mask in a causal batch; a bidirectional one of several lengths needs a key mask.
    """
    r = p.regime
    if r.window != (-1, -1) or (r.q_lens != r.k_lens and (max(r.q_lens) > 1 or len(set(r.k_lens)) > 1)):
        return None
    decode = r.q_lens != r.k_lens
    prepared = []
    for causal, samples in p.groups():
        index_q, real = _padded(p, samples, p.cu_q, r.q_lens)
        index_k, real_k = _padded(p, samples, p.cu_k, r.k_lens)
        mask = None if causal or bool(real_k.all()) else real_k[:, None, None, :]
        if mask is not None and backend is not None:
            return None  # the flash and cuDNN kernels take no mask here
        prepared.append((index_q, index_k, real, causal and not decode, mask))
    whole = len(prepared) == 1 and bool(prepared[0][2].all())

    def run() -> Tensor:
        if whole:
            index_q, index_k, _, causal, _ = prepared[0]
            q, k, v = (
                p.q.view(*index_q.shape, *p.q.shape[1:]),
                *(x.view(*index_k.shape, *x.shape[1:]) for x in (p.k, p.v)),
            )
            return _sdpa(q, k, v, causal).flatten(0, 1)
        out = torch.empty_like(p.q)
        for index_q, index_k, real, causal, mask in prepared:
            part = _sdpa(p.q[index_q], p.k[index_k], p.v[index_k], causal, mask)
            out = out.index_copy(0, index_q[real], part[real])
        return out

    return _on_backend(run, backend)


def torch_varlen(p: Problem) -> Run | None:
    """torch.nn.attention.varlen; its arguments changed between versions."""
    if p.device != "cuda" or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    windowed = "window_size" in names
    if not windowed and p.regime.window != (-1, -1):
        return None
    repeat = 1 if "enable_gqa" in names else p.regime.heads // p.regime.heads_kv

    def launch(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int]
    ) -> Tensor:
        left, right = p.regime.window
        options = {"window_size": (left, 0 if causal else right)} if windowed else {"is_causal": causal}
        if repeat > 1:
            k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        elif "enable_gqa" in names:
            options["enable_gqa"] = True
        return varlen_attn(q, k, v, cu_q, cu_k, *longest, **options)

    return _per_group(p, launch)


def flash_attn(p: Problem, module: str = "flash_attn") -> Run | None:
    """flash-attn's varlen form, wherever ``module`` imports: a launch for the causal and one for the bidirectional samples."""
    if importlib.util.find_spec(module) is None:
        return None
    flash_attn_varlen_func = importlib.import_module(module).flash_attn_varlen_func

    def launch(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int]
    ) -> Tensor:
        out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, causal=causal, window_size=p.regime.window)
        return out[0] if isinstance(out, tuple) else out  # some versions return more than the output

    return _per_group(p, launch)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # one graph per kind of problem; beyond the limit torch runs FlexAttention uncompiled, and warns only once
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, fullgraph=True)


def flex(p: Problem) -> Run | None:
    """Compiled FlexAttention over the pack; the time to build its BlockMask is recorded separately in ``prepare_seconds``."""
    from torch.nn.attention.flex_attention import create_block_mask

    r = p.regime
    if max(r.q_lens) == 1 or (r.backward and p.device == "cpu"):
        return None
    lo, hi = [], []
    for b, (len_q, len_k) in enumerate(zip(r.q_lens, r.k_lens, strict=True)):
        left, right = (len_k if w < 0 else w for w in r.window)
        position = torch.arange(len_q) + len_k - len_q
        bounds = key_range(position, len_k, left, 0 if r.causal[b] else right)
        first = sum(r.k_lens[:b])
        lo.append(bounds[0] + first)
        hi.append(bounds[1] + first)
    lowest, highest = torch.cat(lo).to(p.device), torch.cat(hi).to(p.device)

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= lowest[row]) & (key < highest[row])

    def make() -> object:
        sizes = (p.q.shape[0], p.k.shape[0])
        return create_block_mask(visible, None, None, *sizes, device=p.device, _compile=p.device == "cuda")

    block_mask = make()
    wait = torch.cuda.synchronize if p.device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    make()
    wait()
    p.prepare_seconds["flex"] = time.perf_counter() - start
    attention = _compiled_flex()

    def run() -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (p.q, p.k, p.v))
        return attention(q, k, v, block_mask=block_mask, enable_gqa=r.heads != r.heads_kv)[0].transpose(0, 1)

    return run


def matmul(p: Problem) -> Run | None:
    """Decoding without the softmax: only the two grouped products, a bound on the cost of reading the cache. Not attention."""
    r = p.regime
    if max(r.q_lens) > 1 or len(set(r.k_lens)) > 1:
        return None
    batch, group = len(r.q_lens), r.heads // r.heads_kv

    def run() -> Tensor:
        q = p.q.view(batch, r.heads_kv, group, r.dim)
        k, v = (x.view(batch, -1, r.heads_kv, r.dim).transpose(1, 2) for x in (p.k, p.v))
        return ((q @ k.transpose(-1, -2)) @ v).reshape(batch, r.heads, r.dim)

    return run


def no_window(p: Problem) -> Run | None:
    """This package on the same causal samples without the window: what skipping blocks saves. Its result differs."""
    whole = unwindowed(p.regime)
    if whole == p.regime or p.regime.mode != "causal" or p.device != "cpu":
        return None
    longest = (max(whole.q_lens), max(whole.k_lens))
    return lambda: gk.switch_attention_varlen(p.q, p.k, p.v, p.flags, p.cu_q, p.cu_k, *longest)


PEERS: dict[str, Callable[[Problem], Run | None]] = {
    "grit": grit,
    "grit, no window": no_window,
    "grit, two launches": grit_split,
    "grit, atomics": grit_atomics,
    "sdpa loop": sdpa_loop,
    "sdpa masked": sdpa_masked,
    "sdpa split": sdpa_split,
    # the mixed regimes' bidirectional half needs a mask, which cuDNN and flash do without only sample by sample
    "sdpa loop cudnn": lambda p: sdpa_loop(p, SDPBackend.CUDNN_ATTENTION) if p.device == "cuda" else None,
    "sdpa split cudnn": lambda p: sdpa_split(p, SDPBackend.CUDNN_ATTENTION) if p.device == "cuda" else None,
    "sdpa split flash": lambda p: sdpa_split(p, SDPBackend.FLASH_ATTENTION) if p.device == "cuda" else None,
    "torch varlen": torch_varlen,
    "flash-attn": flash_attn,
    "flash-attn 3": lambda p: flash_attn(p, PACKAGES["flash-attn 3"]),
    "flex": flex,
    "matmul only": matmul,
}
PACKAGES = {"flash-attn": "flash_attn", "flash-attn 3": "flash_attn_interface"}
"""The modules of peers that are packages of their own."""
NOT_ATTENTION = ("matmul only", "grit, no window")
