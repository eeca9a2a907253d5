"""Random calls of the public kernels against their definitions in float64: any dtype, strides, magnitude and option.

``python -m tests.grit_kernels.fuzz --calls 2000`` (make fuzz) prints how many calls each kernel passed; test_fuzz.py runs a few
of them. A call is drawn from its number alone, so what fails can be run again.

A result may be off by twice the eager error of the same computation in the inputs' dtype, as everywhere in the tests, plus the
change that a few FP32 roundings of an input cause (``spread``): of two scores of 1e14 that differ by less than FP32 can
hold, either may be the highest. A gradient through a norm is what is left after its part along the row is taken away, and may be
off by the rounding of what it was before. Three more bounds follow from the formulas:

* A cross entropy is ln(sum exp(z - top)) and more, and the sum is at least 1: the loss is known to an FP32 rounding of 1, also
  where it is smaller (one key far above all others). So is the label's probability less 1, and a gradient to that rounding times
  the rows it is multiplied by; the two directions of the symmetric loss add such terms, which may cancel (docs/kernels.md has
  the whole bound, and test_gradient_rounding.py tests it).
* Rows that a norm gives may cancel in a mean (width 1: signs), and a vector that is normalised then keeps the direction of what
  their roundings leave. So normed rows are changed by a few roundings too, as the inputs are.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import grit_kernels as gk
from tests.grit_kernels.fuzz_call import (
    DTYPES,
    FEW_ROUNDINGS,
    ONE_ROUNDING,
    Call,
    Results,
    magnitudes,
    stored,
    unit_rows,
)
from tests.grit_kernels.fuzz_fused import gelu_call, rms_norm_call, rotary_call, silu_call
from tests.grit_kernels.fuzz_serving import key_ranges_call, kvcache_call


def attention_call(rng: random.Random) -> Call:
    dtype, batch = rng.choice(DTYPES), rng.randint(1, 3)
    heads_kv, group, dim = rng.randint(1, 2), rng.randint(1, 3), rng.choice([32, 40, 64, 72, 96, 128])
    decode = rng.random() < 0.3
    lens_k = [rng.choice([0, 1, 5, 17, 40, 130]) for _ in range(batch)]
    lens_q = [rng.randint(0, 4) if decode else rng.choice([0, 1, 7, 33, n]) for n in lens_k]
    causal = [rng.random() < 0.5 for _ in range(batch)]
    window = [(rng.choice([-1, -1, 0, 9]), rng.choice([-1, -1, 0, 9])) for _ in range(batch)]
    scale, softcap = rng.choice([None, None, 0.3, -0.2]), rng.choice([0.0, 0.0, 20.0])
    form = rng.choice(["varlen", "dense", "cache"])
    q, k, v = (
        magnitudes(torch.randn(sum(lens), heads, dim), rng, dtype, most)
        for lens, heads, most in ((lens_q, heads_kv * group, 6), (lens_k, heads_kv, 6), (lens_k, heads_kv, 4))
    )
    inputs = [q, k, v]
    if rng.random() < 0.4:
        inputs.append((torch.randn(heads_kv * group) * rng.choice([1, 5, 50])).to(dtype))
    used = dim**-0.5 if scale is None else scale
    max_q, max_k = max([*lens_q, 1]), max([*lens_k, 1])

    def masks() -> Iterable[Tensor]:
        for n, m, flag, (left, right) in zip(lens_q, lens_k, causal, window, strict=True):
            distance = torch.arange(m)[None, :] - (torch.arange(n)[:, None] + m - n)
            seen = torch.ones(n, m, dtype=torch.bool) if left < 0 else distance >= -left
            if flag:
                right = 0
            yield seen & (distance <= right) if right >= 0 else seen

    def probabilities(q: Tensor, k: Tensor, mask: Tensor, *sinks: Tensor) -> tuple[Tensor, Tensor]:
        """Of the keys (H, Lq, Lk), and of a sink (H, Lq): what is missing to 1."""
        score = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * used
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        score = score.masked_fill(~mask, float("-inf"))
        empty = ~mask.any(dim=1)[None, :, None]
        columns = [score.masked_fill(empty, 0.0), *(x[:, None, None].expand(-1, len(q), 1) for x in sinks)]
        p = torch.where(empty, 0.0, torch.cat(columns, dim=-1).softmax(dim=-1))
        return p[..., : len(k)], p[..., len(k) :].sum(-1)

    def definition(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Results:
        outs = []
        for a, b, c, mask in zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), masks(), strict=True):
            p, _ = probabilities(a, b, mask, *sinks)
            outs.append(torch.einsum("hqk,khd->qhd", p, c.repeat_interleave(group, 1)))
        return [torch.cat(outs)]

    def rounding(inputs: list[Tensor], outs: Results, grads: Results) -> list[Tensor | float]:
        # dS = P (dP - delta), delta = rowsum(dO O) of the rounded O
        q, k, _, *sinks = inputs
        noise = (outs[0].abs() * grads[0].abs() * 2 * torch.finfo(dtype).eps).sum(-1).split(lens_q)
        for_q, for_k, for_sinks = [], [], torch.zeros(heads_kv * group, dtype=q.dtype)
        for a, b, n, mask in zip(q.split(lens_q), k.split(lens_k), noise, masks(), strict=True):
            p, of_sink = probabilities(a, b, mask, *sinks)
            for_sinks += (of_sink * n.T).sum(-1)
            weight = p * n.T[:, :, None] * abs(used)
            for_q.append(torch.einsum("hqk,khd->qhd", weight, b.abs().repeat_interleave(group, 1)))
            for_k.append(torch.einsum("hqk,qhd->khd", weight, a.abs()).unflatten(1, (heads_kv, group)).sum(2))
        return [torch.cat(for_q), torch.cat(for_k), 0.0, for_sinks][: len(inputs)]

    options = {"window_size": torch.tensor(window, dtype=torch.int32), "softmax_scale": scale, "softcap": softcap}

    def in_rows(x: Tensor, lens: list[int], length: int) -> Tensor:
        parts = [F.pad(part, (0, 0, 0, 0, 0, length - len(part)), value=float("nan")) for part in x.split(lens)]
        return torch.stack(parts)

    def kernel(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Results:
        flags, given = torch.tensor(causal), {**options, "sinks": sinks}
        if form == "varlen":
            tables = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)]
            return [gk.switch_attention_varlen(q, k, v, flags, *tables, max_q, max_k, **given)]
        rows = [in_rows(x, lens, n) for x, lens, n in ((q, lens_q, max_q), (k, lens_k, max_k), (v, lens_k, max_k))]
        lengths = [torch.tensor(lens, dtype=torch.int32) for lens in (lens_q, lens_k)]
        if form == "dense" or any(x.requires_grad for x in (q, k, v)):
            out = gk.switch_attention(*rows, flags, seqlens_q=lengths[0], seqlens_k=lengths[1], **given)
        else:
            out = gk.switch_attention_with_kvcache(*rows, lengths[1], flags, seqlens_q=lengths[0], **given)
        return [torch.cat([x[:n] for x, n in zip(out, lens_q, strict=True)])]

    return Call(inputs, kernel, definition, rounding)


def contrastive_call(rng: random.Random) -> Call:
    dtype, count, group = rng.choice(DTYPES), rng.choice([1, 2, 31, 49, 100]), rng.randint(1, 4)
    width, normalize = rng.choice([1, 7, 16, 50, 96, 130]), rng.random() < 0.5
    q = magnitudes(torch.randn(count, width), rng, dtype, 3)
    p = magnitudes(torch.randn(count * group, width), rng, dtype, 3)
    temperature, in_batch, symmetric = 10 ** rng.uniform(-2, 1), rng.random() < 0.7, rng.random() < 0.4
    targets = torch.arange(count) * group + torch.tensor([rng.randrange(group) for _ in range(count)])
    ids = None
    if rng.random() < 0.4:
        ids = (torch.randint(0, 9, (count,)), torch.randint(0, 9, (count * group,)))
    weights = torch.rand(count) + 0.1 if rng.random() < 0.4 else None
    reduction = rng.choice(["mean", "sum", "none"])

    def losses(a: Tensor, b: Tensor, goal: Tensor, grouped: bool, marks: tuple[Tensor, Tensor] | None) -> Tensor:
        score = a @ b.T
        score = (score if score.dtype == torch.float64 else score.float()) / temperature
        column = torch.arange(len(b))[None, :]
        hidden = torch.zeros(score.shape, dtype=torch.bool)
        if grouped:
            hidden |= column // group != torch.arange(len(a))[:, None]
        if marks is not None:
            hidden |= (marks[0][:, None] == marks[1][None, :]) & (column != goal[:, None])
        return F.cross_entropy(score.masked_fill(hidden, float("-inf")), goal, reduction="none")

    def definition(q: Tensor, p: Tensor, fixed: bool = False) -> Results:
        if normalize:
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            q, p = (unit_rows(x.to(wide), fixed).to(x.dtype) for x in (q, p))
        each = losses(q, p, targets, not in_batch, ids)
        if symmetric:
            marks = None if ids is None else (ids[1][targets], ids[0])
            each = (each + losses(p[targets], q, torch.arange(count), False, marks)) / 2
        weighted = each if weights is None else each * weights
        if reduction == "mean":
            return [weighted.sum() / (count if weights is None else weights.sum())]
        return [weighted.sum() if reduction == "sum" else weighted]

    def kernel(q: Tensor, p: Tensor) -> Results:
        loss = gk.contrastive_loss(
            q,
            p,
            temperature=temperature,
            targets=targets,
            in_batch_negatives=in_batch,
            mask_ids=ids,
            symmetric=symmetric,
            weights=weights,
            normalize=normalize,
            reduction=reduction,
        )
        assert isinstance(loss, Tensor)
        return [loss]

    heaviest = 1.0 if weights is None else float(weights.max())
    of_loss = ONE_ROUNDING * (count if reduction == "sum" else 1) * heaviest

    def rounding(inputs: list[Tensor], outs: Results, grads: Results) -> list[Tensor | float]:
        most = grads[0].abs().max() * heaviest
        if normalize:
            # the terms of a gradient, each a weight times a unit row, cancel where the rows are nearly the same
            lengths = (x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in inputs)
            return [4 * torch.finfo(dtype).eps * most / temperature / length for length in lengths]
        largest = [x.abs().max() for x in inputs]
        return [ONE_ROUNDING * most / temperature * other for other in reversed(largest)]

    fixed = functools.partial(definition, fixed=True) if normalize else None
    return Call([q, p], kernel, definition, rounding, fixed, result_rounding=of_loss)


def token_loss_call(rng: random.Random) -> Call:
    dtype, tokens = rng.choice(DTYPES), rng.choice([1, 5, 40, 70])
    vocabulary, width = rng.choice([1, 30, 257]), rng.choice([1, 9, 24, 64])
    hidden = magnitudes(torch.randn(tokens, width), rng, dtype, 4)
    weight = magnitudes(torch.randn(vocabulary, width), rng, dtype, 1)
    labels, softcap = torch.randint(0, vocabulary, (tokens,)), rng.choice([None, None, 30.0])
    labels[torch.rand(tokens) < 0.2] = -100

    def definition(h: Tensor, w: Tensor) -> Results:
        logits = h @ w.T
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return [F.cross_entropy(logits, labels, reduction="none")]

    def rounding(inputs: list[Tensor], outs: Results, grads: Results) -> list[Tensor | float]:
        most, largest = grads[0].abs().max(), [x.abs().max() for x in inputs]
        return [ONE_ROUNDING * most * other for other in reversed(largest)]

    def kernel(h: Tensor, w: Tensor) -> Results:
        return [gk.linear_cross_entropy(h, w, labels, softcap=softcap)]

    return Call([hidden, weight], kernel, definition, rounding, result_rounding=ONE_ROUNDING)


def pool_call(rng: random.Random) -> Call:
    dtype, batch, columns = rng.choice(DTYPES), rng.randint(1, 4), rng.choice([1, 5, 16, 40, 100])
    lens = [rng.choice([1, 3, 20, 70]) for _ in range(batch)]
    skipped = [rng.randint(0, n - 1) for n in lens]
    method, normed = rng.choice(["mean", "weightedmean", "lasttoken", "cls"]), rng.random() < 0.5
    hidden = magnitudes(torch.randn(sum(lens), columns), rng, dtype, 6)
    gain = (torch.randn(columns) if normed else torch.zeros(0)).to(dtype)
    normalize, packed = rng.random() < 0.3, rng.random() < 0.5

    def definition(hidden: Tensor, gain: Tensor, fixed: bool = False, jitter: float = 0.0) -> Results:
        x = hidden if hidden.dtype == torch.float64 else hidden.float()
        if normed:
            inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            x = x * (inverse.detach() if fixed else inverse) * gain.to(x.dtype)
            if jitter:
                x = x * (1 + jitter * torch.randn_like(x))
        rows = []
        for part, skip in zip(x.split(lens), skipped, strict=True):
            part = part if method == "cls" else part[skip:]
            if method == "mean":
                rows.append(part.mean(0))
            elif method == "weightedmean":
                share = torch.arange(1, len(part) + 1, dtype=part.dtype)
                rows.append((part * share[:, None]).sum(0) / share.sum())
            else:
                rows.append(part[0 if method == "cls" else -1])
        out = torch.stack(rows)
        return [unit_rows(out, fixed) if normalize else out]

    def kernel(hidden: Tensor, gain: Tensor) -> Results:
        options = {"method": method, "normalize": normalize, "instruction_lens": torch.tensor(skipped)}
        if normed:
            options["norm_weight"] = gain
        if packed:
            return [gk.pool(hidden, cu_seqlens=torch.tensor([0, *lens]).cumsum(0).int(), **options)]
        rows = torch.stack([F.pad(x, (0, 0, 0, max(lens) - len(x)), value=float("nan")) for x in hidden.split(lens)])
        mask = torch.arange(max(lens))[None, :] < torch.tensor(lens)[:, None]
        return [gk.pool(rows, attention_mask=mask, **options)]

    fixed = functools.partial(definition, fixed=True)
    return Call([hidden, gain], kernel, definition, None, fixed, functools.partial(definition, jitter=FEW_ROUNDINGS))


KERNELS = {
    "attention": attention_call,
    "contrastive_loss": contrastive_call,
    "linear_cross_entropy": token_loss_call,
    "pool": pool_call,
    "rms_norm": rms_norm_call,
    "rotary": rotary_call,
    "silu_mul": silu_call,
    "gelu_tanh_mul": gelu_call,
    "kvcache": kvcache_call,
    "key_ranges": key_ranges_call,
}


def results_and_gradients(
    function: Callable[..., Results], inputs: Sequence[Tensor], grads: Results | None, rng: random.Random | None = None
) -> tuple[Results, Results]:
    """What the function gives, and the inputs' gradients (zeros where it does not use one); stored anyhow with ``rng``."""
    leaves = [(x if rng is None else stored(x, rng)).detach().requires_grad_(grads is not None) for x in inputs]
    outs = function(*leaves)
    if grads is None:
        return outs, []
    total = sum((o.to(torch.float64) * g).sum() for o, g in zip(outs, grads, strict=True))
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    return [o.detach() for o in outs], [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)
    ]


