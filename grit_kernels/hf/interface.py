"""The two functions that transformers calls: attention and mask, registered together under the name ``"grit"``.

transformers hands an attention function the states of one layer and whatever the mask function returned. Our mask function
builds nothing dense: it returns None when there is no padding, else an int32 tensor (B, 1, 1, K) that holds, per key slot,
its distance to the first query slot, or ``NO_KEY`` where the slot holds no key. (It is 4-D because transformers passes 4-D
masks through untouched, which static caches rely on.) What a packed pass needs instead travels as one
:class:`AttentionPass` through the model's keyword arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import packed_attention, rectangular_attention
from grit_kernels.checks import described
from grit_kernels.packing import SamplePack
from grit_kernels.visibility import UNLIMITED, window_bounds

NAME = "grit"
NO_KEY = 2**30

BIDIRECTIONAL_WINDOWS = ("transformers", "full")
"""Visible keys of a bidirectional sample under ``sliding_window=W``: ``|i - j| <= W`` as transformers, or all."""


@dataclass
class AttentionPass:
    """What all layers of one forward pass share: the flags, and for a packed pass the pack.

    ``windows`` caches the bounds per ``sliding_window`` value, so alternating layers compute them once each.
    """

    causal: Tensor
    bidirectional_window: str = "transformers"
    pack: SamplePack | None = None
    windows: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def bounds(self, sliding_window: int | None) -> tuple[Tensor, Tensor]:
        """``left`` and ``right`` (int32 (B)) of the packed samples."""
        assert self.pack is not None
        if sliding_window not in self.windows:
            window = window_sizes(self.causal, sliding_window, self.bidirectional_window)
            longest = self.pack.max_seqlen
            self.windows[sliding_window] = window_bounds(self.causal, window, longest, longest)
        return self.windows[sliding_window]


def window_sizes(causal: Tensor, sliding_window: int | None, bidirectional_window: str) -> tuple[int, int] | Tensor:
    """``window_size`` of a call, from a config's ``sliding_window``: (W - 1, 0) for a causal sample, else as chosen."""
    if sliding_window is None:
        return (UNLIMITED, UNLIMITED)
    reach = sliding_window if bidirectional_window == "transformers" else UNLIMITED
    left = torch.where(causal, sliding_window - 1, reach)
    right = torch.where(causal, 0, reach)
    return torch.stack([left, right], dim=1).to(torch.int32)


def grit_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **unused: Any,
) -> Tensor | None:
    """See the top of the file. Arguments as transformers passes them to a mask function."""
    aligned = not isinstance(q_offset, Tensor) and kv_offset + kv_length == q_offset + q_length
    if attention_mask is None and aligned:
        return None
    slot = torch.arange(kv_length, device=device) + kv_offset
    valid = (slot < q_offset + q_length)[None]
    if attention_mask is not None:
        missing = kv_length + kv_offset - attention_mask.shape[-1]
        if missing > 0:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
        valid = valid & attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    relative = torch.where(valid, (slot - q_offset)[None], NO_KEY).to(torch.int32)
    return relative.expand(batch_size, kv_length)[:, None, None, :]


@dataclass(frozen=True)
class _Holes:
    """Orders that move a sample's real keys and real query rows to the front, and the rows back to their places."""

    keys: Tensor  # int64 (B, K)
    rows: Tensor  # int64 (B, Q)
    rows_back: Tensor  # int64 (B, Q)


@dataclass(frozen=True)
class _KeyLayout:
    """Where a padded batch's keys and query rows lie, read off a mask once and reused by all layers."""

    first: Tensor  # int32 (B), first used slot
    end: Tensor  # int32 (B), one past the last used slot
    rows: Tensor  # int32 (B), query rows that are real (right padding excluded)
    holes: _Holes | None  # None when every sample's keys are one interval; else first, end, rows count after moving


def _key_layout(relative: Tensor, q_length: int) -> _KeyLayout:
    cached = getattr(relative, "_grit_layout", None)
    if cached is not None:
        return cached
    distance = relative[:, 0, 0]  # [B, K]
    slots = distance.shape[1]
    valid = distance < NO_KEY
    count = valid.sum(dim=1, dtype=torch.int32)
    index = torch.arange(slots, device=distance.device)
    first = torch.where(valid, index, slots).amin(dim=1)
    last = torch.where(valid, index, -1).amax(dim=1)
    # rows up to the last key are real; a sample without keys has none
    rows = torch.where(valid, distance, -1).amax(dim=1).add(1).clamp(0, q_length)
    holes = None
    # under torch.compile nothing may be read back, so everything is always moved
    if torch.compiler.is_compiling() or bool((last - first + 1 > count).any()):
        # row r is the key at distance r: a hole among the queries' own slots is a padded row
        row = torch.where(valid & (distance >= 0) & (distance < q_length), distance, q_length).to(torch.int64)
        real = torch.zeros(distance.shape[0], q_length + 1, dtype=torch.bool, device=distance.device)
        real = real.scatter(1, row, True)[:, :q_length]
        order = torch.sort((~real).to(torch.int8), dim=1, stable=True).indices
        holes = _Holes(
            torch.sort((~valid).to(torch.int8), dim=1, stable=True).indices, order, torch.argsort(order, dim=1)
        )
        first, rows = torch.zeros_like(first), real.sum(dim=1)
    layout = _KeyLayout(
        first.clamp(max=slots).to(torch.int32),
        (first + count).clamp(max=slots).to(torch.int32),
        rows.to(torch.int32),
        holes,
    )
    if not torch.compiler.is_compiling():
        relative._grit_layout = layout  # type: ignore[attr-defined]
    return layout


