"""Decides whether patch() is correct for a kind of decoder, by a trial on a tiny random model of the same class and config.

The tiny model has the config of the real one with smaller sizes: at least one layer of every kind, the same ratio of heads,
windows and original lengths shorter than the texts. A text in a pack must give the same result as alone in the unpatched model
with eager attention, causally and bidirectionally; the same holds for a padded batch, and for tokens after a cache. What holds
for the class and this kind of config holds for every size; a number that could matter beyond the lengths tried here, and that
this file does not know how to shrink, is a reason to refuse.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grit_kernels.hf import compat, recurrent

TOLERANCE = 1e-4
"""Largest accepted difference, as a fraction of the largest value; summing in a different order in FP32 gives 1e-6."""

TEXTS = (5, 23, 11)
WINDOW = 6
"""The size of windows, chunks and original lengths in a trial: shorter than a third of the longest text."""
LARGEST = 20_000_000
"""Maximum number of parameters; a larger tiny model has a size that this file does not know."""

HEADS, HEAD_DIM, HIDDEN = 4, 16, 64
LAYER_KINDS = ("full_attention", "sliding_attention", "mlp", "moe", *recurrent.LAYER_KINDS)
LISTS_OF_KINDS = ("layer_types", "layers_block_type")

SIZES: dict[str, int] = {
    "vocab_size": 97,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), HEADS),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "hidden_size_per_head"), HEAD_DIM),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), HEAD_DIM // 2),
    **dict.fromkeys(("qk_head_dim",), HEAD_DIM + HEAD_DIM // 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("dense_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(
        (
            "n_group",
            "num_expert_group",
            "topk_group",
            "num_shared_experts",
            "n_shared_experts",
            "moe_num_shared_experts",
        ),
        1,
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "moe_layer_end_index"), 1),
    **dict.fromkeys(("vocab_size_per_layer_input", "per_layer_vocab_size"), 97),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 2 * HIDDEN // HEADS),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "n_groups"), 2),
    **dict.fromkeys(("mamba_d_ssm",), 2 * HIDDEN),
}
KEY_VALUE_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num", "mamba_n_groups")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER_INDICES = ("mlp_only_layers", "attn_layer_indices")
"""Lists of the layers of one kind."""
REACHES = (
    "sliding_window",
    "window_size",
    "attention_window",
    "attention_chunk_size",
    "chunk_size",
    "local_window_size",
    "local_attention",
)
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")
ATTENTION_WORDS = (
    "attention",
    "attn",
    "window",
    "chunk",
    "block",
    "sink",
    "sparse",
    "index",
    "stride",
    "local",
    "compress",
)
"""A number with such a name that is as large as the texts may matter only beyond their length."""
HARMLESS = (
    *("query_pre_attn_scalar", "max_window_layers", "original_max_position_embeddings", "max_length"),
    *("chunk_size_feed_forward", "block_multiple_of", "mamba_chunk_size"),
)
"""Numbers with such names that are sizes, scales or, for other kinds of layers, unrelated to the reach of attention."""


@dataclass(frozen=True)
class Verdict:
    """``error``: the largest difference found, a fraction of the largest value; ``refusal``: why not, or None."""

    error: float
    refusal: str | None = None


class _Unknown(ValueError):
    """A config that cannot be shrunk, with the reason."""


def verdict(model: Any) -> Verdict:
    """Whether patch() is correct for models of this class with a config of this kind; ``model`` itself is not run.

    Tried once per process and kind; takes about half a second.
    """
    inner = compat.unwrapped(model)
    model_class, config = type(inner), inner.config
    try:
        values = tiny_values(config)
    except _Unknown as reason:
        return Verdict(float("nan"), str(reason))
    # wrappers of adapters and other libraries call the model's own parts and do not attend themselves
    parts = frozenset(type(m) for m in inner.modules() if type(m).__module__ == model_class.__module__)
    kinds: tuple[Any, Any] = (model_class, type(config))
    return _tried(*kinds, parts, values)


def attention_is_reached(model: Any) -> str | None:
    """None if a model of this class calls the attention installed by patch(), otherwise what it does; for tested families, whose
    modelling code may differ in this version of transformers. Tried once per class and kind of config, in milliseconds."""
    inner = compat.unwrapped(model)
    model_class, config = type(inner), inner.config
    try:
        values = tiny_values(config)
    except _Unknown as reason:
        return str(reason)
    kinds: tuple[Any, Any] = (model_class, type(config))
    return _reached(*kinds, values)


@functools.cache
def _reached(model_class: type, config_class: type, values: Values) -> str | None:
    try:
        with alone():
            patched_copy(model_class(config_class(**values)))
    except Exception as error:
        return named(error)
    return None


def check_plain_head(model: Any) -> None:
    """For code that applies the language-model head directly: check that logits are ``head(states)``, softly capped if the config
    has ``final_logit_softcapping``. Some families also scale them; this is tried on a tiny model, once per class and kind.

    Raises:
        ValueError: they are not.
    """
    from grit_kernels.hf.patch import FAMILIES

    inner = compat.unwrapped(model)
    if inner.config.model_type in FAMILIES:
        return
    kinds: tuple[Any, Any] = (type(inner), type(inner.config))
    if not _has_plain_head(*kinds, tiny_values(inner.config)):
        raise ValueError(
            f"model: expected logits that are the output of the language-model head, got {type(inner).__name__} (model type "
            f"{inner.config.model_type!r}), which scales them in its own way"
        )


@functools.cache
def _has_plain_head(model_class: type, config_class: type, values: Values) -> bool:
    with alone():
        tiny = model_class(config_class(**values)).eval()
        ids = torch.arange(3, 20)[None]
        expected = tiny.get_output_embeddings()(compat.decoder_of(tiny)(ids, use_cache=False)[0])
        cap = getattr(tiny.config, "final_logit_softcapping", None)
        expected = expected if cap is None else cap * torch.tanh(expected / cap)
        return torch.allclose(tiny(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-6)


def patched_copy(stock: Any) -> Any:
    """A patched copy, after one pass, which raises if no layer called our attention."""
    from grit_kernels.hf.patch import install  # which calls this file

    model = copy.deepcopy(stock).eval()
    decoder = compat.decoder_of(model)
    install(model, decoder, fuse=True, bidirectional_window="transformers", packing=True, deterministic=True)
    decoder(torch.full((1, 3), 3), cache=_cache_for(decoder))
    return model


def _cache_for(decoder: Any) -> Any:
    return compat.new_cache(config=decoder.config if recurrent.mixers(decoder) else None)


class Values(dict[str, Any]):
    """Arguments of a config; equal, as keys of a cache, if they are written alike (True and 1 are not)."""

    def written(self) -> str:
        """The values as JSON."""
        return json.dumps(self, sort_keys=True, default=repr)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.written())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.written() == other.written()


@functools.cache
def _tried(model_class: type, config_class: type, parts: frozenset[type], values: Values) -> Verdict:
    try:
        with alone():
            return _try(model_class, config_class(**values), parts)
    except Exception as error:
        return Verdict(float("nan"), named(error))


def named(error: Exception) -> str:
    """Kind and beginning of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def alone() -> Iterator[None]:
    """Isolates the trial from global settings and vice versa: its own random numbers, the CPU, float32, no autocast."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(dtype)


# ---- a small config of the same kind


def tiny_values(config: Any) -> Values:
    """The arguments that make a small config of the same kind and class."""
    given = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k not in ("transformers_version",)}
    nested = [name for name, value in given.items() if isinstance(value, dict) and "model_type" in value]
    if nested:
        raise _Unknown(f"a model of several parts ({', '.join(nested)}): patch its language model")
    values = Values(
        (k, v) for k, v in given.items() if k not in ("architectures", "model_type", "dtype", "torch_dtype")
    )
    heads = next((given[k] for k in ("num_attention_heads", "n_head", "n_heads", "num_heads") if given.get(k)), None)
    rotary = given.get("qk_rope_head_dim")
    for name, value in values.items():
        if name == "head_dim" and rotary and value == rotary:
            values[name] = SIZES["qk_rope_head_dim"]  # some configs use this name for the rotated part
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            values[name] = SIZES[name]
        elif name in KEY_VALUE_HEADS and isinstance(value, int):
            values[name] = HEADS if value == heads else 1 if value == 1 else 2
        elif name in REACHES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            values[name] = WINDOW
        elif name in TOKEN_IDS:
            values[name] = None if value is None else 0
        elif name == "rope_parameters" and isinstance(value, dict):
            values[name] = _tiny_rope(value)
        elif name == "per_layer_config" and value:
            values[name] = {int(layer): _tiny_layer(given, own) for layer, own in value.items()}
        elif name == "original_max_position_embeddings" and isinstance(value, int):
            values[name] = WINDOW
        elif "dropout" in name or name.endswith("pdrop"):
            values[name] = 0.0 if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        elif isinstance(value, list) and name in SIZES:
            values[name] = [SIZES[name] for _ in value]
    if "dynamic" in repr(given.get("rope_parameters")) and "max_position_embeddings" in values:
        values["max_position_embeddings"] = WINDOW  # dynamic scaling has no effect up to this length
    _choose_layers(given, values)
    for name, value in values.items():
        large = isinstance(value, int) and not isinstance(value, bool) and value >= max(TEXTS)
        if large and name not in SIZES and name not in HARMLESS and any(word in name for word in ATTENTION_WORDS):
            raise _Unknown(f"{name}={value} in its config may matter beyond the texts of a trial")
    return values


def _tiny_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    if any(isinstance(p, dict) for p in parameters.values()):  # one set per kind of layer
        return {k: _tiny_rope(p) if isinstance(p, dict) else p for k, p in parameters.items()}
    small = dict(parameters)
    if small.get("rope_theta") is None:
        small["rope_theta"] = 1e4
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = WINDOW
    partial = small.get("partial_rotary_factor") or 1.0
    for name in ("short_factor", "long_factor"):
        if isinstance(small.get(name), list):
            small[name] = small[name][: int(HEAD_DIM * partial) // 2]
    return small


def _tiny_layer(given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A layer's own sizes, which stay apart from those of the other layers."""
    if foreign := sorted(set(own) - {"head_dim", "num_key_value_heads"}):
        raise _Unknown(f"sizes that differ from layer to layer (per_layer_config: {', '.join(foreign)})")
    small = {name: HEAD_DIM * (1 if value == given[name] else 2) for name, value in own.items() if name == "head_dim"}
    if heads := own.get("num_key_value_heads"):
        small["num_key_value_heads"] = HEADS if heads == given["num_attention_heads"] else 1
    return small


