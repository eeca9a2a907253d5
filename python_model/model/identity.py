"""states_config(config): what of a transformers config changes a decoder's states, beside its weights."""

from __future__ import annotations

from typing import Any

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
_LIMITS = ("max_position_embeddings", "n_positions")
"""Nothing is computed with them, but for some kinds of scaled rotary embeddings."""


def states_config(config: Any, *, training: bool = False) -> dict[str, Any]:
    """Every field of ``config`` that can change the states of a text, and with ``training`` a loss, as plain values.

    Fields that are not known are included if they differ from the default of the config's class, so that a field which a new
    version of transformers introduces does not change the result for a checkpoint that does not use it.
    """
    found = {name: getattr(config, name, None) for name in _ALWAYS}
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


def _scales(rope: Any) -> bool:
    """Whether the rotary embeddings are of a kind whose scaling may depend on the model's largest length."""
    nested = [p for p in (rope or {}).values() if isinstance(p, dict)] or [rope or {}]
    return any(p.get("rope_type", "default") not in ("default", "linear") for p in nested)


def _defaults(kind: type) -> dict[str, Any]:
    try:
        return dict(kind().to_dict())
    except (TypeError, ValueError):  # a config that cannot be made without arguments
        return {}
