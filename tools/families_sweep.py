"""Tries every causal decoder of the installed transformers as patch() tries an unlisted one: admitted, or refused with a reason;
and those that it admits as `grit serve` does.

    python -m tools.families_sweep

writes the table behind the marker in docs/families.md (``make families`` runs it after tools.families_table).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import sys
import warnings
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import grit_kernels as gk
from grit_kernels.hf import proof
from grit_kernels.hf.patch import DROPOUT, FAMILIES
from tools.families_table import MARKER, TABLE

LAYERS = 8
"""Enough for every pattern of kinds; building the default number takes an hour."""
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 4, "num_hidden_layers": 8}
STATES = {"layer_types": ["linear_attention", "full_attention"] * 4, "num_hidden_layers": 8}
REPRESENTATIVE: dict[str, dict[str, Any]] = {
    **{"lfm2": CONVOLUTIONS, "lfm2_moe": CONVOLUTIONS, "granitemoehybrid": STATES},
    "bamba": {"attn_layer_indices": [1, 3, 5, 7], "num_hidden_layers": 8},
}
"""Changes where the default config is not of a model that people use: these have one kind of layer only."""
COMPLETE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
"""Values that some default configs leave open and every checkpoint's config sets."""

SINKS = ("gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "flint")
"""Types with attention sinks."""
RECURRENT = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "lfm2_moe", "lfm3", "olmo_hybrid"),
    *("granitemoehybrid", "falcon_h1"),
)
"""Types with layers that carry a state, which patch() begins anew with every sample."""
WRONG = ("minimax", "jamba", "bamba", "nemotron_h", "llama4_text")
"""Types that patch() would compute wrongly: states that it cannot begin anew or that transformers itself does not continue
rightly, chunked layers."""


def representative_model(model_type: str) -> Any:
    """The model of a type, with a config like that of its checkpoints and without memory for weights."""
    changes = REPRESENTATIVE.get(model_type, {})
    config = transformers.AutoConfig.for_model(model_type, **changes)
    if not changes and getattr(config, "num_hidden_layers", 0) > LAYERS:
        with contextlib.suppress(Exception):  # a pattern that wants more layers gets them
            return _built(transformers.AutoConfig.for_model(model_type, num_hidden_layers=LAYERS))
    return _built(config)


def _built(config: Any) -> Any:
    heads = getattr(config, "num_attention_heads", None)
    given = config.to_dict()
    for name, value in {**COMPLETE, "num_key_value_heads": heads}.items():
        if name in given and given[name] is None:
            setattr(config, name, value)
    if "head_dim" in given and given["head_dim"] is None:
        config.head_dim = config.hidden_size // heads
    for name in DROPOUT:
        if given.get(name):
            setattr(config, name, 0.0)  # as in inference; patch() refuses it by name
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tried(model_type: str) -> proof.Verdict:
    """The verdict of patch() on a type."""
    try:
        model = representative_model(model_type)
    except Exception as error:
        return proof.Verdict(float("nan"), f"its default config makes no model ({type(error).__name__})")
    try:
        if model_type in FAMILIES:
            return proof.verdict(model)
        gk.patch(model)
    except (TypeError, ValueError) as error:
        found = proof.verdict(model)
        return found if found.refusal else proof.Verdict(found.error, str(error))
    return proof.verdict(model)


def served(model_type: str) -> str | None:
    """Why `grit serve` cannot run a type that patch() admits, or None."""
    return gk.hf.packed_cache_refusal(representative_model(model_type))


def render(verdicts: dict[str, proof.Verdict], unserved: dict[str, str]) -> str:
    """The part of the page behind the marker."""
    admitted = {name: v for name, v in verdicts.items() if v.refusal is None}
    refused = {name: v for name, v in verdicts.items() if v.refusal is not None}
    version = importlib.metadata.version("transformers")
    lines = [
        MARKER,
        "",
        "## Every decoder of transformers",
        "",
        f"All {len(verdicts)} causal types of transformers {version} with their default configs, tried the way `patch()` tries",
        "a type that is not in the table above: on a tiny random model of the same class and config features, packed and alone,",
        f"causal and bidirectional, padded, and after a cache, in FP32. {len(admitted)} are correct and admitted,",
        f"{len(refused)} are refused with a reason, none is admitted and wrong: correct is within {proof.TOLERANCE:g} of the",
        "largest value. Other config features of the same type are tried separately.",
        "",
        "Layers that carry a state from token to token (Mamba 2, gated delta rule, short convolutions) begin anew with every",
        "sample. On a CPU transformers has no way to tell them where a sample ends: without the CUDA packages `causal-conv1d`",
        "and `flash-linear-attention` its convolutions and recurrences refuse `seq_idx` and `cu_seqlens`. So `patch()` lays the",
        "pack out as one row per sample around each such layer, and only there; the layer itself runs unchanged, and computes",
        "the padding of those rows. It reads forwards in a bidirectional sample too, as in the unpatched model; only the",
        "attention layers beside it see both sides. Refused are those that do not hand a pass on to such layers, and those that",
        "the unpatched model itself does not continue correctly after a cache.",
        "",
        f"Correct: {', '.join(f'`{name}`' for name in admitted)}.",
        "",
        "| refused | why |",
        "|---|---|",
        *(f"| `{name}` | {_cell(v.refusal or '')} |" for name, v in refused.items()),
        "",
        "## What `grit serve` runs",
        "",
        f"{len(admitted) - len(unserved)} of the {len(admitted)} types that `patch()` admits also compute the same in packed",
        "steps whose samples continue, over one memory of keys and values ([serving](serving.md)). The others:",
        "",
        "| not served | why |",
        "|---|---|",
        *(f"| `{name}` | {_cell(reason)} |" for name, reason in unserved.items()),
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    text = re.sub(r"0x[0-9a-f]+", "0x..", " ".join(text.split())).replace("|", "\\|")
    text = text.removeprefix("RuntimeError: model: ").split("; another library")[0]
    return text if len(text) <= 180 else text[:177] + "..."


def main() -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    verdicts: dict[str, proof.Verdict] = {}
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdicts[name] = found = tried(name)
        print(f"{name:28} {found.error:8.2g}  {found.refusal or 'right'}", flush=True)
    page = TABLE.read_text(encoding="utf-8").split(MARKER)[0].rstrip() + "\n\n"
    unserved = {name: why for name, v in verdicts.items() if v.refusal is None and (why := served(name)) is not None}
    TABLE.write_text(page + render(verdicts, unserved), encoding="utf-8")
    wrong = [name for name in WRONG if name in verdicts and verdicts[name].refusal is None]
    if wrong:
        print(f"admitted, but known to be wrong: {', '.join(wrong)}")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