def _choose_layers(given: dict[str, Any], values: dict[str, Any]) -> None:
    """The first layer of every kind, at least two in all; kinds are given by the lists with one entry per layer, and by lists
    of layers' indices."""
    kinds: list[Any] = next((given[name] for name in LISTS_OF_KINDS if given.get(name)), [])
    count = next((given[name] for name in LAYER_COUNTS if isinstance(given.get(name), int)), len(kinds))
    if not count:
        raise _Unknown("its config has no number of layers by a known name")
    lists = {
        k: v
        for k, v in given.items()
        # with one entry per layer: not the ids that end a text, whose list has been replaced in values; and if there are only one
        # or two layers, many a list is as long, so its name decides
        if isinstance(values.get(k), list)
        and len(v) == count
        and (count > 2 or k in LISTS_OF_KINDS or k.endswith("layer_types"))
    }
    listed = {k: set(given[k]) for k in LAYER_INDICES if given.get(k)}
    for key in listed:
        lists.pop(key, None)
    foreign = sorted({str(kind) for kind in kinds} - set(LAYER_KINDS))
    if foreign:
        raise _Unknown(
            f"layers of kind {', '.join(foreign)}, which carry something from token to token, or see keys, otherwise than by "
            "attention to a window"
        )
    sizes: dict[int, Any] = values.get("per_layer_config") or {}
    first: dict[str, int] = {}
    for index in range(count if lists or listed or sizes else 0):
        kind = (
            [v[index] for v in lists.values()] + [index in indices for indices in listed.values()] + [sizes.get(index)]
        )
        first.setdefault(repr(kind), index)
    chosen = list(first.values()) or [0, 0]
    chosen = chosen if len(chosen) > 1 else chosen * 2
    if given.get("num_kv_shared_layers"):  # the last layers reuse keys and values of earlier ones of their kind
        values["num_kv_shared_layers"] = len(chosen)
        chosen = chosen * 2
    for key in lists:
        values[key] = [values[key][index] for index in chosen]
    for key, indices in listed.items():
        values[key] = [new for new, index in enumerate(chosen) if index in indices]
    if sizes:
        values["per_layer_config"] = {new: sizes[index] for new, index in enumerate(chosen) if index in sizes}
    for key in LAYER_COUNTS:
        if isinstance(given.get(key), int):
            values[key] = len(chosen)
    if "max_window_layers" in values:
        values["max_window_layers"] = len(chosen)


