"""What makes a decoder another one: the fields of its config that change states, the content of its weights, its tokenizer."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from python_model.model.heads import layer_configs

if TYPE_CHECKING:
    from python_model.model.modeling import GritLM

MARK = "2:"
"""Begins a fingerprint; those of earlier versions have no mark."""
_ALWAYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "vocab_size",
    "rms_norm_eps",
)
_WHERE_PRESENT = (
    *("hidden_act", "hidden_activation", "layer_types", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("layer_norm_eps", "rotary_pct", "use_parallel_residual", "num_experts_per_tok", "norm_topk_prob"),
)
_WITHOUT_EFFECT = frozenset(
    (
        # names, and what other settings or the call itself decide
        *("architectures", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id", "problem_type"),
        *("auto_map", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "is_encoder_decoder"),
        *("is_causal", "is_decoder", "use_bidirectional_attention", "rope_parameters"),
        *("use_sliding_window", "max_window_layers"),  # which give sliding_window and layer_types
        # seen in the shapes of weights
        *("intermediate_size", "n_inner", "num_local_experts", "num_experts", "moe_intermediate_size"),
        # what is returned, and how it is computed
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("pretraining_tp", "chunk_size_feed_forward"),
        # new weights
        "initializer_range",
    )
)
_OF_TRAINING = frozenset(
    (
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "classifier_dropout"),
        *("router_aux_loss_coef", "router_jitter_noise"),
        # the language-model head
        *("tie_word_embeddings", "final_logit_softcapping", "logits_scaling", "logit_scale"),
    )
)
_PROBES = (
    "<|user|>\nWhat is 12 + 7?\n<|embed|>\n  The river's mouth -- it's 3,000 km away!\n\n\tEND",
    "def f(x: int = 0) -> str:\r\n    return f'{x:>8}'\r\n",
    "\u00c9t\u00e9, e\u0301t\u00e9, Stra\u00dfe, \u041c\u043e\u0441\u043a\u0432\u0430, \u6771\u4eac",
    "\u0645\u0631\u062d\u0628\u0627 \U0001f469\u200d\U0001f4bb",
)
"""Texts on which tokenizers differ: spaces, digits, code, scripts, combining characters."""
_OF_ADAPTERS = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
_BLOCK = 1 << 24
"""Elements of a weight that are digested at a time."""
_LIMITS = ("max_position_embeddings", "n_positions")
"""Nothing is computed with them, but for some kinds of scaled rotary embeddings."""


def states_config(config: Any, *, training: bool = False) -> dict[str, Any]:
    """Every field of ``config`` that can change the states of a text, and with ``training`` a loss, as plain values.

    Fields that are not known are included if they differ from the default of the config's class, so that a field which a new
    version of transformers introduces does not change the result for a checkpoint that does not use it.
    """
    found = {name: _of_layers(config, name) for name in _ALWAYS}
    rope = getattr(config, "rope_parameters", None)
    found["rope"] = str(rope)
    found |= {name: value for name in _WHERE_PRESENT if (value := getattr(config, name, None)) is not None}
    # a usual Mistral's is what it was when there were fewer fields
    if found.get("hidden_act") == "silu":
        del found["hidden_act"]
    usual = "full_attention" if found["sliding_window"] is None else "sliding_attention"
    if set(found.get("layer_types") or ()) == {usual}:
        del found["layer_types"]
    known = {
        *(() if training else _OF_TRAINING),
        *_ALWAYS,
        *_WHERE_PRESENT,
        *_WITHOUT_EFFECT,
        *(() if _scales(rope) else _LIMITS),
    }
    defaults = _defaults(type(config))
    for name, value in config.to_dict().items():
        if not name.startswith("_") and name not in known and (name not in defaults or defaults[name] != value):
            found[name] = value
    return found


def _of_layers(config: Any, name: str) -> Any:
    """A field of the config, or its values by layer where layers differ."""
    values = [getattr(layer, name, None) for layer in layer_configs(config)]
    return values if values.count(values[0]) < len(values) else values[0]


def fingerprint(model: GritLM) -> str:
    """Identifies what a text's states depend on (architecture, weights, tokenizer) by its whole content.

    Weights are compared in bfloat16, so a model's fingerprint does not depend on the dtype it was loaded in. Every call reads
    all of them, which suits the opening of a store, not what is done per text.
    """
    decoder = weights_digest(model.decoder[0], torch.bfloat16)
    applied = _applied(model.decoder[0])
    return MARK + _digest(states_config(model.model.config), decoder, tokenizer_digest(model.tokenizer), *applied)


def content_digest(model: GritLM) -> str:
    """Identifies what embeddings and replies depend on: what :func:`fingerprint` covers, heads, and settings."""
    parts = [part for part in (model.model, model.projection) if part is not None]
    weights = [weights_digest(part, torch.bfloat16) for part in parts]
    config, tokenizer = states_config(model.model.config, training=True), model.tokenizer
    applied = [fact for part in parts for fact in _applied(part)]
    return _digest(
        config, weights, tokenizer_digest(tokenizer), tokenizer.chat_template, asdict(model.settings), *applied
    )


def weights_digest(module: nn.Module, dtype: torch.dtype) -> str:
    """Hex digest of every element of every weight and saved buffer; numbers that are not integers are rounded to ``dtype``.

    With the codes of bitsandbytes' weights, what the codes stand for.
    """
    named: list[tuple[str, Tensor]] = list(module.named_parameters())
    digest = hashlib.sha256()
    for prefix, part in module.named_modules():
        saved = part._buffers.keys() - part._non_persistent_buffers_set
        named += [(f"{prefix}.{name}", buffer) for name in saved if (buffer := part._buffers[name]) is not None]
        for name, value in sorted(_quantisation(part).items()):
            if isinstance(value, Tensor):
                named.append((f"{prefix}.weight.{name}", value))
            else:
                digest.update(f"{prefix}.weight.{name} {value}\n".encode())
    named.sort(key=lambda pair: pair[0])
    # hashlib and torch work outside of the interpreter's lock
    with ThreadPoolExecutor(min(16, torch.get_num_threads())) as pool:
        for (name, _), content in zip(named, pool.map(lambda pair: _content(pair[1], dtype), named), strict=True):
            digest.update(name.encode() + content)
    return digest.hexdigest()


def plain_weight(weight: Tensor) -> Tensor:
    """The numbers of a weight, without gradient: those of oneDNN's order and of quantised classes such as torchao's in full."""
    plain = weight.detach()
    if plain.is_mkldnn:  # see python_model.model.packed_linear
        return plain.to_dense()
    if type(weight).dequantize is not torch.Tensor.dequantize:
        return cast(Tensor, cast(Any, weight).dequantize())
    return plain


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex digest of a tokenizer's vocabulary, its BOS and EOS, and how it splits texts of several kinds.

    Not of its file, whose layout depends on the version of tokenizers.
    """
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    found = [sorted(tokenizer.get_vocab().items()), special, [tokenizer(text)["input_ids"] for text in _PROBES]]
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=6).hexdigest()


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=repr).encode()).hexdigest()[:32]


