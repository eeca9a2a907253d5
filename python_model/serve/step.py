"""One packed step: decoding rows, chunks of prompts and texts to embed share every product and one attention call per layer.

Generalises :mod:`python_model.generate.step` to samples of any length, each with its own flag and its own range of keys in
an :class:`~python_model.serve.arena.Arena`:

    x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),  n = rms_norm(x)
    x = x + down_proj(act(gate_proj(m)) * up_proj(m)),                       m = rms_norm(x)

Everything with weights is the model's own module. A sample's result does not depend on what shares the step, except for the
summation order of matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import grit_kernels as gk
from python_model.model.modeling import GritLM
from python_model.rag.rope import STATIC_ROPE_TYPES
from python_model.serve.arena import Arena, Interval

KNOWN_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
WITHOUT_WINDOW = ("LlamaDecoderLayer",)

SHORT_ROWS = 64
"""Up to this many query rows times heads per group, a GPU splits the keys of a sample among programs."""


@dataclass(frozen=True)
class Item:
    """A sample of a step.

    Attributes:
        ids: its new tokens, at least one.
        interval: where its states go, after the ``past`` ones it holds already; None for a text read whole in scratch rows.
        past: tokens before the new ones.
        causal: True: sees only its past. False: sees all of the text, which must then be whole.
        causal_prefix: leading tokens of a bidirectional text that are causal, for a model with causal instructions
            (``attn="cb.."``). None for other models.
    """

    ids: Sequence[int]
    interval: Interval | None = None
    past: int = 0
    causal: bool = True
    causal_prefix: int | None = None


@dataclass(frozen=True)
class _Part:
    """Samples that share an attention call: their rows in the pack, and the arguments of the call."""

    rows: slice
    causal: Tensor
    cu_seqlens: Tensor
    starts: Tensor  # int32 (layers, B)
    lengths: Tensor
    longest: tuple[int, int]
    hi: Tensor | None  # int32 (tokens), the upper bounds without a window
    nearest: Tensor | None  # int32 (tokens), the key after each token's own


def refusal(model: GritLM) -> str | None:
    """Why this step cannot compute what ``model`` does, or None."""
    layers = model.decoder[0].layers
    unknown = sorted({type(layer).__name__ for layer in layers} - set(KNOWN_LAYERS))
    if unknown:
        return f"model: expected one with layers of {', '.join(KNOWN_LAYERS)}, got {', '.join(unknown)}"
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in layers.modules()):
        return "model: expected one without hooks on its layers (such as those of a device map), got some"
    rope = getattr(model.decoder[0].rotary_emb, "rope_type", "default")
    if rope not in STATIC_ROPE_TYPES:
        # other types scale positions by the longest sequence in the batch, so a neighbour would change the result
        return f"model: expected rotary positions of type {', '.join(STATIC_ROPE_TYPES)}, got {rope!r}"
    return None


class PackedStep:
    """Steps of one model over one arena.

    Args:
        model: see :func:`refusal`.
        arena: with the model's geometry, dtype and device.
        split: give samples with few rows their own attention call, so that a long text in the step does not prevent their keys
            from being split; default: on a GPU. (The CPU kernels decide per sample.)

    Raises:
        ValueError: a model that is refused, with the reason.
    """

    def __init__(self, model: GritLM, arena: Arena, *, split: bool | None = None) -> None:
        reason = refusal(model)
        if reason is not None:
            raise ValueError(reason)
        self.model, self.arena, self.decoder = model, arena, model.decoder[0]
        config = model.model.config
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.windows = [_window(layer, config) for layer in self.decoder.layers]
        self.split = arena.keys.device.type == "cuda" if split is None else split

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> tuple[Tensor, list[int]]:
        """States after the last norm (tokens, hidden), samples in the given order, and where each begins (B + 1)."""
        order = list(range(len(items)))
        if self.split:
            order.sort(key=lambda i: len(items[i].ids) * self.group > SHORT_ROWS)
        ordered = [items[i] for i in order]
        rows, starts = self._rows(ordered)
        parts = self._parts(ordered, starts)
        device = self.arena.keys.device
        decoder = self.decoder
        x = decoder.embed_tokens(torch.tensor([token for item in ordered for token in item.ids], device=device))
        positions = np.concatenate([np.arange(item.past, item.past + len(item.ids)) for item in ordered])
        cos, sin = (t[0][:, None] for t in decoder.rotary_emb(x, torch.from_numpy(positions).to(device)[None]))
        half = cos.shape[-1] // 2
        # -sin in the second half of the table turns rotate_half into two products
        rope = cos, -sin[..., :half], sin[..., half:]  # each (tokens, 1, D or D / 2)
        windows = {
            window: [_visible(part, window, self.model.settings.bidirectional_window) for part in parts]
            for window in set(self.windows)
        }
        for index, layer in enumerate(decoder.layers):
            x = x + self._attention(layer, index, x, rope, rows[index], parts, windows[self.windows[index]])
            norm, mlp = layer.post_attention_layernorm, layer.mlp
            h = functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
            x = x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)).mul_(mlp.up_proj(h)))
        x = functional.rms_norm(x, x.shape[-1:], decoder.norm.weight, decoder.norm.variance_epsilon)
        for item in items:
            if item.interval is not None:
                item.interval.filled = item.past + len(item.ids)
        offsets = list(accumulate((len(item.ids) for item in items), initial=0))
        if order != sorted(order):
            places = list(accumulate((len(item.ids) for item in ordered), initial=0))
            x = torch.cat([x[places[p] : places[p + 1]] for p in sorted(range(len(order)), key=order.__getitem__)])
        return x, offsets

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocabulary)."""
        return self.model.model.get_output_embeddings()(hidden)

    def _rows(self, items: Sequence[Item]) -> tuple[Tensor, np.ndarray]:
        """Where each new token's states go, int64 (layers, tokens), and the first key row of each sample, (layers, B)."""
        arena = self.arena
        scratch = arena.scratch_start
        starts, strides, places = [], [], []
        for item in items:
            new = len(item.ids)
            if not new:
                raise ValueError("ids: expected at least one token, got none")
            if item.interval is None:
                if item.past:
                    raise ValueError(f"past: expected 0 for a text in scratch rows, got {item.past}")
                start, stride = scratch, 0
                scratch += new
            else:
                if item.past + new > item.interval.rows or item.past > item.interval.filled:
                    raise ValueError(
                        f"past: expected at most {item.interval.filled} filled rows, and with {new} new ones at most "
                        f"{item.interval.rows}, got {item.past}"
                    )
                start, stride = item.interval.start, arena.rows
            starts.append(start)
            strides.append(stride)
            places.append(np.arange(start + item.past, start + item.past + new))
        if scratch > arena.scratch_start + arena.scratch:
            raise ValueError(
                f"ids: expected at most {arena.scratch} tokens in scratch rows, got {scratch - arena.scratch_start}"
            )
        layers = np.arange(arena.layers)[:, None]
        per_token = np.repeat(strides, [len(item.ids) for item in items])
        rows = np.concatenate(places)[None] + layers * per_token[None]
        return torch.from_numpy(rows).to(arena.keys.device), np.array(starts)[None] + layers * np.array(strides)[None]

    def _parts(self, items: Sequence[Item], starts: np.ndarray) -> list[_Part]:
        device = self.arena.keys.device
        short = sum(len(item.ids) * self.group <= SHORT_ROWS for item in items) if self.split else 0
        parts, first_row = [], 0
        for chosen in (slice(0, short), slice(short, len(items))):
            part = items[chosen]
            if not part:
                continue
            lens_q = [len(item.ids) for item in part]
            lens_k = [item.past + len(item.ids) for item in part]
            total = sum(lens_q)
            hi = nearest = None
            if any(item.causal_prefix is not None for item in part):
                hi = torch.from_numpy(np.concatenate([_upper_bounds(item) for item in part])).to(device)
                behind = np.concatenate([np.arange(item.past + 1, item.past + len(item.ids) + 1) for item in part])
                nearest = torch.from_numpy(behind.astype(np.int32)).to(device)
            parts.append(
                _Part(
                    slice(first_row, first_row + total),
                    torch.tensor([item.causal for item in part], device=device),
                    torch.tensor(list(accumulate(lens_q, initial=0)), dtype=torch.int32, device=device),
                    torch.from_numpy(starts[:, chosen].astype(np.int32)).to(device),
                    torch.tensor(lens_k, dtype=torch.int32, device=device),
                    (max(lens_q), max(lens_k)),
                    hi,
                    nearest,
                )
            )
            first_row += total
        return parts

    def _attention(
        self,
        layer: Any,
        index: int,
        x: Tensor,
        rope: tuple[Tensor, Tensor, Tensor],
        rows: Tensor,
        parts: Sequence[_Part],
        visible: Sequence[tuple[tuple[int, int] | Tensor, Tensor | None]],
    ) -> Tensor:
        attention, norm = layer.self_attn, layer.input_layernorm
        cos, low, high = rope
        tokens, dim = x.shape[0], cos.shape[-1]
        h = functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
        q, k = attention.q_proj(h).view(tokens, -1, dim), attention.k_proj(h).view(tokens, -1, dim)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        heads = q.shape[1]
        both = torch.cat([q, k], dim=1)  # [tokens, Hq + Hkv, D]
        turned = both * cos
        half = dim // 2
        turned[..., :half].addcmul_(both[..., half:], low)
        turned[..., half:].addcmul_(both[..., :half], high)
        keys, values = self.arena.keys, self.arena.values
        keys.index_copy_(0, rows, turned[:, heads:])
        values.index_copy_(0, rows, attention.v_proj(h).view(tokens, -1, dim))
        outs = []
        for part, (window, hi) in zip(parts, visible, strict=True):
            out = gk.switch_attention_varlen(
                turned[part.rows, :heads],
                keys,
                values,
                part.causal,
                part.cu_seqlens,
                None,
                *part.longest,
                window_size=window,
                hi=hi,
                softmax_scale=attention.scaling,
                k_starts=part.starts[index],
                seqlens_k=part.lengths,
            )
            assert isinstance(out, Tensor)
            outs.append(out)
        joined = outs[0] if len(outs) == 1 else torch.cat(outs)
        return attention.o_proj(joined.view(tokens, -1))