# ---- the trial


def draw_weights(model: Any) -> None:
    """Weights that make attention far from uniform, and every vector (sinks, biases, norms) matter."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=2.0 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.3 * torch.randn(parameter.shape))


def _try(model_class: Any, config: Any, parts: frozenset[type]) -> Verdict:
    with torch.device("meta"):
        shape = model_class(copy.deepcopy(config))
    size, untried = sum(p.numel() for p in shape.parameters()), parts - {type(m) for m in shape.modules()}
    if untried:
        return Verdict(
            float("nan"), f"parts that a trial does not reach: {', '.join(sorted(t.__name__ for t in untried))}"
        )
    if size > LARGEST:
        return Verdict(float("nan"), f"a config of unknown sizes: the tiny model would have {size} parameters")
    config._attn_implementation = "eager"
    stock = model_class(config).eval().float()
    draw_weights(stock)
    plain = compat.decoder_of(stock)
    texts = [torch.randint(3, 97, (1, length)) for length in TEXTS]
    try:
        truth = {flag: [alone_in_stock(plain, text, flag) for text in texts] for flag in (True, False)}
    except Exception as failure:
        return Verdict(float("nan"), f"unpatched, with eager attention, it fails on a text alone ({named(failure)})")
    try:
        model = patched_copy(stock)
    except Exception as failure:
        if str(failure).startswith("model: "):
            raise  # one of ours, which says what is wrong
        return Verdict(float("nan"), f"its layers fail without a mask ({named(failure)})")
    patched = compat.decoder_of(model)
    if _difference(truth[True], truth[False]) < 1e-2:
        return Verdict(float("nan"), "unpatched, it ignores is_causal=False, so there is nothing to compare with")

    padded = torch.zeros(len(texts), max(TEXTS), dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, text in enumerate(texts):
        padded[row, : text.shape[1]], mask[row, : text.shape[1]] = text[0], 1

    def rows(states: Tensor) -> list[Tensor]:
        return [states[row : row + 1, : text.shape[1]] for row, text in enumerate(texts)]

    flags = torch.tensor([False, True, False])
    mixed = [truth[bool(flag)][row] for row, flag in enumerate(flags)]
    found: dict[str, float] = {}
    for flag in (True, False):
        states = patched(padded, attention_mask=mask, is_causal=flag, use_cache=False)[0]
        found[f"packed, is_causal={flag}"] = _difference(rows(states), truth[flag])
    found["packed, mixed"] = _difference(rows(patched(padded, attention_mask=mask, is_causal=flags)[0]), mixed)
    cache = _cache_for(patched)
    states = patched(padded, attention_mask=mask, is_causal=flags, cache=cache)[0]
    found["padded, mixed"] = _difference(rows(states), mixed)
    longest = max(range(len(texts)), key=TEXTS.__getitem__)
    found["after a cache"] = _difference([_in_pieces(patched, texts[longest])], [truth[True][longest]])
    worst = max(found, key=lambda name: found[name] if found[name] == found[name] else float("inf"))
    error = found[worst]
    if not error <= TOLERANCE:
        if worst == "after a cache":
            own = _difference([_in_pieces(plain, texts[longest])], [truth[True][longest]])
            if not own <= TOLERANCE:
                return Verdict(error, f"unpatched, it is off by {own:.2g} of the largest value after a cache")
        return Verdict(error, f"on a tiny random model it is off by {error:.2g} of the largest value ({worst})")
    return Verdict(error)


def _in_pieces(decoder: Any, text: Tensor) -> Tensor:
    """The causal states of ``text`` read into a cache piece by piece."""
    cache, states, start = _cache_for(decoder), [], 0
    for size in (text.shape[1] - 8, 6, 1, 1):
        states.append(decoder(text[:, start : start + size], cache=cache)[0])
        start += size
    return torch.cat(states, dim=1)


def alone_in_stock(decoder: Any, text: Tensor, is_causal: bool) -> Tensor:
    """transformers' masks follow the config, whether or not the forward passes the argument on. A copy, because some models
    remember the longest text they have seen."""
    decoder = copy.deepcopy(decoder)
    decoder.config.is_causal = is_causal
    return decoder(text, use_cache=False)[0]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    largest = max(float(b.abs().max()) for b in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest
