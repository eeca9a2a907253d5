"""The two functions that transformers calls: attention and mask, registered together under the name ``"grit"``.

transformers hands an attention function the states of one layer and whatever the mask function returned. Our mask function
builds nothing dense: it returns None when there is no padding, else an int32 tensor (B, 1, 1, K) that holds, per key slot,
its distance to the first query slot, or ``NO_KEY`` where the slot holds no key. (It is 4-D because transformers passes 4-D
masks through untouched, which static caches rely on.) What a packed pass needs instead travels as one
:class:`AttentionPass` through the model's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import key_rows, prepared_attention, rectangular_problem
from grit_kernels.attention.checks import check_qkv, check_softmax_options
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.checks import described, may_read_back
from grit_kernels.context import SampleTable
from grit_kernels.packing import SamplePack
from grit_kernels.visibility import UNLIMITED, window_bounds

NAME = "grit"
NO_KEY = 2**30

BIDIRECTIONAL_WINDOWS = ("transformers", "full")
"""Visible keys of a bidirectional sample under ``sliding_window=W``: ``|i - j| <= W`` as transformers, or all."""


HARMLESS_TO_ATTENTION = frozenset(
    (
        *("output_hidden_states", "output_router_logits", "num_items_in_batch", "return_dict", "use_cache"),
        *("cache_position", "position_embeddings", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    )
)
"""Keywords that layers hand to every attention function and that do not change what a token sees."""

HARMLESS_TO_MASKS = frozenset(
    ("allow_is_causal_skip", "allow_is_bidirectional_skip", "allow_torch_fix", "dtype", "config", "local_size")
)
"""Keywords of a mask function that say how to build a dense mask, which ours does not."""

KNOWN_MASKS = frozenset(
    (
        *("causal_mask_function", "bidirectional_mask_function", "and_masks", "sliding_window_overlay"),
        *("sliding_window_bidirectional_overlay", "padding_mask_function"),
        *("packed_sequence_mask_function", "remap_positions_for_packed_sequence"),
    )
)
"""What a mask may be made of to be ours: causal or bidirectional, a window, padding, samples that positions tell apart."""


MOST_PREPARED = 32
"""Problems that a pass keeps; a model has as many kinds of attention layers as it has windows."""


@dataclass(frozen=True)
class PackedKeys:
    """The keys of a packed pass that continues its samples (packed_cache.py); arguments of :class:`PackedCache`."""

    lengths: Tensor
    longest: int
    positions: Tensor
    hi: Tensor | None


@dataclass(frozen=True)
class KeyRows:
    """Attached to the keys that a layer of a :class:`PackedCache` hands out: the memory (rows, kv_heads, D), the first row of
    each sample's keys, int32 (B), and the size of the layer's values, which may be less than D."""

    keys: Tensor
    values: Tensor
    starts: Tensor
    value_size: int


@dataclass
class AttentionPass:
    """What all layers of one forward pass share: the flags, and for a packed pass the pack.

    ``prepared`` keeps what the layers would otherwise compute over and over: the problem of each kind of layer (alternating
    layers have two), and beside it what the kernels plan for it. ``witness`` notes that attention was called. Both are dicts, so
    that copies of a pass share them. ``places``: where recurrent layers (recurrent.py) want each token of the pack. ``keys``: of
    a packed pass whose samples have more keys than its own tokens.
    """

    causal: Tensor
    bidirectional_window: str = "transformers"
    pack: SamplePack | None = None
    deterministic: bool = True
    places: Tensor | None = None
    keys: PackedKeys | None = None
    prepared: dict[Any, tuple[AttentionProblem, dict[Any, Tensor], Any]] = field(default_factory=dict)
    witness: dict[str, bool] = field(default_factory=dict)

    def prepare(
        self, key: Any, make: Callable[[], AttentionProblem], alive: Any = None
    ) -> tuple[AttentionProblem, dict[Any, Tensor] | None]:
        """The problem of ``key`` and its plans, made by ``make`` for the first layer. ``alive``: what ``key`` is an id of."""
        if torch.compiler.is_compiling():
            return make(), None  # sizes in a key would fix them in the graph
        if key not in self.prepared:
            if len(self.prepared) >= MOST_PREPARED:  # of a pass kept on a tensor that its owner uses for many calls
                self.prepared.clear()
            self.prepared[key] = (make(), {}, alive)
        return self.prepared[key][:2]

    def window_bounds(self, sliding_window: int | None, longest_q: int, longest_k: int) -> tuple[Tensor, Tensor]:
        """``left`` and ``right`` (int32 (B)) of the samples."""
        window = window_sizes(self.causal, sliding_window, self.bidirectional_window)
        return window_bounds(self.causal, window, longest_q, longest_k)

    def upper_bounds(self, sliding_window: int | None) -> Tensor | None:
        """The pack's ``hi`` (int32 (tokens)) as a layer with this window sees it: no token looks further ahead than a
        bidirectional one does."""
        assert self.pack is not None
        hi = self.pack.hi if self.keys is None else self.keys.hi
        if hi is None or sliding_window is None or self.bidirectional_window == "full":
            return hi
        positions = self.pack.position_ids if self.keys is None else self.keys.positions
        return torch.minimum(hi, positions.to(torch.int32) + (sliding_window + 1))


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
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """See the top of the file. Arguments as transformers passes them to a mask function.

    Raises:
        ValueError: the mask is made of parts that are not causality, a window or padding.
        TypeError: a keyword that is not known to be harmless.
    """
    _refuse_unknown("mask function", others, HARMLESS_TO_MASKS)
    if use_vmap:
        raise ValueError(
            "mask_function: expected causality, a window and padding, got a mask of the model's own beside them"
        )
    if mask_function is not None and not torch.compiler.is_compiling():
        for part in _parts(mask_function):
            if part not in KNOWN_MASKS:
                raise ValueError(f"mask_function: expected a mask made of {', '.join(sorted(KNOWN_MASKS))}, got {part}")
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


def _refuse_unknown(where: str, others: dict[str, Any], harmless: frozenset[str]) -> None:
    for name, value in others.items():
        if value is not None and name not in harmless:
            given = described(value) if isinstance(value, Tensor) else repr(value)[:80]
            raise TypeError(
                f"{name}: expected no such argument of the {where}, which would ignore it: this model asks for something that "
                f"{NAME!r} does not compute; got {given}"
            )


def _parts(function: Callable[..., Any]) -> Iterator[str]:
    """Names of the functions that a transformers mask function was put together from."""
    yield function.__qualname__.split(".")[0]
    for cell in getattr(function, "__closure__", None) or ():
        content = cell.cell_contents
        for inner in content if isinstance(content, tuple) else (content,):
            if callable(inner) and hasattr(inner, "__qualname__"):
                yield from _parts(inner)


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
    # where nothing may be read back, everything is always moved
    if not may_read_back(distance) or bool((last - first + 1 > count).any()):
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


def _samples_of_rows(
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    relative: Tensor | None,
    causal: bool,
    batch: int,
    length: int,
) -> AttentionPass | None:
    """The pass of rows that hold several samples, in a model that runs this implementation without patch(); else None.

    transformers marks such samples by a table or by positions that start over (see :meth:`SamplePack.from_position_ids`).
    Found once per pass and kept on the tensor that all layers share; its owner may change it, or use it with another mask.
    """
    marker = position_ids if cu_seq_lens_q is None else cu_seq_lens_q
    if marker is None:
        return None
    if torch.compiler.is_compiling():
        if cu_seq_lens_q is not None:
            raise ValueError("cu_seq_lens_q: a compiled model needs grit_kernels.patch(model) and a sample_pack")
        return None
    version = None if marker.is_inference() else marker._version
    kept: tuple[Any, dict[Any, tuple[AttentionPass | None, Tensor | None]]]
    kept = getattr(marker, "_grit_passes", (version, {}))
    written, passes = kept
    if written != version or len(passes) >= MOST_PREPARED:
        passes = {}
    key = (causal, batch, length, id(relative))
    if key in passes:
        return passes[key][0]
    found: AttentionPass | None
    if cu_seq_lens_q is not None:
        pack = SamplePack.from_lengths(cu_seq_lens_q.to("cpu").diff(), causal, device=cu_seq_lens_q.device)
        found = AttentionPass(pack.causal, pack=pack)
    else:
        positions = marker.expand(batch, length)
        if relative is None:
            pack = SamplePack.from_position_ids(positions, causal)
        else:
            real = (relative[:, 0, 0] < NO_KEY).expand(batch, length)
            pack = SamplePack.from_mask(real, causal, position_ids=positions)
        found = AttentionPass(pack.causal, pack=pack) if len(pack) > batch else None
    passes[key] = (found, relative)  # which lives as long as its id is in a key
    marker._grit_passes = (version, passes)  # type: ignore[attr-defined]
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
    output_attentions: bool | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' AttentionInterface.

    query (B, H, Q, D), key (B, Hkv, K, D), value (B, Hkv, K, Dv) -> ((B, Q, H, Dv), None); a packed pass has B = 1.
    ``s_aux`` (H): attention sinks, a score per head without a value (see :func:`grit_kernels.attention.prepared_attention`).

    Raises:
        TypeError: a keyword that would change the result and is not understood.
    """
    _refuse_unknown("attention function", others, HARMLESS_TO_ATTENTION)
    if output_attentions:
        raise ValueError("output_attentions: expected False, got True: the kernels keep no attention weights")
    if dropout:
        raise ValueError(f"attention_dropout: expected 0: these kernels have no dropout, got {dropout}")
    cap = softcap or 0.0
    batch, _, q_length, _ = query.shape
    size = value.shape[-1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if grit_pass is not None and grit_pass.keys is not None:
        return _attention_over_rows(query, key, grit_pass, sliding_window, scaling, cap, s_aux), None
    query, key, value = _with_served_size(query, key, value)
    flag = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if grit_pass is None and key.shape[2] == q_length:
        grit_pass = _samples_of_rows(position_ids, cu_seq_lens_q, attention_mask, flag, batch, q_length)
    elif grit_pass is not None and not torch.compiler.is_compiling():
        grit_pass.witness["called"] = True  # which no graph may do inside a layer that is recomputed
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, T, H, D]
    if grit_pass is None:
        grit_pass = _pass_of_rows(flag, batch, query.device, attention_mask, position_ids)
    if grit_pass.pack is None:
        return _narrowed(
            _padded_attention(q, k, v, attention_mask, grit_pass, sliding_window, scaling, cap, s_aux), size
        ), None
    options = check_softmax_options(scaling, cap, query.shape[-1])
    pack, packed = grit_pass.pack, grit_pass.pack.tokens == batch * q_length
    if k.shape[1] != q_length:
        raise ValueError(f"key: expected the {q_length} tokens of the pack, got {k.shape[1]} rows, as from a cache")
    q, k, v = (x.flatten(0, 1) if packed else pack.pack(x) for x in (q, k, v))  # [tokens, H, D]
    attend = _attention_of_pack if pack.contexts is None else _attention_with_contexts
    out = attend(q, k, v, pack, grit_pass, sliding_window, options, s_aux)
    out = out.unflatten(0, (batch, q_length)) if packed else pack.unpack(out)
    return _narrowed(out, size), None


