"""Settings and embedding head of a sentence-transformers folder (EmbeddingGemma, Qwen3-Embedding, e5-mistral, ..).

    modules.json                          the modules in order: a decoder, pooling, linear layers, normalisation
    1_Pooling/config.json, ..             each module's options (and weights, for a linear layer)
    config_sentence_transformers.json     prompts by name
    sentence_bert_config.json             the decoder's options

Whatever GritLM cannot reproduce is refused by name: a folder yields the vectors of sentence-transformers, or an error.
Source of the layout: sentence-transformers, 2.x to 6.x.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import grit_kernels as gk
from python_model.settings import POOLING_METHODS, Activation, GritSettings

Read = Callable[[str], Path | None]
"""A file of the checkpoint by its name (with folder), or None."""
MODULES = "modules.json"
_DECODER = "sentence_bert_config.json"
_TEXTS = "config_sentence_transformers.json"
_KINDS = ("Transformer", "GritTransformer", "Pooling", "Dense", "Normalize")
# older folders have one flag per kind of pooling instead of pooling_mode
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# what each file may say; anything else that is set is refused
_OF_DECODER = ("max_seq_length", "modality_config", "module_output_name", "unpad_inputs")
_OF_TEXTS = ("__version__", "prompts", "default_prompt_name", "similarity_fn_name", "requirements")
_OF_POOLING = (*_FLAGS, "pooling_mode", "word_embedding_dimension", "embedding_dimension", "include_prompt")
_OF_DENSE = ("in_features", "out_features", "bias", "activation_function")
_LOADING = {"torch_dtype", "dtype", "attn_implementation", "trust_remote_code", "padding_side", "device_map"}
"""How a decoder and its tokenizer are loaded, without effect on a vector."""
_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu"}


def settings_of_modules(read: Read) -> GritSettings | None:
    """The settings in ``modules.json`` and the files beside it; None if there is no such file.

    Raises:
        ValueError: a module, or one of its options, changes embeddings in a way that GritLM does not support.
    """
    modules = _modules(read)
    if modules is None:
        return None
    _check_decoder(read)
    pooling = _options(read, modules, "Pooling")
    _check_known(f"{MODULES}: pooling", pooling, _OF_POOLING)
    method = pooling.get("pooling_mode") or [name for flag, name in _FLAGS.items() if pooling.get(flag)]
    method = method[0] if isinstance(method, list) and len(method) == 1 else method
    if method not in POOLING_METHODS:
        raise ValueError(f"{MODULES}: pooling: expected one of {', '.join(POOLING_METHODS)}, got {method!r}")
    texts = _json(read, _TEXTS) or {}
    _check_value(_TEXTS, texts, "model_type", "SentenceTransformer")
    _check_known(_TEXTS, texts, _OF_TEXTS)
    # sentence-transformers gives every model these two
    prompts = {"query": "", "document": "", **{n: text or "" for n, text in (texts.get("prompts") or {}).items()}}
    include_prompt = bool(pooling.get("include_prompt", True))
    if not include_prompt and method in ("cls", "weightedmean") and any(prompts.values()):
        raise ValueError(f"{MODULES}: include_prompt: expected true with pooling {method!r} and prompts, got false")
    layers = _dense(read, modules)
    config = _json(read, "config.json") or {}
    flag = config.get("use_bidirectional_attention")
    bidirectional = gk.hf.reads_texts_both_ways(flag) or config.get("is_causal") is False
    return GritSettings(
        pooling_method=method,
        normalized=modules[-1][0] == "Normalize",
        attn="bbcc" if bidirectional else "cccc",
        # there, prompts are tokenised alone to be counted
        instruction_count="reference",
        embed_instruction=include_prompt,
        projection=layers[-1][1]["out_features"] if layers else None,
        projection_activation=_activation(layers[-1][1]) if layers else "identity",
        format="plain",
        prompts=prompts,
        default_prompt_name=texts.get("default_prompt_name"),
    )


def head_of_modules(read: Read) -> dict[str, Tensor] | None:
    """Weight and bias of the linear layers merged into one (there is no activation between them); None without such a layer."""
    modules = _modules(read)
    layers = [] if modules is None else _dense(read, modules)
    if not layers:
        return None
    from safetensors.torch import load_file

    weight = bias = None
    for folder, options in layers:
        file = read(f"{folder}/model.safetensors")
        if file is None:
            raise FileNotFoundError(f"{MODULES}: expected the weights {folder}/model.safetensors, got no such file")
        state = {name.removeprefix("linear."): value.double() for name, value in load_file(file).items()}
        own = state.get("bias", torch.zeros(options["out_features"], dtype=torch.float64))
        bias = own if bias is None else state["weight"] @ bias + own
        weight = state["weight"] if weight is None else state["weight"] @ weight
    assert weight is not None and bias is not None
    return {"weight": weight.float(), "bias": bias.float()}


def limit_of_modules(read: Read, tokenizer: Any, positions: int) -> int | None:
    """The number of tokens to which sentence-transformers cuts a text, with those that the tokenizer adds; None without
    ``modules.json``.

    Args:
        tokenizer: the folder's.
        positions: most tokens of a text for the decoder.

    Raises:
        ValueError: it would cut texts at their beginning.
    """
    if read(MODULES) is None:
        return None
    if tokenizer.truncation_side != "right":
        raise ValueError(
            f"truncation_side: expected 'right' in the tokenizer's config, got {tokenizer.truncation_side!r}"
        )
    given = (_json(read, _DECODER) or {}).get("max_seq_length")
    return int(given) if given else min(tokenizer.model_max_length, positions)


def _modules(read: Read) -> list[tuple[str, str]] | None:
    """(kind, folder) of each module, in an order that GritLM supports."""
    listed = _json(read, MODULES)
    if listed is None:
        return None
    modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in listed]
    kinds = [kind for kind, _ in modules]
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(f"{MODULES}: expected modules {', '.join(_KINDS)}, got {kind}")
    order = [_KINDS.index(kind) for kind in kinds]
    counts = [kinds.count(kind) for kind in ("Pooling", "Normalize")]
    if len(kinds) < 2 or order[0] > 1 or order[1] != 2 or order != sorted(order) or counts[0] != 1 or counts[1] > 1:
        raise ValueError(
            f"{MODULES}: expected a decoder, pooling, linear layers and normalisation in turn, got {kinds}"
        )
    for entry, (kind, folder) in zip(listed, modules, strict=True):
        if entry.get("kwargs"):
            raise ValueError(f"{MODULES}: kwargs: expected none, got {entry['kwargs']!r} of {kind}")
        if kind == "Normalize":
            _check_layer(folder, _json(read, f"{folder}/config.json") or {}, ())
    if modules[0][1] not in ("", "."):
        raise ValueError(f"{MODULES}: expected the decoder in the folder itself, got {modules[0][1]!r}")
    return modules


def _dense(read: Read, modules: list[tuple[str, str]]) -> list[tuple[str, dict[str, Any]]]:
    """(folder, options) of the linear layers."""
    layers: list[tuple[str, dict[str, Any]]] = []
    for kind, folder in modules:
        if kind == "Dense":
            options = _json(read, f"{folder}/config.json") or {}
            _check_layer(folder, options, _OF_DENSE)
            if layers and _activation(layers[-1][1]) != "identity":
                raise ValueError(f"{folder}: expected no linear layer after an activation, got one")
            _activation(options)
            layers.append((folder, options))
    return layers


def _activation(options: dict[str, Any]) -> Activation:
    name = str(options.get("activation_function", "Tanh"))
    if (last := name.rpartition(".")[2]) not in _ACTIVATIONS:
        raise ValueError(f"activation_function: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return cast(Activation, _ACTIVATIONS[last])


def _check_decoder(read: Read) -> None:
    decoder = _json(read, _DECODER) or {}
    if "text" not in decoder.get("modality_config", {"text": None}):
        raise ValueError(f"{_DECODER}: modality_config: expected an entry 'text', got chat messages alone")
    for name in ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"):
        given = decoder.pop(name, None) or {}
        if not set(given) <= _LOADING:
            raise ValueError(f"{_DECODER}: {name}: expected {sorted(_LOADING)}, got {given!r}")
    _check_value(_DECODER, decoder, "transformer_task", "feature-extraction")
    _check_known(_DECODER, decoder, _OF_DECODER)


def _check_layer(folder: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    """Check that a layer after the pooling maps the embedding to the embedding, with known options."""
    for name in ("module_input_name", "module_output_name"):
        _check_value(folder, options, name, "sentence_embedding")
    _check_known(folder, options, known)


def _check_known(where: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    """Refuse what is set and not known: it may change vectors."""
    for name, value in options.items():
        if name not in known and value not in (None, False, 0, "", [], {}):
            raise ValueError(f"{where}: {name}: expected none, got {value!r}")


def _check_value(where: str, options: dict[str, Any], name: str, only: str) -> None:
    """Take an option that may have one value out of the others."""
    if (value := options.pop(name, None)) not in (None, only):
        raise ValueError(f"{where}: {name}: expected {only!r}, got {value!r}")


def _options(read: Read, modules: list[tuple[str, str]], wanted: str) -> dict[str, Any]:
    folder = next(folder for kind, folder in modules if kind == wanted)
    return cast(dict[str, Any], _json(read, f"{folder}/config.json") or {})


def _json(read: Read, name: str) -> Any:
    file = read(name)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))