def fault(actual: Tensor, truth: Tensor, eager: Tensor, spread: Tensor, dtype: torch.dtype, least: float) -> str:
    """Empty when ``actual`` is as close to ``truth`` as it must be; ``least``: what counts as 0."""
    if actual.shape != truth.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    judged = truth.isfinite() & (truth.abs() < torch.finfo(actual.dtype).max / 2)  # the others do not fit the dtype
    if not bool(judged.any()):
        return ""
    actual, truth, eager, spread = (x.double()[judged] for x in (actual, truth, eager, spread))
    if not bool(actual.isfinite().all()):
        return "not finite"
    size = float(truth.abs().max())
    steady = spread <= 1e-3 * size
    slip = (eager - truth).abs()[steady & eager.isfinite()]
    allowed = 2 * float(slip.max()) if slip.numel() else 0.0
    # roundings to dtype and FP32 on the way
    allowed += (2 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps) * size
    allowed += max(2 * torch.finfo(dtype).tiny, least)
    over = (actual - truth).abs() - allowed - 4 * spread
    worst = int(over.argmax())
    if float(over[worst]) <= 0:
        return ""
    found, wanted, around = (float(x[worst]) for x in (actual, truth, spread))
    return f"{found:.6g}, expected {wanted:.6g} (allowed {allowed:.2g}, spread {around:.2g})"


