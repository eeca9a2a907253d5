"""Convert a Llama-architecture GGUF file into a plain transformers Mistral checkpoint.

Llama and Mistral have the same weights under the same names; Mistral adds only a sliding window. So a small Llama that
comes as a GGUF file becomes a small Mistral without training. Nothing is unpickled: the package ``gguf`` reads the file
through a memory map, one tensor at a time, so the peak memory stays near the size of the result.

GGUF stores the rows of ``q_proj`` and ``k_proj`` with the two halves of each head interleaved, because llama.cpp rotates
neighbouring elements; transformers rotates element d with element d + head_dim / 2. The conversion undoes that order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SLIDING_WINDOW = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as the model was trained on, without the default system message: a prompt holds only what its caller wrote."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf_file: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16, progress: bool = True) -> None:
    """Write config, weights (safetensors) and tokenizer of ``gguf_file`` into the existing ``folder``.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: the file holds another architecture or tokenizer, or tensors that do not fit a Mistral of its sizes.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading a GGUF file needs the package gguf: pip install 'gguf>=0.17'") from error
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{gguf_file}: architecture {fields.get('general.architecture')!r}, accepted is 'llama'")
    weights = _weights(reader, fields, dtype, progress)
    config = _config(fields, tied="lm_head.weight" not in weights, dtype=dtype)
    _check_weights(weights, config, gguf_file)

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    _tokenizer(fields, gguf_file).save_pretrained(folder)


def _config(fields: dict[str, Any], *, tied: bool, dtype: torch.dtype) -> Any:
    from transformers import MistralConfig

    heads, hidden = int(fields["llama.attention.head_count"]), int(fields["llama.embedding_length"])
    config = MistralConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=int(fields["llama.feed_forward_length"]),
        num_hidden_layers=int(fields["llama.block_count"]),
        num_attention_heads=heads,
        num_key_value_heads=int(fields["llama.attention.head_count_kv"]),
        head_dim=hidden // heads,
        hidden_act="silu",
        max_position_embeddings=int(fields["llama.context_length"]),
        # GGUF holds float32: 9.9999997e-06 is the 1e-5 the model was made with.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_theta": float(fields["llama.rope.freq_base"]), "rope_type": "default"},
        sliding_window=SLIDING_WINDOW,
        attention_dropout=0.0,
        tie_word_embeddings=tied,
        bos_token_id=int(fields["tokenizer.ggml.bos_token_id"]),
        eos_token_id=int(fields["tokenizer.ggml.eos_token_id"]),
        pad_token_id=int(fields["tokenizer.ggml.padding_token_id"]),
        dtype=dtype,
    )
    config.architectures = ["MistralForCausalLM"]
    return config


def _weights(reader: Any, fields: dict[str, Any], dtype: torch.dtype, progress: bool) -> dict[str, Tensor]:
    from gguf import dequantize
    from tqdm import tqdm

    heads = {
        "attn_q": int(fields["llama.attention.head_count"]),
        "attn_k": int(fields["llama.attention.head_count_kv"]),
    }
    weights = {}
    for tensor in tqdm(reader.tensors, desc="converting weights", unit="tensor", disable=not progress):
        part, _, ending = tensor.name.rpartition(".")
        if part.startswith("blk."):
            _, layer, part = part.split(".")
            target = f"model.layers.{layer}.{_LAYER_NAMES.get(part, part)}.{ending}"
        else:
            target = f"{_TOP_NAMES.get(part, part)}.{ending}"
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if part in heads:
            weight = _split_rotary_pairs(weight, heads[part])
        weights[target] = weight.to(dtype).contiguous()
    return weights


def _split_rotary_pairs(weight: Tensor, heads: int) -> Tensor:
    """(heads * head_dim, hidden): the rows of each head from 0, h, 1, h + 1, ... back to 0, 1, ..., with h = head_dim / 2."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _check_weights(weights: dict[str, Tensor], config: Any, gguf_file: Path) -> None:
    from transformers import MistralForCausalLM

    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in MistralForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        name = different[0]
        raise ValueError(
            f"{gguf_file}: {len(different)} tensors do not fit a Mistral of these sizes, the first is {name}: "
            f"found {found.get(name, 'none')}, expected {expected.get(name, 'none')}"
        )


def _tokenizer(fields: dict[str, Any], gguf_file: Path) -> Any:
    """The byte-level BPE tokenizer of the file; each digit stands alone, as the pre-tokenizer "smollm" defines it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"{gguf_file}: tokenizer {kind}, accepted is ('gpt2', 'smollm')")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields["tokenizer.ggml.merges"])]
    bos, eos, unk, pad = (
        tokens[int(fields[f"tokenizer.ggml.{role}_token_id"])] for role in ("bos", "eos", "unknown", "padding")
    )
    # The vocabulary lacks a few bytes; they become the unknown token instead of vanishing from the text.
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, unk_token=unk)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        pad_token=pad,
        padding_side="right",
        truncation_side="right",
        model_max_length=int(fields["llama.context_length"]),
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
