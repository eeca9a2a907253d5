"""The two functions that transformers calls: attention and mask, registered together under the name ``"grit"``.

transformers hands an attention function the states of one layer and whatever the mask function returned. Our mask function
builds nothing dense: it returns None when there is no padding, else an int32 tensor (B, 1, 1, K) that holds, per key slot,
its distance to the first query slot, or ``NO_KEY`` where the slot holds no key. (It is 4-D because transformers passes 4-D
masks through untouched, which static caches rely on.) What a packed pass needs instead travels as one
:class:`AttentionPass` through the model's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grit_kernels.attention import decode_attention, has_decode_kernel, prepared_attention
from grit_kernels.attention.checks import check_softmax_options
from grit_kernels.attention.problem import AttentionProblem
from grit_kernels.checks import described
from grit_kernels.context import SampleTable
from grit_kernels.hf.attention_pass import MOST_PREPARED, AttentionPass, KeyRows
from grit_kernels.hf.padded_attention import NO_KEY, padded_attention
from grit_kernels.packing import SamplePack

NAME = "grit"

HARMLESS_TO_ATTENTION = frozenset(
    (
        *("output_hidden_states", "output_router_logits", "num_items_in_batch", "return_dict", "use_cache"),
        *("cache_position", "position_embeddings"),
    )
)
"""Keywords that layers hand to every attention function and that do not change what a token sees."""

BESIDE_MARKERS = ("seq_idx", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keywords that say again what positions or ``cu_seq_lens_q`` say of the samples in a row."""

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


def _samples_of_rows(
    layer: int | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    relative: Tensor | None,
    causal: bool,
    batch: int,
    length: int,
    beside: dict[str, Any],
) -> AttentionPass | None:
    """The pass of rows that hold several samples, in a model that runs this implementation without patch(); else None.

    transformers marks such samples by a table or by positions that start over (see :meth:`SamplePack.from_position_ids`).
    Found once per pass and kept on the tensor that all layers share; its owner may change it, or use it with another mask.
    ``layer``: number of the layer that asks. ``beside``: those of :data:`BESIDE_MARKERS` that are given.
    """
    marker = position_ids if cu_seq_lens_q is None else cu_seq_lens_q
    numbers, table = beside.get("seq_idx"), [name for name in BESIDE_MARKERS[1:] if name in beside]
    if cu_seq_lens_q is None and table:
        raise ValueError(f"cu_seq_lens_q: expected it with {table[0]}, got none")
    if torch.compiler.is_compiling():
        if cu_seq_lens_q is not None or numbers is not None:
            name = "seq_idx" if cu_seq_lens_q is None else "cu_seq_lens_q"
            raise ValueError(f"{name}: a compiled model needs grit_kernels.patch(model) and a sample_pack")
        if marker is not None and marker.ndim == 2 and length > 1 and not layer:  # of the first layer, for all
            _assert_one_sample_per_row(marker, relative)
        return None
    if marker is None:
        if numbers is not None:
            raise ValueError(
                "seq_idx: expected it with position_ids, got none; with grit_kernels.patch(model) it may be alone"
            )
        return None
    kept: tuple[int | None, dict[Any, tuple[AttentionPass | None, Any]]]
    kept = getattr(marker, "_grit_passes", (None, {}))
    noted, passes = kept
    if (
        marker.is_inference()
    ):  # counts no versions, and comparing would be a read per layer: look again where layers begin anew
        state, unchanged = layer, noted is not None and layer is not None and noted < layer
    else:
        state, unchanged = marker._version, noted == marker._version
    if not unchanged or len(passes) >= MOST_PREPARED:
        passes = {}
    marker._grit_passes = (state, passes)  # type: ignore[attr-defined]
    others = (relative, numbers, beside.get("cu_seq_lens_k"))
    key = (causal, batch, length, *map(id, others))
    if key in passes:
        return passes[key][0]
    found: AttentionPass | None
    if cu_seq_lens_q is not None:
        if relative is not None and bool((relative >= NO_KEY).any()):
            raise ValueError(
                "attention_mask: expected none with cu_seq_lens_q, whose samples have no padding, got some"
            )
        lengths = cu_seq_lens_q.to("cpu").diff()
        if others[2] is not None and not torch.equal(others[2].to("cpu").diff(), lengths):
            raise ValueError("cu_seq_lens_k: expected the same samples as cu_seq_lens_q, got others")
        pack = SamplePack.from_lengths(lengths, causal, device=cu_seq_lens_q.device)
        found = AttentionPass(pack.causal, pack=pack)
    else:
        positions = marker.expand(batch, length)
        if relative is None:
            pack = SamplePack.from_position_ids(positions, causal)
        else:
            real = (relative[:, 0, 0] < NO_KEY).expand(batch, length)
            pack = SamplePack.from_mask(real, causal, position_ids=positions)
        found = AttentionPass(pack.causal, pack=pack) if len(pack) > batch else None
    if numbers is not None:
        _check_numbers(numbers.expand(batch, length), pack)
    passes[key] = (found, others)  # which live as long as their ids are in a key
    return found