def run_call(kernel: str, number: int, gradients: bool = True) -> str:
    """Empty, or what is wrong with call ``number`` of that kernel."""
    rng = random.Random(f"{kernel} {number}")
    torch.manual_seed(rng.getrandbits(31))
    call = KERNELS[kernel](rng)
    dtype = call.inputs[0].dtype
    gradients = gradients and call.differentiable
    wide = [x.double() for x in call.inputs]
    grads = [torch.randn(x.shape, dtype=torch.float64) for x in call.definition(*wide)] if gradients else None
    truth, eager = ([*sum(results_and_gradients(call.definition, x, grads), [])] for x in (wide, call.inputs))
    spread = [torch.zeros_like(x) for x in truth]
    for _ in range(2):
        near = [x * (1 + FEW_ROUNDINGS * torch.randn_like(x)) for x in wide]
        moved = sum(results_and_gradients(call.jittered or call.definition, near, grads), [])
        spread = [s.maximum((m - t).abs().nan_to_num(0)) for s, m, t in zip(spread, moved, truth, strict=True)]
    # a row whose best key changes changes as a whole
    spread = [s.amax(-1, keepdim=True).expand_as(s) if s.numel() and s.ndim else s for s in spread]
    if grads is not None:
        noise: list[Tensor | float] = [0.0] * len(wide)
        if call.rounding is not None:
            noise = call.rounding(wide, truth[: len(grads)], grads)
        if call.fixed_norms is not None:
            _, whole = results_and_gradients(call.fixed_norms, wide, grads)
            parts = [2 * torch.finfo(dtype).eps * x.abs().amax() if x.numel() else 0.0 for x in whole]
            noise = [a + b for a, b in zip(noise, parts, strict=True)]
        spread = [*spread[: len(grads)], *(s + n for s, n in zip(spread[len(grads) :], noise, strict=True))]
    actual = sum(results_and_gradients(call.kernel, call.inputs, grads, rng), [])
    # a probability below FP32's smallest normal number may count as that one
    least = 64 * torch.finfo(torch.float32).tiny * math.prod(max(1.0, float(x.abs().max())) for x in wide if x.numel())
    if call.result_rounding:
        results = len(truth) - len(wide) * gradients
        spread = [*(s + call.result_rounding for s in spread[:results]), *spread[results:]]
    names = [f"result {i}" for i in range(len(actual) - len(wide) * gradients)] + [
        f"gradient {i}" for i in range(len(wide))
    ]
    for name, *parts in zip(names, actual, truth, eager, spread, strict=False):
        if message := fault(*parts, dtype, least):
            return f"{kernel} {number}, {dtype}: {name} {message}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="of each kernel")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--only", choices=[*KERNELS], help="one kernel")
    options = parser.parse_args()
    torch.set_num_threads(1)
    passed: collections.Counter[str] = collections.Counter()
    failed: list[str] = []
    for kernel in [options.only] if options.only else KERNELS:
        for number in range(options.first, options.first + options.calls):
            message = run_call(kernel, number, gradients=number % 4 != 3)
            if message:
                failed.append(message)
                print(message, flush=True)
            else:
                passed[kernel] += 1
        print(f"{kernel}: {passed[kernel]} of {options.calls} calls passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