def _attention_of_pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: SamplePack,
    grit_pass: AttentionPass,
    sliding_window: int | None,
    options: tuple[float, float],
    sinks: Tensor | None,
) -> Tensor:
    """(tokens, H, D): samples that see themselves."""

    def problem() -> AttentionProblem:
        ranges, longest = (pack.starts, pack.lengths, pack.starts, pack.lengths), pack.max_seqlen
        bounds = grit_pass.window_bounds(sliding_window, longest, longest)
        hi = grit_pass.upper_bounds(sliding_window)
        return AttentionProblem(*ranges, *bounds, hi, 0, 0, longest, longest, *options)

    prepared = grit_pass.prepare((sliding_window, *options), problem)
    return prepared_attention(q, k, v, *prepared, sinks, grit_pass.deterministic)


def _attention_with_contexts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: SamplePack,
    grit_pass: AttentionPass,
    sliding_window: int | None,
    options: tuple[float, float],
    sinks: Tensor | None,
) -> Tensor:
    """(tokens, H, D) of a pack with contexts: one call for the samples without one, one for the others (context.py)."""
    contexts = pack.contexts
    assert contexts is not None

    def attend(table: SampleTable, name: str) -> Tensor:
        def problem() -> AttentionProblem:
            causal = grit_pass.causal[table.samples]
            window = window_sizes(causal, sliding_window, grit_pass.bidirectional_window)
            bounds = window_bounds(causal, window, table.max_q, table.max_k)
            ranges = (table.q_start, table.q_len, table.k_start, table.k_len)
            return AttentionProblem(*ranges, *bounds, None, 0, 0, table.max_q, table.max_k, *options)

        prepared = grit_pass.prepare((name, sliding_window, *options), problem)
        states = (q[table.rows], k[table.keys], v[table.keys])
        return prepared_attention(*states, *prepared, sinks, grit_pass.deterministic)

    return torch.cat([attend(contexts.alone, "alone"), attend(contexts.after, "after")])[contexts.back]


