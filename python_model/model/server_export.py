"""The embedding side of a GRIT model as a folder for vLLM, or for llama.cpp's converter.

Both read a transformers checkpoint whose config says ``is_causal: false``, and the pooling from sentence-transformers'
``modules.json``. Both pool every token of a text, including its instruction, and neither supports named prompts: a client sends
the whole text,
``<|user|>\\n{instruction}\\n<|embed|>\\n{text}``. What they do not support is refused by name, so a folder gives GritLM's
vectors or is not written; docs/export.md describes both, with sources.

Source: vLLM 0.33.0 (config/model.py, models/llama.py, models/adapters.py, transformers_utils/config.py), llama.cpp as in
llama-cpp-python 0.3.36 (conversion/base.py, src/llama-model.cpp, src/llama-context.cpp).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

import grit_kernels as gk
from python_model.model.modeling import ACTIVATIONS, GritLM
from python_model.support.arguments import check_at_least, check_choice, check_path
from python_model.support.files import new_folder, write_json

Server = Literal["vllm", "gguf"]
SERVERS: tuple[str, ...] = get_args(Server)
BIDIRECTIONAL = {
    "vllm": ("llama", "mistral", "qwen2", "qwen3"),
    "gguf": ("llama", "mistral", "mixtral", "qwen2", "qwen3"),
}
"""Model types whose attention reads ``is_causal`` there."""
_POOLING = ("mean", "cls", "lasttoken")


def export_for_server(
    model: GritLM,
    folder: str | os.PathLike[str],
    server: Server,
    *,
    max_length: int = 512,
    pool_instruction: bool = False,
) -> Path:
    """Write the embedding side of ``model`` to ``folder``, atomically; returns the folder.

    The weights keep their language-model head, so ``architectures`` is a class that both know (``MistralForCausalLM``). The
    sliding window is null if no text is longer: beyond it, the windows of vLLM and llama.cpp differ from transformers'. For
    chats, serve the checkpoint itself.

    Args:
        model: a GritLM loaded with ``mode="unified"``, whose embedding attention is ``bb`` or ``cc``.
        folder: replaced if it exists.
        server: ``"vllm"``, or ``"gguf"`` for llama.cpp's ``convert_hf_to_gguf.py``.
        max_length: the longest text, in tokens.
        pool_instruction: accept vectors that pool the instruction from a model trained without it (they differ from those of
            :meth:`GritLM.encode`).

    Raises:
        ValueError, TypeError: a setting of the model that the server does not support; the message names it.
    """
    check_path("folder", folder)
    check_choice("server", server, SERVERS)
    check_at_least("max_length", max_length, 1)
    _check(model, server, max_length, pool_instruction)
    settings = model.settings
    special = model.formatter.special_tokens
    tokenizer = model.formatter.tokenizer_that_adds(special.start, [*model.formatter.suffix, *special.end])
    with new_folder(Path(folder)) as target:
        model.model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        if not settings.attention.embedding_causal:
            config["is_causal"] = False
        if config.get("sliding_window") is not None:
            config["sliding_window"] = None
            if "layer_types" in config:
                config["layer_types"] = ["full_attention"] * len(config["layer_types"])
        write_json(target / "config.json", config)
        _write_modules(model, target, max_length)
    return Path(folder)


def commands(model: GritLM, folder: str | os.PathLike[str], server: Server, max_length: int) -> list[str]:
    """The command lines that serve a folder of :func:`export_for_server`."""
    if server == "vllm":
        return [f"vllm serve {folder} --runner pooling --max-model-len {max_length}"]
    pooling = {"mean": "mean", "cls": "cls", "lasttoken": "last"}[model.settings.pooling_method]
    # a batch of bidirectional texts must fit into one step
    batch = f"--batch-size {max_length} --ubatch-size {max_length}"
    norm = "" if model.settings.normalized else " --embd-normalize -1"
    return [
        f"python convert_hf_to_gguf.py {folder} --outfile model.gguf",
        f"llama-server --model model.gguf --embeddings --pooling {pooling} {batch}{norm}",
    ]


def _check(model: GritLM, server: str, max_length: int, pool_instruction: bool) -> None:
    settings, config = model.settings, model.model.config
    model.check_head("export")
    model.check_patch()
    model.check_plain_weights("export")
    if not settings.attention.embedding_is_uniform:
        raise ValueError(f"attn: expected 'bb' or 'cc' embeddings for an export, got {settings.attn!r}")
    if not settings.attention.embedding_causal and config.model_type not in BIDIRECTIONAL[server]:
        raise ValueError(
            f"model_type: expected one whose attention sees both sides in {server}, {', '.join(BIDIRECTIONAL[server])}, "
            f"got {config.model_type!r}"
        )
    if settings.pooling_method not in _POOLING:
        raise ValueError(f"pooling_method: expected one of {', '.join(_POOLING)}, got {settings.pooling_method!r}")
    prefixed = settings.format != "plain" or any(settings.prompts.values())
    if settings.pooling_method == "mean" and prefixed and not settings.embed_instruction and not pool_instruction:
        raise ValueError(
            f"embed_instruction: expected a model that pools the instruction too, as {server} does, or pool_instruction "
            "(--pool-instruction) to accept other vectors, got false"
        )
    if settings.truncate_dim is not None:
        raise ValueError(
            f"truncate_dim: expected none, {server} cuts embeddings by no setting of a folder, got {settings.truncate_dim}"
        )
    window = getattr(config, "sliding_window", None)
    full = settings.bidirectional_window == "full" and not settings.attention.embedding_causal
    if window is not None and max_length > window and not full:
        raise ValueError(f"max_length: expected at most the model's sliding window, {window}, got {max_length}")
    if model.projection is not None and type(model.projection) is not nn.Linear:
        raise TypeError(f"projection: expected an nn.Linear for an export, got {type(model.projection).__name__}")
    if gk.hf.depends_on_length(model.decoder[0]):
        raise ValueError(
            "rope_parameters: expected rotary embeddings that do not depend on the length of a text, which "
            f"{server} decides in its own way, got {config.rope_parameters}"
        )
    special = model.formatter.special_tokens
    around = [*special.start], [*model.formatter.suffix, *special.end]
    if server == "gguf":
        if (activation := getattr(config, "hidden_act", "silu")) != "silu":
            raise ValueError(
                f"hidden_act: expected 'silu', which llama.cpp computes for {config.model_type}, got {activation!r}"
            )
        if model.projection is not None:
            raise ValueError(f"projection: expected none, llama.cpp has no such head for {config.model_type}")
        tokenizer: Any = model.tokenizer
        ends: list[list[int]] = [[]] if tokenizer.eos_token_id is None else [[], [tokenizer.eos_token_id]]
        starts: list[list[int]] = [[]] if tokenizer.bos_token_id is None else [[], [tokenizer.bos_token_id]]
        if around[0] not in starts or around[1] not in ends:
            raise ValueError(
                f"special_tokens, embed_eos: expected at most BOS before a text and EOS behind it for gguf, got {around}"
            )


def _write_modules(model: GritLM, folder: Path, max_length: int) -> None:
    """sentence-transformers' description of the modules after the decoder, with names that every version of vLLM reads."""
    settings, size = model.settings, int(model.model.config.hidden_size)
    kinds = ["Transformer", "Pooling"]
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    (folder / "1_Pooling").mkdir()
    pooling = {"embedding_dimension": size, "pooling_mode": settings.pooling_method, "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    if model.projection is not None:
        from safetensors.torch import save_file

        head: Any = model.projection
        kinds.append("Dense")
        (folder / "2_Dense").mkdir()
        activation = ACTIVATIONS[settings.projection_activation]
        write_json(
            folder / "2_Dense" / "config.json",
            {
                "in_features": head.in_features,
                "out_features": head.out_features,
                "bias": True,
                "activation_function": f"{activation.__module__}.{activation.__name__}",
            },
        )
        weights = {f"linear.{name}": value.float().contiguous() for name, value in head.state_dict().items()}
        save_file(weights, folder / "2_Dense" / "model.safetensors")
    if settings.normalized:
        kinds.append("Normalize")
    modules: list[dict[str, Any]] = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if kind == "Transformer" else f"{number}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    if settings.normalized:
        (folder / f"{len(kinds) - 1}_Normalize").mkdir()
    write_json(folder / "modules.json", modules)
