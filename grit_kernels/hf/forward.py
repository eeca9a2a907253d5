"""The ``forward`` of a patched decoder: binds a call to the class's own signature, then takes the packed or the padded path.

Any argument that is neither supported nor known to be without effect is an error: silently dropping a keyword gives a wrong
answer.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grit_kernels.checks import described, neither_0_nor_1
from grit_kernels.hf import compat, compiled_layers, gptj, recurrent, rope
from grit_kernels.hf.attention_pass import AttentionPass, PackedKeys
from grit_kernels.packing import SamplePack

UNDERSTOOD = (
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "is_causal", "sample_pack"),
    *("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
HARMLESS = ("output_hidden_states", "output_router_logits", "num_items_in_batch", "return_dict", "cache_position")
"""Keywords that change neither what a token sees nor how many rows a tensor has; passed to the class's own forward."""

# transformers passes a 4-D mask through untouched. A packed pass needs none, and this one has a shape that any other
# attention, if called by mistake, cannot add to its scores
_NO_MASK_SHAPE = (1, 1, 0, 0)


@dataclass(frozen=True)
class PatchRecord:
    """What a patched decoder's ``forward`` needs to know: the options of patch(), and facts about the class determined once.

    It is bound to the forward, so a call keeps the record it started with, and copies of the model include it.
    """

    attn_implementation: str
    bidirectional_window: str
    packing: bool
    fuse: bool
    """Fused ops replace norms, gated MLPs and rotary embeddings (fuse.py)."""
    deterministic: bool
    names: tuple[str, ...]
    """Arguments of the class's forward, in order."""
    cache_name: str
    own_attention: bool
    """Attention is the model's own method (gptj.py), not transformers' AttentionInterface."""
    has_head: bool
    """The model generates: calls are causal unless they say otherwise, whatever the config says."""
    rope_by_length: bool
    """The rotary frequencies depend on the length of the text (rope.py)."""
    recurrent: bool
    """Some layers carry a state from token to token (recurrent.py)."""


# ---- calls that run while another thread patches or unpatches


class _Gate:
    """Running calls of one decoder, by thread."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.running: dict[int, int] = {}


_gates: weakref.WeakKeyDictionary[nn.Module, _Gate] = weakref.WeakKeyDictionary()
_gates_lock = threading.Lock()


def _gate(decoder: nn.Module) -> _Gate:
    with _gates_lock:
        return _gates.setdefault(decoder, _Gate())


@contextlib.contextmanager
def exclusive(decoder: nn.Module) -> Iterator[None]:
    """Wait until no other thread runs ``decoder``; calls that begin inside the block wait until it ends."""
    gate = _gate(decoder)
    with gate.condition:
        if threading.get_ident() in gate.running:
            raise RuntimeError("model: expected a model at rest, got one inside its own forward pass")
        gate.condition.wait_for(lambda: not gate.running)
        yield


def forward(decoder: Any, record: PatchRecord, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of a patched decoder. See :func:`grit_kernels.patch` for the arguments in addition to the class's own."""
    if torch.compiler.is_compiling():
        return _forward(decoder, record, args, kwargs)
    gate, thread = _gate(decoder), threading.get_ident()
    with gate.condition:
        stale = decoder.__dict__.get("_grit_patch") is None
        if not stale:
            gate.running[thread] = gate.running.get(thread, 0) + 1
    if stale:  # unpatched by another thread since this call was looked up
        return decoder.forward(*args, **kwargs)
    try:
        return _forward(decoder, record, args, kwargs)
    finally:
        with gate.condition:
            gate.running[thread] -= 1
            if not gate.running[thread]:
                del gate.running[thread]
                gate.condition.notify_all()


# ---- one call


