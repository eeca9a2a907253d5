"""Convert a Llama-architecture GGUF file into a plain transformers Mistral checkpoint.

Llama and Mistral have the same weights under the same names; Mistral adds only a sliding window. So a small Llama in a
GGUF file becomes a small Mistral without training. transformers reads the file; what it gets wrong about this kind of
tokenizer is corrected here: digits are split, and a byte missing from the vocabulary is unknown instead of vanishing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from python_model.support.optional import require

SLIDING_WINDOW = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as in the model's training but without the default system message: a prompt holds only what its caller wrote."""

_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
)
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""GGUF's names of the special tokens."""


def convert(gguf_file: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, weights (safetensors) and tokenizer of ``gguf_file`` into the existing ``folder``.

    Raises:
        ImportError: the package ``gguf`` or ``accelerate`` is not installed.
        ValueError: the file has a different architecture or tokenizer, or lacks weights.
    """
    gguf = require("gguf", "train")
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaForCausalLM, MistralConfig

    fields = {name: field.contents() for name, field in gguf.GGUFReader(gguf_file).fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{gguf_file}: expected architecture 'llama', got {fields.get('general.architecture')!r}")
    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{gguf_file}: expected tokenizer ('gpt2', 'smollm'), got {kind}")
    loaded: Any = LlamaForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, output_loading_info=True
    )
    model, found = loaded
    wrong = sorted(set(found["missing_keys"]) | set(found["unexpected_keys"]) | set(found["mismatched_keys"]))
    if wrong:
        raise ValueError(f"{gguf_file}: {len(wrong)} tensors do not fit a Llama of its sizes, the first is {wrong[0]}")

    ids: dict[str, Any] = {
        f"{r}_token_id": int(fields[f"tokenizer.ggml.{ROLES[r]}_token_id"]) for r in ("bos", "eos", "pad")
    }
    same: dict[str, Any] = {name: getattr(model.config, name) for name in _SAME}
    config = MistralConfig(
        **same,
        # GGUF holds float32: 9.9999997e-06 is the 1e-5 the model was made with
        rms_norm_eps=float(f"{model.config.rms_norm_eps:.6g}"),
        sliding_window=SLIDING_WINDOW,
        attention_dropout=0.0,
        dtype=dtype,
        **ids,
    )
    config.architectures = ["MistralForCausalLM"]
    weights = {name: weight.to(dtype).contiguous() for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    _tokenizer(fields, gguf_file, config.max_position_embeddings).save_pretrained(folder)


def _tokenizer(fields: dict[str, Any], gguf_file: Path, max_length: int) -> Any:
    """The byte-level BPE tokenizer of the file, with the pre-tokenizer that llama.cpp calls "smollm"."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    special = {f"{role}_token": tokens[int(fields[f"tokenizer.ggml.{name}_token_id"])] for role, name in ROLES.items()}
    backend = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).backend_tokenizer
    backend.model.unk_token = special["unk_token"]
    # older versions of transformers take it for a SentencePiece tokenizer
    backend.model.byte_fallback = backend.model.fuse_unk = False
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        truncation_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        **special,
    )