def _content(weight: Tensor, dtype: torch.dtype) -> bytes:
    flat = plain_weight(weight).reshape(-1)
    digest = hashlib.sha256()
    for block in flat.split(_BLOCK):
        # packed integers stay as they are
        rounded = block.to("cpu", dtype) if flat.is_floating_point() else block.cpu()
        digest.update(rounded.contiguous().view(torch.uint8).numpy())
    return digest.digest()


def _quantisation(part: nn.Module) -> dict[str, Any]:
    """What bitsandbytes keeps beside the codes of a module's weight, such as scales and the numbers of the codes."""
    weight = getattr(part, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:  # 4 bits
        # the dtypes are those in which the numbers are computed
        return {name: value for name, value in state.as_dict().items() if name not in ("dtype", "nested_dtype")}
    scales = getattr(weight, "SCB", None)  # 8 bits
    if scales is None:
        scales = getattr(getattr(part, "state", None), "SCB", None)  # where the first pass puts them
    return {} if scales is None else {"SCB": scales}


def _applied(module: nn.Module) -> list[Any]:
    """How the weights of adapters of PEFT and of parametrisations are applied: their factors, and which are switched on."""
    found: list[Any] = []
    for name, part in module.named_modules():
        if isinstance(part, ParametrizationList):
            found.append([name, [[type(step).__qualname__, _numbers(step)] for step in part]])
        elif type(part).__module__.startswith("peft."):
            found.append([name, {fact: vars(part)[fact] for fact in _OF_ADAPTERS if fact in vars(part)}])
    return found


def _numbers(step: nn.Module) -> dict[str, Any]:
    plain = {name: value for name, value in vars(step).items() if isinstance(value, bool | int | float | str)}
    return {name: value for name, value in plain.items() if name != "training"}


def _scales(rope: Any) -> bool:
    """Whether the rotary embeddings are of a kind whose scaling may depend on the model's largest length."""
    nested = [p for p in (rope or {}).values() if isinstance(p, dict)] or [rope or {}]
    return any(p.get("rope_type", "default") not in ("default", "linear") for p in nested)


def _defaults(kind: type) -> dict[str, Any]:
    try:
        return dict(kind().to_dict())
    except (TypeError, ValueError):  # a config that cannot be made without arguments
        return {}
