"""Identifies the model that made stored vectors and states, also by what earlier versions recorded."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from python_model.model.identity import MARK, fingerprint, plain_weight, states_config, weights_digest
from python_model.model.modeling import GritLM

_SAMPLES = 512


def former_fingerprint(model: GritLM) -> str:
    """What earlier versions recorded: it knows 512 values of each weight and how one text is tokenised."""
    digest = hashlib.sha256()
    _add(digest, states_config(model.model.config))
    _add_samples(digest, model.decoder[0])
    tokenizer = model.tokenizer
    probe = "<|user|>\nWhat is 12 + 7?\n<|embed|>\n\u00c9t\u00e9, \u6771\u4eac."
    _add(digest, [len(tokenizer), tokenizer.bos_token_id, tokenizer(probe, add_special_tokens=False)["input_ids"]])
    return digest.hexdigest()[:32]


def made_by(recorded: str | None, model: GritLM) -> bool:
    """Whether ``recorded`` is the fingerprint of this model, by this version or an earlier one."""
    if recorded is None:
        return False
    return recorded == (fingerprint(model) if recorded.startswith(MARK) else former_fingerprint(model))


def embedding_settings(model: GritLM) -> dict[str, Any]:
    """What else an embedding depends on: settings, special tokens around a text, the weights of an embedding head (a sample of
    them, as earlier versions recorded, and their whole content)."""
    sample = content = None
    if model.projection is not None:
        digest = hashlib.sha256()
        _add_samples(digest, model.projection)
        sample = digest.hexdigest()[:32]
        content = weights_digest(model.projection, torch.bfloat16)[:32]
    special = model.formatter.special_tokens
    return {
        **model.settings.of_embeddings(),
        "special_tokens": [list(special.start), list(special.end)],
        "projection": sample,
        "projection_content": content,
    }


def _add_samples(digest: Any, module: torch.nn.Module) -> None:
    for name, weight in sorted(module.named_parameters()):
        flat = plain_weight(weight).reshape(-1)
        chosen = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).round().long()
        values = flat[chosen.to(flat.device)].to("cpu", torch.bfloat16)
        digest.update(name.encode())
        digest.update(values.view(torch.int16).numpy().tobytes())


def _add(digest: Any, value: Any) -> None:
    digest.update(json.dumps(value, sort_keys=True, default=repr).encode())