def _flattened(
    position_ids: Tensor | None, cu_seq_lens_q: Tensor | None, causal: bool, batch: int, length: int
) -> AttentionPass | None:
    """The pass of flattened input to a model that runs this implementation without patch(), None for other input.

    transformers marks flattened samples by a table or by positions that start over (see
    :meth:`SamplePack.from_position_ids`). Found once per pass and kept on the tensor that all layers share.
    """
    marker = position_ids if cu_seq_lens_q is None else cu_seq_lens_q
    if marker is None:
        return None
    if torch.compiler.is_compiling():
        if cu_seq_lens_q is not None:
            raise ValueError("cu_seq_lens_q: a compiled model needs grit_kernels.patch(model) and a sample_pack")
        return None
    cached = getattr(marker, "_grit_pass", None)
    if cached is not None and cached[0] == causal:
        return cached[1]
    found: AttentionPass | None
    if cu_seq_lens_q is not None:
        pack = SamplePack.from_lengths(cu_seq_lens_q.to("cpu").diff(), causal, device=cu_seq_lens_q.device)
        found = AttentionPass(pack.causal, pack=pack)
    else:
        pack = SamplePack.from_position_ids(marker.expand(batch, length), causal)
        found = AttentionPass(pack.causal, pack=pack) if len(pack) > batch else None
    marker._grit_pass = (causal, found)  # type: ignore[attr-defined]
    return found


def grit_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    grit_pass: AttentionPass | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' AttentionInterface.

    query (B, H, Q, D), key and value (B, Hkv, K, D) -> ((B, Q, H, D), None); a packed pass has B = 1.
    """
    if dropout:
        raise ValueError(f"attention_dropout: expected 0: these kernels have no dropout, got {dropout}")
    cap = softcap or 0.0
    batch, _, q_length, _ = query.shape
    flag = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if grit_pass is None and attention_mask is None and key.shape[2] == q_length:
        grit_pass = _flattened(position_ids, cu_seq_lens_q, flag, batch, q_length)
    if grit_pass is not None and grit_pass.pack is not None:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [tokens, H, D]
        out = packed_attention(
            q, k, v, grit_pass.pack, grit_pass.bounds(sliding_window), softmax_scale=scaling, softcap=cap
        )
        return out.unflatten(0, (batch, q_length)), None
    if grit_pass is not None:
        causal, convention = grit_pass.causal, grit_pass.bidirectional_window
    else:
        causal, convention = torch.full((batch,), flag, dtype=torch.bool, device=query.device), "transformers"
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return (
        _padded_attention(
            q, k, v, attention_mask, causal, window_sizes(causal, sliding_window, convention), scaling, cap
        ),
        None,
    )


def _padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor | None,
    causal: Tensor,
    window: tuple[int, int] | Tensor,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """(B, Q, H, D) queries that are the last slots of (B, K, Hkv, D) keys; padding and caches of any kind."""
    batch, q_length = q.shape[:2]
    slots = k.shape[1]
    holes = None
    if relative is not None and (relative.dtype != torch.int32 or relative.shape[2] != 1):
        raise ValueError(
            f"attention_mask: expected a 2-D padding mask, got {described(relative)}; which keys a sample sees is "
            "said by is_causal, or by a sample_pack with hi"
        )
    if relative is None:
        first = torch.zeros(batch, dtype=torch.int32, device=q.device)
        end, rows = torch.full_like(first, slots), torch.full_like(first, q_length)
    else:
        layout = _key_layout(relative, q_length)
        first, end, rows, holes = layout.first, layout.end, layout.rows, layout.holes
        if holes is not None:
            q, k, v = _reorder(q, holes.rows), _reorder(k, holes.keys), _reorder(v, holes.keys)
        if first.shape[0] != batch:  # a mask of one row serves the whole batch
            first, end, rows = (x.expand(batch).contiguous() for x in (first, end, rows))
    out = rectangular_attention(q, k, v, causal, window, rows, first, end, softmax_scale=scaling, softcap=softcap)
    return out if holes is None else _reorder(out, holes.rows_back)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """(B, T, H, D) with the rows of each sample in ``order`` (int64 (B, T), or (1, T) for all samples)."""
    # not take_along_dim: its broadcasting fixes the sizes of a compiled graph
    return x.gather(1, order[:, :, None, None].expand(x.shape[0], -1, *x.shape[2:]))


def register() -> None:
    """Register attention and mask under :data:`NAME`; harmless when repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, grit_attention)
    AttentionMaskInterface.register(NAME, grit_mask)