def _window(layer: Any, config: Any) -> int | None:
    """The sliding window of a layer, None if it has none."""
    if type(layer).__name__ in WITHOUT_WINDOW:
        return None
    default = getattr(config, "sliding_window", None)
    return getattr(layer.self_attn, "sliding_window", default)


def _visible(
    part: _Part, window: int | None, bidirectional_window: str
) -> tuple[tuple[int, int] | Tensor, Tensor | None]:
    """Window sizes and upper bounds of a layer, as in patch(): (W - 1, 0) for a causal sample, (W, W) or the whole text for a
    bidirectional one, with the upper bounds clipped to that."""
    if window is None:
        return (-1, -1), part.hi
    reach = window if bidirectional_window == "transformers" else -1
    sizes = [torch.where(part.causal, window - 1, reach), torch.where(part.causal, 0, reach)]
    hi = part.hi
    if hi is not None and part.nearest is not None and reach >= 0:
        hi = torch.minimum(hi, part.nearest + reach)
    return torch.stack(sizes, dim=1).to(torch.int32), hi


def _upper_bounds(item: Item) -> np.ndarray:
    """The first key that each new token does not see, int32, for a step with causal instructions."""
    ends = np.arange(item.past + 1, item.past + len(item.ids) + 1, dtype=np.int32)
    if not item.causal:
        ends[item.causal_prefix or 0 :] = ends[-1]
    return ends