def _check_numbers(numbers: Tensor, pack: SamplePack) -> None:
    """ValueError if ``seq_idx`` (B, T) changes within a sample of the pack."""
    rows = torch.arange(numbers.shape[0], device=numbers.device)[:, None]
    own = (numbers + rows * (numbers.max() + 1)).flatten()  # another row has other numbers
    own = own if pack.indices is None else own[pack.indices]
    changes = (own.diff() != 0).nonzero()[:, 0] + 1
    if not bool(torch.isin(changes.to("cpu"), pack.cu_seqlens.to("cpu")).all()):
        raise ValueError(
            "seq_idx: expected the samples of position_ids or cu_seq_lens_q, got others; grit_kernels.patch(model) takes it alone"
        )


def _assert_one_sample_per_row(positions: Tensor, relative: Tensor | None) -> None:
    """For a compiled pass without patch(), which cannot read values: an assertion inside the graph."""
    follows = positions.diff(dim=1) == 1
    if relative is not None:
        real = relative[:, 0, 0] < NO_KEY
        follows = follows | ~real[:, 1:] | ~real[:, :-1]
    torch._assert_async(
        follows.all(),
        "position_ids: a compiled pass cannot distinguish samples by positions that restart; use grit_kernels.patch(model) and "
        "pass a sample_pack",
    )


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
    ``s_aux`` (H): attention sinks, a score per head without a value (see :func:`grit_kernels.switch_attention`).

    Raises:
        TypeError: a keyword that would change the result and is not understood.
    """
    beside = {name: others.pop(name) for name in BESIDE_MARKERS if others.get(name) is not None}
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
        return _attention_over_rows(query, key, value, grit_pass, sliding_window, scaling, cap, s_aux), None
    query, key, value = _with_served_size(query, key, value)
    flag = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if attention_mask is not None and (grit_pass is None or grit_pass.pack is None):
        _check_relative(attention_mask)
    if grit_pass is None and key.shape[2] == q_length:
        layer = getattr(module, "layer_idx", None)
        grit_pass = _samples_of_rows(layer, position_ids, cu_seq_lens_q, attention_mask, flag, batch, q_length, beside)
    elif grit_pass is None and (cu_seq_lens_q is not None or beside):
        name = next(iter(beside)) if cu_seq_lens_q is None else "cu_seq_lens_q"
        raise ValueError(f"{name}: expected none with a cache, which holds one sample per row, got it")
    elif grit_pass is not None and not torch.compiler.is_compiling():
        grit_pass.witness["called"] = True  # which no graph may do inside a layer that is recomputed
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, T, H, D]
    if grit_pass is None:
        grit_pass = _pass_of_rows(flag, batch, query.device, attention_mask, position_ids)
    if grit_pass.pack is None:
        return _narrowed(
            padded_attention(q, k, v, attention_mask, grit_pass, sliding_window, scaling, cap, s_aux), size
        ), None
    options = check_softmax_options(scaling, cap, query.shape[-1])
    pack, packed = grit_pass.pack, grit_pass.pack.tokens == batch * q_length
    if k.shape[1] != q_length:
        raise ValueError(f"key: expected the {q_length} tokens of the pack, got {k.shape[1]} rows, as from a cache")
    q, k, v = (x.flatten(0, 1) if packed else pack.pack(x) for x in (q, k, v))  # [tokens, H, D]
    out = _attention_of_pack(q, k, v, pack, grit_pass, sliding_window, options, s_aux)
    out = out.unflatten(0, (batch, q_length)) if packed else pack.unpack(out)
    return _narrowed(out, size), None


def _check_relative(relative: Tensor) -> None:
    """ValueError unless this is what the mask function makes."""
    if relative.dtype != torch.int32 or relative.ndim != 4 or relative.shape[2] != 1:
        raise ValueError(
            f"attention_mask: expected a 2-D padding mask, got {described(relative)}; which keys a sample sees is "
            "said by is_causal, or by a sample_pack with hi"
        )


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
    """(tokens, H, D). With contexts: one call for the samples without one, and one for the others (context.py)."""

    def attend(table: SampleTable | None, kind: str) -> Tensor:
        def problem() -> AttentionProblem:
            return grit_pass.problem_of_pack(table, sliding_window, options)

        states = (q, k, v) if table is None else (q[table.rows], k[table.keys], v[table.keys])
        prepared = grit_pass.prepare((kind, sliding_window, *options), problem)
        return prepared_attention(*states, *prepared, sinks, grit_pass.deterministic)

    if (contexts := pack.contexts) is None:
        return attend(None, "")
    return torch.cat([attend(contexts.alone, "alone"), attend(contexts.after, "after")])[contexts.back]


def _attention_over_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grit_pass: AttentionPass,
    sliding_window: int | None,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """(1, H, tokens, D) queries of a packed pass over the memory of a PackedCache -> (1, tokens, H, Dv)."""
    rows: KeyRows | None = getattr(key, "_grit_rows", None)
    of_values: KeyRows | None = getattr(value, "_grit_rows", None)
    pack, held = grit_pass.pack, grit_pass.keys
    if rows is None or of_values is not rows:
        raise RuntimeError(
            f"{'key' if rows is None else 'value'}: expected what a PackedCache returned, got something else: this layer attends "
            "to other states, or changes them after it has stored them"
        )
    assert pack is not None and held is not None
    grit_pass.witness["called"] = True
    q = query[0].transpose(0, 1)  # [tokens, H, D]
    if missing := rows.keys.shape[-1] - q.shape[-1]:  # padding by nothing would be a copy
        q = torch.nn.functional.pad(q, (0, missing))
    options = check_softmax_options(scaling, softcap, q.shape[-1])

    def problem() -> AttentionProblem:
        ranges = (pack.starts, pack.lengths, rows.starts, held.lengths)
        bounds = grit_pass.window_bounds(sliding_window, pack.max_seqlen, held.longest)
        hi = grit_pass.upper_bounds(sliding_window)
        return AttentionProblem(*ranges, *bounds, hi, 0, 0, pack.max_seqlen, held.longest, *options)

    # layers of a kind differ in where their keys lie, which no plan depends on
    shared, plans = grit_pass.prepare((sliding_window, *options), problem)
    here = replace(shared, k_start=rows.starts)
    if pack.max_seqlen == 1 and has_decode_kernel(q, rows.keys, rows.values, sinks):
        out = decode_attention(q, rows.keys, rows.values, here, sinks=sinks)
        return _narrowed(out[None], rows.value_size)
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


def register() -> None:
    """Register attention and mask under :data:`NAME`; harmless when repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, grit_attention)
    AttentionMaskInterface.register(NAME, grit_mask)