def _attention_over_rows(
    query: Tensor,
    key: Tensor,
    grit_pass: AttentionPass,
    sliding_window: int | None,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """(1, H, tokens, D) queries of a packed pass over the memory of a PackedCache -> (1, tokens, H, Dv)."""
    rows: KeyRows | None = getattr(key, "_grit_rows", None)
    pack, held = grit_pass.pack, grit_pass.keys
    if rows is None:
        raise RuntimeError(
            "key: expected the keys that a PackedCache returned, got others: this layer attends to something else, or changes "
            "keys after it has stored them"
        )
    assert pack is not None and held is not None
    grit_pass.witness["called"] = True
    q = query[0].transpose(0, 1)  # [tokens, H, D]
    q = torch.nn.functional.pad(q, (0, rows.keys.shape[-1] - q.shape[-1]))
    options = check_softmax_options(scaling, softcap, q.shape[-1])

    def problem() -> AttentionProblem:
        ranges = (pack.starts, pack.lengths, rows.starts, held.lengths)
        bounds = grit_pass.window_bounds(sliding_window, pack.max_seqlen, held.longest)
        hi = grit_pass.upper_bounds(sliding_window)
        return AttentionProblem(*ranges, *bounds, hi, 0, 0, pack.max_seqlen, held.longest, *options)

    # layers of a kind differ in where their keys lie, which no plan depends on
    shared, plans = grit_pass.prepare((sliding_window, *options), problem)
    here = replace(shared, k_start=rows.starts)
    out = prepared_attention(q, rows.keys, rows.values, here, plans, sinks, grit_pass.deterministic)
    return _narrowed(out[None], rows.value_size)


def _pass_of_rows(
    causal: bool, batch: int, device: torch.device, relative: Tensor | None, position_ids: Tensor | None
) -> AttentionPass:
    """The pass of padded rows in a model that runs this implementation without patch().

    Kept on a tensor that all layers share, if there is one.
    """
    marker = relative if relative is not None else position_ids
    if marker is None or torch.compiler.is_compiling():
        return AttentionPass(torch.full((batch,), causal, dtype=torch.bool, device=device))
    passes: dict[Any, AttentionPass] = getattr(marker, "_grit_padded", {})
    key = (causal, batch, device)
    if key not in passes:
        passes[key] = AttentionPass(torch.full((batch,), causal, dtype=torch.bool, device=device))
        marker._grit_padded = passes  # type: ignore[attr-defined]
    return passes[key]


SERVED_SIZE = 32
"""Least head dimension of the kernels; they also want a multiple of 8, and keys and values of one size."""


def served_size(*sizes: int) -> int:
    """The head dimension in which the kernels serve keys and values of these sizes."""
    return (max(*sizes, SERVED_SIZE) + 7) // 8 * 8


def _with_served_size(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states with zeros behind their last dimension where the kernels want a larger one: no score and no sum changes."""
    size = served_size(query.shape[-1], value.shape[-1])
    if query.shape[-1] == size and value.shape[-1] == size:
        return query, key, value
    a, b, c = (torch.nn.functional.pad(x, (0, size - x.shape[-1])) for x in (query, key, value))
    return a, b, c


def _narrowed(out: Tensor, size: int) -> Tensor:
    """Undoes :func:`_with_served_size`; contiguous, because layers view the result in another shape."""
    return out if out.shape[-1] == size else out[..., :size].contiguous()


def _padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor | None,
    grit_pass: AttentionPass,
    sliding_window: int | None,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """(B, Q, H, D) queries that are the last slots of (B, K, Hkv, D) keys; padding and caches of any kind."""
    batch, q_length = q.shape[:2]
    slots = k.shape[1]
    if relative is not None and (relative.dtype != torch.int32 or relative.shape[2] != 1):
        raise ValueError(
            f"attention_mask: expected a 2-D padding mask, got {described(relative)}; which keys a sample sees is "
            "said by is_causal, or by a sample_pack with hi"
        )
    layout = None if relative is None else _key_layout(relative, q_length)
    holes = None if layout is None else layout.holes
    if holes is not None:
        q, k, v = _reorder(q, holes.rows), _reorder(k, holes.keys), _reorder(v, holes.keys)
    q, k, v = check_qkv(q, k, v, ndim=4)
    keys, values, step = key_rows(q, k, v)

    def problem() -> AttentionProblem:
        if layout is None:
            first = torch.zeros(batch, dtype=torch.int32, device=q.device)
            lengths = (torch.full_like(first, q_length), first, torch.full_like(first, slots))
        else:  # a mask of one row serves the whole batch
            rows, first, end = (x.expand(batch).contiguous() for x in (layout.rows, layout.first, layout.end))
            lengths = (rows, first, end)
        bounds = grit_pass.window_bounds(sliding_window, q_length, slots)
        return rectangular_problem(
            q, k, step, lengths, bounds, None, check_softmax_options(scaling, softcap, q.shape[-1])
        )

    key = (sliding_window, scaling, softcap, batch, q_length, slots, step, id(layout))
    prepared = grit_pass.prepare(key, problem, layout)
    out = prepared_attention(q.flatten(0, 1), keys, values, *prepared, sinks, grit_pass.deterministic).view(q.shape)
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
