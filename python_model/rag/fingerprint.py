"""fingerprint(model): identifies the model that made stored vectors and states."""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import torch

from python_model.model.identity import states_config
from python_model.model.modeling import GritLM

_SAMPLES = 512  # values per parameter: any training step changes most of them


def fingerprint(model: GritLM) -> str:
    """Hex digest over the architecture, a sample of every weight and the tokenizer.

    Weights are compared in bfloat16, so a model's fingerprint does not depend on the dtype it was loaded in.
    """
    digest = hashlib.sha256()
    _add(digest, states_config(model.model.config))
    _add_weights(digest, model.decoder[0])
    tokenizer = model.tokenizer
    probe = "<|user|>\nWhat is 12 + 7?\n<|embed|>\n\u00c9t\u00e9, \u6771\u4eac."
    _add(digest, [len(tokenizer), tokenizer.bos_token_id, tokenizer(probe, add_special_tokens=False)["input_ids"]])
    return digest.hexdigest()[:32]


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
        plain = weight.detach()
        if plain.is_mkldnn:  # see python_model.model.packed_linear
            plain = plain.to_dense()
        elif type(weight).dequantize is not torch.Tensor.dequantize:  # a class of its own, such as torchao's
            plain = cast(Any, weight).dequantize()
        flat = plain.reshape(-1)
        chosen = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).round().long()
        values = flat[chosen.to(flat.device)].to("cpu", torch.bfloat16)
        digest.update(name.encode())
        digest.update(values.view(torch.int16).numpy().tobytes())


def _add(digest: Any, value: Any) -> None:
    digest.update(json.dumps(value, sort_keys=True, default=repr).encode())