def bind(record: PatchRecord, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, except those that are None; unknown ones are an error."""
    if len(args) > len(record.names):
        raise TypeError(f"forward: expected at most {len(record.names)} arguments without names, got {len(args)}")
    bound: dict[str, Any] = {}
    for name, value in zip(record.names, args, strict=False):
        if name in kwargs:
            raise TypeError(f"{name}: expected once, got it both by position and by name")
        bound[name] = value
    bound.update(kwargs)
    bound.update(gptj.left_by_the_head(bound) if record.own_attention else {})
    bound = {name: value for name, value in bound.items() if value is not None}
    # from a head that takes these rows anyway, so that layers may leave out the others
    bound.pop("logits_to_keep", None)
    if bound.pop("output_attentions", False):
        raise ValueError("output_attentions: expected False, got True: the kernels do not keep attention weights")
    for name, value in bound.items():
        if name not in UNDERSTOOD and name not in HARMLESS and name not in compat.CACHE_NAMES:
            raise TypeError(
                f"{name}: expected one of the keywords that a patched decoder understands "
                f"({', '.join((*UNDERSTOOD, *HARMLESS, *compat.CACHE_NAMES))}), got {name}={_short(value)}"
            )
    return bound


def _short(value: Any) -> str:
    return described(value) if isinstance(value, Tensor) else repr(value)[:80]


def _forward(decoder: Any, record: PatchRecord, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bound = bind(record, args, kwargs)
    input_ids, inputs_embeds = bound.pop("input_ids", None), bound.pop("inputs_embeds", None)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            f"input_ids, inputs_embeds: expected exactly one of them, got {'neither' if input_ids is None else 'both'}"
        )
    name, inputs = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    batch, length = inputs.shape[:2]
    cache, use_cache = compat.take_cache(bound), bool(bound.pop("use_cache", False))
    caching = cache is not None or use_cache
    packed_keys: PackedKeys | None = getattr(cache, "packed_keys", None)
    if record.recurrent and cache is not None:
        recurrent.check_cache(cache)
    mask, positions = bound.pop("attention_mask", None), bound.pop("position_ids", None)
    # transformers' own masks, one for each kind of layer
    by_kind = isinstance(mask, dict) and getattr(decoder.config, "layer_types", None)
    if mask is not None and not by_kind and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor {(batch, length)}, got {type(mask).__name__}")
    is_causal, sample_pack = bound.pop("is_causal", None), bound.pop("sample_pack", None)
    if bound.get("output_router_logits") and isinstance(mask, Tensor) and not torch.compiler.is_compiling():
        _check_zeros_and_ones(
            mask,
            "with output_router_logits, whose loss weights the tokens by the mask",
            "; mark the samples of a row by position_ids or seq_idx",
        )
    numbers = bound.pop("seq_idx", None)
    if numbers is not None and (tuple(numbers.shape) != (batch, length) or numbers.is_floating_point()):
        raise ValueError(f"seq_idx: expected integers {(batch, length)}, one per token, got {described(numbers)}")
    table = {key: bound.pop(key, None) for key in UNDERSTOOD[-4:]}
    if positions is not None and positions.ndim == 1:
        positions = positions[None]
    call = _Call(decoder, record, name, bound)
    compiling = torch.compiler.is_compiling()

    # a checkpoint saved as an embedder still generates causally; without a head or a cache it does not generate
    default = record.has_head or caching or bool(getattr(decoder.config, "is_causal", True))
    if table["cu_seq_lens_q"] is None and (given := [key for key, value in table.items() if value is not None]):
        raise ValueError(f"cu_seq_lens_q: expected it with {given[0]}, got none")
    if table["cu_seq_lens_q"] is not None and sample_pack is None:
        sample_pack = _pack_of_table(table, default if is_causal is None else is_causal, inputs.device)
        is_causal = None
    elif table["cu_seq_lens_q"] is not None:
        _check_table_of_pack(table, sample_pack)
    if sample_pack is not None:
        if batch != 1 or sample_pack.tokens != length:
            raise ValueError(
                f"{name}: expected (1, {sample_pack.tokens}) as the sample_pack, got shape {(batch, length)}"
            )
        if sample_pack.device != inputs.device:
            raise ValueError(
                f"sample_pack: expected one on {inputs.device} as {name}, got one on {sample_pack.device}; "
                f"use sample_pack.to({str(inputs.device)!r})"
            )
        if is_causal is not None:
            raise ValueError("is_causal: expected none with a sample_pack, which has its own flags")
        if mask is not None:
            _check_mask_of_pack(mask, length, sample_pack)
        if caching and packed_keys is None:
            raise ValueError("cache, use_cache: expected none or a PackedCache: packed input fills no other cache")
        if numbers is not None and not compiling:
            _check_numbers("seq_idx", numbers, sample_pack)
        if positions is None:
            positions = (sample_pack.position_ids if packed_keys is None else packed_keys.positions)[None]
        if packed_keys is not None:
            _check_packed_keys(packed_keys, sample_pack)
        return call.packed(inputs, sample_pack, positions, cache)

    if packed_keys is not None:
        raise ValueError("sample_pack: expected one with a PackedCache, got none")
    if numbers is not None and caching:
        _refuse_several_numbers(numbers)  # one sample per row is what a cache holds anyway
    elif numbers is not None:  # as a mask that numbers the samples, from 1
        if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, length)):
            raise ValueError(f"attention_mask: expected none or {(batch, length)} with seq_idx, got {described(mask)}")
        if mask is not None and not compiling:
            _check_zeros_and_ones(mask, "beside seq_idx, which numbers the samples")
        mask = numbers + 1 if mask is None else (numbers + 1) * (mask != 0)
    causal = _flags(default if is_causal is None else is_causal, batch, inputs.device)
    if length and not caching:
        pack = _pack_of_rows(record, inputs, mask, positions, causal)
        if pack is not None:
            slots = torch.arange(length, device=inputs.device)[None] if positions is None else positions
            packed_positions = pack.pack(slots.expand(batch, length))[None]
            if positions is None and record.rope_by_length:
                packed_positions = rope.from_first_token(packed_positions, pack)
            outputs = call.packed(pack.pack(inputs)[None], pack, packed_positions)
            return _unpack_outputs(outputs, pack)
    if caching and isinstance(mask, Tensor) and mask.ndim == 2 and not compiling:
        _check_mask_of_cache(cache, mask, length)
    if caching and length > 1 and not compiling:
        _refuse_several_samples_in_a_cache(cache, mask, positions, batch, length)
    return call.padded(inputs, causal, mask, positions, cache, use_cache)


class _Call:
    """The class's own forward with the arguments that this call passes on. (Not a dataclass: torch.compile traces this.)"""

    def __init__(self, decoder: Any, record: PatchRecord, name: str, extra: dict[str, Any]) -> None:
        self.decoder, self.record, self.name, self.extra = decoder, record, name, extra

    def packed(self, inputs: Tensor, pack: SamplePack, positions: Tensor, cache: Any = None) -> Any:
        """inputs (1, tokens, ...), positions (1, tokens); ``cache``: a PackedCache."""
        if pack.contexts is not None and (self.record.recurrent or self.record.rope_by_length):
            why = "carry a state from token to token" if self.record.recurrent else "rotate by the length of the text"
            raise ValueError(
                f"sample_pack: expected no contexts for a {type(self.decoder).__name__}, whose layers {why}, got some"
            )
        grit_pass = self._pass_of(pack, None if cache is None else cache.packed_keys)
        if cache is None and compiled_layers.want_plans(self.decoder, grit_pass):
            compiled_layers.make_plans(self.decoder, grit_pass, lambda: self._read_one_token(inputs))
        return self._run_packed(inputs, grit_pass, positions, cache)

    def _pass_of(self, pack: SamplePack, keys: PackedKeys | None = None) -> AttentionPass:
        places = recurrent.places(pack) if self.record.recurrent else None
        # layers in training are graphs of their own where they are checkpointed
        in_graph = torch.compiler.is_compiling() and not (torch.is_grad_enabled() or self.decoder.training)
        return AttentionPass(
            pack.causal, self.record.bidirectional_window, pack, self.record.deterministic, places, keys, in_graph
        )

    def _read_one_token(self, inputs: Tensor) -> AttentionPass:
        """The pass of the first token alone."""
        grit_pass = self._pass_of(SamplePack.from_lengths([1], True, device=inputs.device))
        positions = torch.zeros((1, 1), dtype=torch.int64, device=inputs.device)
        self._run_packed(inputs[:, :1].detach(), grit_pass, positions)
        return grit_pass

    def _run_packed(self, inputs: Tensor, grit_pass: AttentionPass, positions: Tensor, cache: Any = None) -> Any:
        pack = grit_pass.pack
        assert pack is not None
        if self.record.rope_by_length:
            positions = rope.with_lengths(positions, rope.lengths_in_pack(positions, pack))
        if self.record.own_attention:
            mask = gptj.carry(self.decoder, grit_pass, inputs, None, None)
        else:
            mask = torch.zeros(_NO_MASK_SHAPE, dtype=torch.int32, device=inputs.device)
        caching = {} if cache is None else {self.record.cache_name: cache}
        return self._run(
            inputs, grit_pass, attention_mask=mask, position_ids=positions, use_cache=cache is not None, **caching
        )

    def padded(
        self, inputs: Tensor, causal: Tensor, mask: Any, positions: Tensor | None, cache: Any, use_cache: bool
    ) -> Any:
        """inputs (B, T, ...) with padding, before or after a cache."""
        grit_pass = AttentionPass(causal, self.record.bidirectional_window, deterministic=self.record.deterministic)
        if self.record.rope_by_length:
            batch, length = inputs.shape[:2]
            past = 0 if cache is None else int(cache.get_seq_length())
            known = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
            if positions is None:
                positions = rope.from_first_slot(past + torch.arange(length, device=inputs.device)[None], known)
            positions = positions.expand(batch, length)
            real = None if known is None else known[:, past : past + length] != 0
            positions = rope.with_lengths(positions, rope.lengths_in_rows(positions, real))
        if self.record.own_attention:
            mask = gptj.carry(self.decoder, grit_pass, inputs, mask, cache)
        caching = {} if cache is None else {self.record.cache_name: cache}
        return self._run(inputs, grit_pass, attention_mask=mask, position_ids=positions, use_cache=use_cache, **caching)

    def _run(self, inputs: Tensor, grit_pass: AttentionPass, **arguments: Any) -> Any:
        if not self.record.own_attention:
            arguments["grit_pass"] = grit_pass
        # the class's forward, since the instance's is ours
        outputs = type(self.decoder).forward(self.decoder, **{self.name: inputs}, **arguments, **self.extra)
        if inputs.shape[1] and not grit_pass.witness and not _is_compiled(self.decoder):
            raise RuntimeError(
                f"model: no layer of this {type(self.decoder).__name__} called the attention that patch() put in, so the "
                "result would ignore is_causal and packing; another library has replaced its layers, or they attend by "
                "themselves"
            )
        return outputs


def _is_compiled(decoder: nn.Module) -> bool:
    """Whether the decoder runs, or parts of it do, as compiled graphs, which leave no witness."""
    return torch.compiler.is_compiling() or any(map(compiled_layers.is_compiled, decoder.modules()))


def _pack_of_table(table: dict[str, Any], causal: bool | Tensor, device: torch.device) -> SamplePack:
    """The pack described by transformers' ``cu_seq_lens_q``."""
    queries, keys = table["cu_seq_lens_q"], table["cu_seq_lens_k"]
    if torch.compiler.is_compiling():
        raise ValueError("cu_seq_lens_q: a compiled pass cannot read its values; pass a sample_pack")
    lengths = queries.to("cpu").diff()
    if keys is not None and keys is not queries and not torch.equal(keys.to("cpu").diff(), lengths):
        raise ValueError("cu_seq_lens_k: expected the same samples as cu_seq_lens_q, got others")
    return SamplePack.from_lengths(lengths, causal.to("cpu") if isinstance(causal, Tensor) else causal, device=device)


def _check_table_of_pack(table: dict[str, Any], pack: SamplePack) -> None:
    """A table beside a sample_pack has the same samples."""
    if not torch.compiler.is_compiling() and not torch.equal(
        _pack_of_table(table, True, torch.device("cpu")).lengths, pack.lengths.to("cpu")
    ):
        raise ValueError("cu_seq_lens_q: expected the samples of sample_pack, got others")


def _check_packed_keys(keys: PackedKeys, pack: SamplePack) -> None:
    if keys.lengths.shape != (len(pack),) or keys.positions.shape != (pack.tokens,):
        raise ValueError(
            f"cache: expected lengths ({len(pack)},) and positions ({pack.tokens},) as the sample_pack, got "
            f"{tuple(keys.lengths.shape)} and {tuple(keys.positions.shape)}"
        )
    if pack.hi is not None or pack.contexts is not None:
        raise ValueError("sample_pack: expected no upper bounds and no contexts with a PackedCache, got some")


def _check_mask_of_pack(mask: Any, tokens: int, pack: SamplePack) -> None:
    """A mask beside packed input has no padding and numbers no other samples than the pack's."""
    known = isinstance(mask, Tensor) and tuple(mask.shape) == (1, tokens) and not torch.compiler.is_compiling()
    if not known or not bool((mask > 0).all()):
        raise ValueError("attention_mask: expected none with packed input, which has no padding")
    _check_numbers("attention_mask", mask, pack)


def _check_numbers(name: str, numbers: Tensor, pack: SamplePack) -> None:
    """Numbers of samples (1, tokens) may change only where a sample of the pack begins."""
    changes = (numbers[0].to(torch.int64).diff() != 0).nonzero()[:, 0] + 1
    if not bool(torch.isin(changes.to("cpu"), pack.cu_seqlens.to("cpu")).all()):
        raise ValueError(f"{name}: expected the samples of cu_seq_lens_q or sample_pack, got others")


def _check_zeros_and_ones(mask: Tensor, why: str, instead: str = "") -> None:
    """ValueError if a mask numbers the samples of a row where it may only mark padding."""
    if mask.dtype != torch.bool and bool(neither_0_nor_1(mask).any()):
        raise ValueError(f"attention_mask: expected 0 and 1 {why}, got other numbers{instead}")


def _refuse_several_numbers(numbers: Tensor) -> None:
    """Check that ``seq_idx`` (B, T) does not change within a row."""
    same = (numbers == numbers[:, :1]).all()
    if torch.compiler.is_compiling():
        torch._assert_async(same, "seq_idx: expected one sample per row with a cache")
    elif not bool(same):
        raise ValueError("seq_idx: expected one sample per row with a cache, got several")


def _pack_of_rows(
    record: PatchRecord, inputs: Tensor, mask: Any, positions: Tensor | None, causal: Tensor
) -> SamplePack | None:
    """The pack of a pass without a cache; None if it keeps the padded layout."""
    batch, length = inputs.shape[:2]
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim == 4):
        return None  # ours, or refused by the attention function with its own message
    if mask is not None and tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"attention_mask: expected {(batch, length)} as {inputs.ndim}-D inputs, got {tuple(mask.shape)}"
        )
    if torch.compiler.is_compiling():
        if positions is not None and mask is None:
            raise ValueError(
                "position_ids: a compiled pass cannot look for samples that start over in them; "
                "give it an attention_mask or a sample_pack too"
            )
        if mask is not None:
            _assert_one_sample_per_row(mask, positions)
        return None
    positions = None if positions is None else positions.expand(batch, length)
    if mask is None and positions is not None:
        pack = SamplePack.from_position_ids(positions, causal)
    else:
        if mask is None:
            mask = torch.ones((batch, length), dtype=torch.bool, device=inputs.device)
        pack = SamplePack.from_mask(mask.to(inputs.device), causal, position_ids=positions)
    # the padded layout cannot distinguish several samples in a row
    return pack if record.packing or len(pack) > batch else None


