"""fingerprint(model): identifies the model that made stored vectors and states."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from python_model.model.modeling import GritLM

_SAMPLES = 512  # values per parameter: any training step changes most of them
_CONFIG = (
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


def fingerprint(model: GritLM) -> str:
    """Hex digest over the architecture, a sample of every weight and the tokenizer.

    Weights are compared in bfloat16, so a model's fingerprint does not depend on the dtype it was loaded in.
    """
    digest = hashlib.sha256()
    config = {name: getattr(model.model.config, name, None) for name in _CONFIG}
    config["rope"] = str(getattr(model.model.config, "rope_parameters", None))
    _add(digest, config | _unusual(model.model.config))
    _add_weights(digest, model.decoder[0])
    tokenizer = model.tokenizer
    probe = "<|user|>\nWhat is 12 + 7?\n<|embed|>\n\u00c9t\u00e9, \u6771\u4eac."
    _add(digest, [len(tokenizer), tokenizer.bos_token_id, tokenizer(probe, add_special_tokens=False)["input_ids"]])
    return digest.hexdigest()[:32]


def _unusual(config: Any) -> dict[str, Any]:
    """What else of a config changes states; empty for a usual Mistral, whose fingerprint stays what it was."""
    found = {name: value for name in _WHERE_PRESENT if (value := getattr(config, name, None)) is not None}
    if found.get("hidden_act") == "silu":
        del found["hidden_act"]
    usual = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    if set(found.get("layer_types", ())) == {usual}:
        del found["layer_types"]
    return found


def embedding_settings(model: GritLM) -> dict[str, Any]:
    """What else an embedding depends on: settings, special tokens around a text, the weights of an embedding head."""
    projection = None
    if model.projection is not None:
        digest = hashlib.sha256()
        _add_weights(digest, model.projection)
        projection = digest.hexdigest()[:32]
    special = model.formatter.special_tokens
    return {
        **model.settings.of_embeddings(),
        "special_tokens": [list(special.start), list(special.end)],
        "projection": projection,
    }


def _add_weights(digest: Any, module: torch.nn.Module) -> None:
    for name, weight in sorted(module.named_parameters()):
        plain = weight.to_dense() if weight.is_mkldnn else weight  # see python_model.model.packed_linear
        flat = plain.detach().reshape(-1)
        chosen = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).round().long()
        values = flat[chosen.to(flat.device)].to("cpu", torch.bfloat16)
        digest.update(name.encode())
        digest.update(values.view(torch.int16).numpy().tobytes())


def _add(digest: Any, value: Any) -> None:
    digest.update(json.dumps(value, sort_keys=True).encode())
