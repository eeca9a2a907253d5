"""The definition of the fused ops in plain torch, differentiable by autograd.

All arithmetic is in float64 for float64 inputs and in float32 otherwise; results are rounded once.

    rms_norm   total = x + residual (rounded to its dtype),  out = total * rsqrt(mean(total^2) + eps) * (weight + offset)
    rotary     out = (x1 c1 - x2 s1, x2 c2 + x1 s2) over the halves of the first R values of a head; the others stay
    gated      out = act(gate) * up,  act = SiLU or the tanh form of GELU
"""

from __future__ import annotations

import torch
from torch import Tensor

from grit_kernels.precision import without_autocast

KINDS = ("silu", "gelu_tanh")
"""Activations by their number in the ops' argument ``kind``."""


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@without_autocast
def rms_norm_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x, residual (..., C), weight (C) -> out in ``out_dtype``, and the total in their wider dtype (empty without residual)."""
    total = x if residual is None else x + residual
    wide = total.to(_compute(total))
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    out = (wide * inverse * (weight.to(wide.dtype) + offset)).to(out_dtype)
    return out.contiguous(), total.contiguous() if residual is not None else x.new_empty(0)


@without_autocast
def rms_norm_backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The closed form: (gradient of x and of the residual, in total's dtype; float32 gradient of weight, empty if not needed).

    With ``n = total * r``, ``r = rsqrt(..)``, ``g = grad_out * (weight + offset)``:
    ``grad = r * (g - n * mean(g * n)) + grad_total`` and ``grad_weight = sum over rows of grad_out * n``.
    """
    wide = total.to(_compute(total))
    grad = grad_out.to(wide.dtype)
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normed, g = wide * inverse, grad * (weight.to(wide.dtype) + offset)
    result = inverse * (g - normed * (g * normed).mean(dim=-1, keepdim=True))
    if grad_total is not None:
        result = result + grad_total
    along = (grad * normed).flatten(0, -2).sum(dim=0) if need_weight else wide.new_empty(0)
    return result.to(total.dtype).contiguous(), along


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    wide, rotated = x.to(_compute(x)), cos.shape[-1]
    cos, sin = (t.to(wide.dtype)[:, :, None] for t in (cos, sin))  # [B, T, 1, R]
    first, second = wide[..., : rotated // 2], wide[..., rotated // 2 : rotated]
    (cos_1, cos_2), (sin_1, sin_2) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    if transposed:
        turned = (first * cos_1 + second * sin_2, second * cos_2 - first * sin_1)
    else:
        turned = (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    return torch.cat([*turned, wide[..., rotated:]], dim=-1).to(x.dtype)


@without_autocast
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """q (B, T, Hq, D), k (B, T, Hkv, D), cos and sin (B or 1, T, R) -> both rotated; ``transposed``: by the transposed matrix."""
    return _rotate(q, cos, sin, transposed), _rotate(k, cos, sin, transposed)


@without_autocast
def gated_forward(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """gate, up (..., C) -> act(gate) * up; kind: index into :data:`KINDS`."""
    wide = gate.to(_compute(gate))
    active = torch.nn.functional.silu(wide) if kind == 0 else torch.nn.functional.gelu(wide, approximate="tanh")
    return (active * up).to(gate.dtype).contiguous()


@without_autocast
def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """The closed form: (grad * up * act'(gate), grad * act(gate)).

    Both activations are ``x sigmoid(u)``, with ``u = x`` or ``u = 2 sqrt(2 / pi) (x + 0.044715 x^3)``, so
    ``act' = s + x s (1 - s) u'`` with ``s = sigmoid(u)``.
    """
    wide = gate.to(_compute(gate))
    factor = 2 * (2 / torch.pi) ** 0.5
    cubic = 0.044715 * wide.square().clamp(max=1e30)  # an infinity would meet the 0 of a saturated sigmoid
    u = wide if kind == 0 else factor * wide * (1 + cubic)
    slope = 1.0 if kind == 0 else factor * (1 + 3 * cubic)
    s = torch.sigmoid(u)
    g = grad.to(wide.dtype)
    grads = (g * up * (s + wide * s * (1 - s) * slope), g * (wide * s))
    return grads[0].to(gate.dtype).contiguous(), grads[1].to(gate.dtype).contiguous()