def _assert_one_sample_per_row(mask: Tensor, positions: Tensor | None) -> None:
    """For a compiled pass, which cannot read values: an assertion inside the graph."""
    if mask.dtype != torch.bool:
        torch._assert_async(
            ~neither_0_nor_1(mask).any(),
            "attention_mask: expected 0 and 1; a compiled pass cannot distinguish the samples numbered by a mask",
        )
    if positions is not None and mask.shape[1] > 1:
        both = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        torch._assert_async(
            (~both | (positions.diff(dim=1) == 1)).all(),
            "position_ids: a compiled pass cannot distinguish samples by positions that restart; pass a sample_pack",
        )


def _check_mask_of_cache(cache: Any, mask: Tensor, length: int) -> None:
    """A mask covers what the cache holds and the new tokens; a shorter one would make padding of the last of them."""
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, int) and mask.shape[1] < past + length:  # of a static cache, a number on the device
        raise ValueError(
            f"attention_mask: expected (B, {past + length}), {past} slots of the cache and {length} new ones, got "
            f"{tuple(mask.shape)}"
        )


def _refuse_several_samples_in_a_cache(
    cache: Any, mask: Any, positions: Tensor | None, batch: int, length: int
) -> None:
    """Check that there is one sample per row, as a cache requires, when a pass begins to fill one."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        return  # masks built by generate() with our mask function, one per kind of layer
    if mask is not None:
        _check_zeros_and_ones(mask, "with a cache, which holds one sample per row")
    if positions is None or (cache is not None and int(cache.get_seq_length())):
        return
    positions = positions.expand(batch, length)
    if mask is None:
        mask = torch.ones_like(positions, dtype=torch.bool)
    if tuple(mask.shape) == (batch, length) and len(SamplePack.from_mask(mask != 0, position_ids=positions)) > batch:
        raise ValueError("position_ids: expected one sample per row with a cache, got positions that restart")


def _unpack_outputs(outputs: Any, pack: SamplePack) -> Any:
    """Unpack every (1, tokens, ...) tensor of a decoder's output to (B, T, ...)."""

    def unpack(x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == (1, pack.tokens):
            return pack.unpack(x[0])
        if isinstance(x, Tensor) and x.ndim == 2 and x.shape[0] == pack.tokens:
            # router logits, one row per token; whoever uses them masks the padding
            return pack.unpack(x).flatten(0, 1)
        return tuple(unpack(y) for y in x) if isinstance(x, tuple) else x

    if isinstance(outputs, tuple):
        return unpack(outputs)
    for key, value in list(outputs.items()):
        outputs[key] = unpack(value)
    return outputs


def _flags(is_causal: bool | Tensor, batch: int, device: torch.device) -> Tensor:
    if isinstance(is_causal, bool):
        return torch.full((batch,), is_causal, dtype=torch.bool, device=device)
    if not isinstance(is_causal, Tensor) or is_causal.dtype != torch.bool or is_causal.shape != (batch,):
        given = described(is_causal) if isinstance(is_causal, Tensor) else repr(is_causal)
        raise ValueError(f"is_causal: expected a bool or a bool tensor ({batch},), got {given}")
    return is_causal.to(device)
