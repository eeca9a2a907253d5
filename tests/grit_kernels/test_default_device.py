"""Every op computes on its arguments' device, whatever torch's default device is.

Under ``torch.set_default_device`` a tensor that an op makes without naming a device lands beside the arguments: here on the meta
device, which has no values, so that any use of it fails.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import grit_kernels as gk
from tests.conftest import Backend


def attention(q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> tuple[Tensor, ...]:
    hi = torch.tensor([[2, 2, 3], [1, 3, 3]], dtype=torch.int32, device=q.device)
    plain = gk.switch_attention(q, k, v, causal, window_size=(1, 1), softcap=5.0, return_lse=True)
    return *plain, gk.switch_attention(q, k, v, causal, hi=hi)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> tuple[Tensor, ...]:
    ends = torch.tensor([0, 3, 6], dtype=torch.int32, device=q.device)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return gk.switch_attention_varlen(q, k, v, causal, ends, ends, 3, 3, return_lse=True)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> tuple[Tensor, ...]:
    used = torch.tensor([1, 2], dtype=torch.int32, device=q.device)
    k_cache, v_cache = k.detach().clone(), v.detach().clone()
    new_k, new_v = k.detach()[:, :1] + 1, v.detach()[:, :1] + 1
    with torch.no_grad():
        out = gk.switch_attention_with_kvcache(q[:, :1], k_cache, v_cache, used, causal, k=new_k, v=new_v)
    return out, k_cache, v_cache


def pooled(q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> tuple[Tensor, ...]:
    hidden, norm_weight = q.flatten(2), k[0, 0].flatten()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=q.device)
    skipped = torch.tensor([1, 0], dtype=torch.int32, device=q.device)
    options = {"attention_mask": mask, "instruction_lens": skipped, "norm_weight": norm_weight, "normalize": True}
    return tuple(gk.pool(hidden, method=method, **options) for method in ("mean", "weightedmean", "lasttoken", "cls"))


def contrastive(q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> tuple[Tensor, ...]:
    queries, passages = q.flatten(2)[:, 0], v.flatten(2).flatten(0, 1)[:4]
    temperature = torch.tensor(0.5, device=q.device)
    weights = torch.tensor([1.0, 3.0], device=q.device)
    ids = torch.tensor([0, 1], device=q.device), torch.tensor([0, 2, 1, 0], device=q.device)
    return (
        gk.contrastive_loss(queries, passages, temperature=0.5),
        gk.contrastive_loss(queries, passages, temperature=temperature, reduction="none", normalize=True),
        gk.contrastive_loss(queries, passages, temperature=temperature, weights=weights, mask_ids=ids, symmetric=True),
        *gk.contrastive_loss(queries, passages, in_batch_negatives=False, reduction="sum", return_accuracy=True),
    )


def cross_entropy(q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> tuple[Tensor, ...]:
    hidden, weight = q.flatten(2).flatten(0, 1), v.flatten(2).flatten(0, 1)
    labels = torch.tensor([0, 5, -100, 2, 2, 1], device=q.device)
    return gk.linear_cross_entropy(hidden, weight, labels), gk.linear_cross_entropy(hidden, weight, labels, softcap=3.0)


def fused(q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> tuple[Tensor, ...]:
    gate, up, weight = q.flatten(2), v.flatten(2), k[0, 0].flatten()
    angles = torch.linspace(0, 1, 3 * 32, device=q.device).view(1, 3, 32).expand(2, 3, 32)
    return (
        gk.rms_norm(gate, weight),
        *gk.rms_norm(gate, weight, residual=up),
        *gk.rotary(q, k, angles.cos(), angles.sin()),
        gk.silu_mul(gate, up),
        gk.gelu_tanh_mul(gate, up),
    )


OPS = (attention, packed_attention, cached_attention, pooled, contrastive, cross_entropy, fused)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_a_default_device_changes_no_result_and_no_gradient(
    backend: Backend, op: Callable[..., tuple[Tensor, ...]]
) -> None:
    inputs = [torch.randn(2, 3, 2, 32, device=backend.device, requires_grad=True) for _ in range(3)]
    causal = torch.tensor([True, False], device=backend.device)

    def results() -> list[Tensor]:
        with backend():
            found = op(*inputs, causal)
        differentiable = [x for x in found if x.requires_grad]
        grads = [torch.ones(x.shape, dtype=x.dtype, device=x.device) for x in differentiable]
        used = torch.autograd.grad(differentiable, inputs, grads, allow_unused=True) if differentiable else ()
        return [*found, *(x for x in used if x is not None)]

    expected = results()
    with torch.device("meta"):
        found = results()
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_default_device_changes_no_pack() -> None:
    """Packs are made on the CPU and moved once."""
    mask = torch.tensor([[1, 1, 2, 0], [0, 1, 1, 1]])
    starts = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 2]])
    hi = torch.tensor([1, 2, 3, 2, 2], dtype=torch.int32)

    def packs() -> list[gk.SamplePack]:
        return [
            gk.SamplePack.from_lengths([3, 2], [True, False], hi=hi),
            gk.SamplePack.from_lengths([3, 2], False, [1, 0]),
            gk.SamplePack.from_mask(mask, position_ids=None),
            gk.SamplePack.from_mask(mask != 0, instruction_lens=mask.new_tensor([1, 0])),
            gk.SamplePack.from_position_ids(starts, starts.new_tensor([True, False], dtype=torch.bool)),
        ]

    expected = packs()
    with torch.device("meta"):
        found = packs()
        positions = [pack.position_ids for pack in found]
    for pack, same, places in zip(found, expected, positions, strict=True):
        for name in ("cu_seqlens", "causal", "instruction_lens", "lengths", "indices", "hi"):
            ours, theirs = getattr(pack, name), getattr(same, name)
            assert theirs is None if ours is None else torch.equal(ours, theirs), name
        assert torch.equal(places, same.position_ids)
