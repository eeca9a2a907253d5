"""int8 key-value states: one scale per channel of the keys, one per token of the values.

    q = round(x / s), s = max |x| / 127, maximum over the tokens for keys and over the channels for values.

Keys have a few channels that are large in every token, values have none; so a key scale shared by the tokens of a channel is
three times as accurate as one shared by the channels of a token (KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(keys_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(layers, 2, heads, tokens, dim) -> the same as int8, key scales (layers, heads, 1, dim), value scales (layers, heads,
    tokens, 1); scales are float32."""
    keys, key_scales = _quantize(keys_values[:, 0].float(), dim=-2)
    values, value_scales = _quantize(keys_values[:, 1].float(), dim=-1)
    return torch.stack([keys, values], dim=1), key_scales, value_scales


def dequantize(data: Tensor, key_scales: Tensor, value_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`quantize`, rounded once to ``dtype``."""
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    out[:, 0] = data[:, 0] * key_scales
    out[:, 1] = data[:, 1] * value_scales
    return out


def _quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(dim=dim, keepdim=True) / 127
    # a channel or token of zeros has scale 0: divide by 1 instead
    data = (x / torch.where(scales > 0, scales, 1.0)).round().clamp(-127, 127).to(torch.int8)
    return data, scales
