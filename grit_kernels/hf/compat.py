"""What differs between transformers' versions (5.17 up to 6), found by signature and structure, never by a version number.

Nothing outside this file may know it. The one large difference is the name of the KV cache: ``past_key_values`` became
``cache`` in 5.24, where the old name draws a warning from every call and goes away later.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

CACHE_NAMES = ("cache", "past_key_values")


@functools.cache
def arguments_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's or method's arguments in order, without ``self`` and ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return tuple(p.name for p in parameters if p.kind not in kinds and p.name != "self")


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Under which name ``function`` takes a KV cache; None where it takes none."""
    return next((name for name in CACHE_NAMES if name in arguments_of(function)), None)


def cache_keyword(model: Any, cache: Any) -> dict[str, Any]:
    """``cache`` under the keyword that ``model.forward`` and ``model.generate`` of this version take it by."""
    name = cache_argument(type(unwrapped(model)).forward)
    if name is None:
        raise TypeError(f"model: expected one that takes a KV cache, got {type(model).__name__}")
    return {name: cache}


def take_cache(arguments: dict[str, Any]) -> Any:
    """The cache of a call, removed from its keyword arguments; either name will do.

    Raises:
        ValueError: it is given under both names.
    """
    given = [arguments.pop(name, None) for name in CACHE_NAMES]
    if all(cache is not None for cache in given):
        raise ValueError(f"{', '.join(CACHE_NAMES)}: expected one of these names of the KV cache, got both")
    return given[1] if given[0] is None else given[0]


def new_cache(states: Iterable[tuple[Tensor, Tensor]] | None = None, *, config: Any = None) -> Any:
    """A cache that grows and keeps every state; filled with ``states``, (keys, values) of each layer, if there are some.

    Made without a config on purpose: with one, transformers drops what lies beyond a sliding window, which attention does
    by itself. A decoder whose layers carry a state (recurrent.py) needs the ``config``, by which transformers makes room for it.
    keys and values: (B, heads, tokens, head_dim).
    """
    from transformers import DynamicCache

    options = {} if config is None else {"config": config}
    return DynamicCache(**options) if states is None else DynamicCache(list(states), **options)


def cached_states(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer, (B, heads, tokens, head_dim); layers without attention are not accepted."""
    states = [(layer.keys, layer.values) for layer in cache.layers]
    if any(keys is None or values is None for keys, values in states):
        raise ValueError("cache: expected keys and values in every layer, got an empty one")
    return states


def causal_mask(config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Any) -> Any:
    """What transformers' own causal mask of a pass is under the config's attention implementation."""
    from transformers.masking_utils import create_causal_mask

    name = cache_argument(create_causal_mask)
    assert name is not None
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=None,
        **{name: cache},
    )


def reads_texts_both_ways(flag: Any) -> bool:
    """Whether a config's ``use_bidirectional_attention`` holds for texts: "vision" is about the tokens of images alone."""
    return flag not in (None, False, "vision")


def unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile's and PEFT's wrappers."""
    inner = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def check_unwrapped(model: Any) -> None:
    """For code that calls the decoder and the head by themselves: check that PEFT's wrapper does no more than call the model.

    Raises:
        ValueError: it adds tokens or states (prompt learning) or tells adapters where to act (aLoRA, X-LoRA): that would be lost.
    """
    adapters = getattr(getattr(model, "_orig_mod", model), "peft_config", None)
    for adapter in adapters.values() if isinstance(adapters, dict) else ():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        alora = getattr(adapter, "alora_invocation_tokens", None) is not None
        if adapter.is_prompt_learning or alora or kind == "XLORA":
            raise ValueError(
                f"model: expected adapters that are part of the layers, as LoRA is, got {'aLoRA' if alora else kind}, which acts "
                "in PEFT's own forward: call the model itself"
            )


def decoder_of(model: Any) -> Any:
    """The bare decoder inside ``model``, which may be one itself, have a language-model head or be wrapped."""
    inner = unwrapped(model)
    found = inner.get_decoder() if hasattr(inner, "get_decoder") else inner.base_model
    # where a head calls its own last layer "decoder", get_decoder() returns that layer
    return found if hasattr(found, "config") else inner.base_model


def layers_of(decoder: Any) -> Sequence[nn.Module]:
    """The decoder's layers in order."""
    count = decoder.config.num_hidden_layers
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return list(child)
    raise TypeError(f"model: expected a decoder with {count} layers in one list, got {type(decoder).__name__}")


def rotary_of(decoder: Any) -> Any:
    """The module that makes the rotary tables for all layers, or None."""
    return getattr(decoder, "rotary_emb", None)


def checkpoints_activations(model: Any) -> bool:
    """Whether gradient checkpointing is on, without asking a property whose name has changed."""
    return any(getattr(module, "gradient_checkpointing", False) for module in unwrapped(model).modules())


def checkpoint_activations(model: Any, options: dict[str, Any] | None = None, *, keep_attention: bool = False) -> None:
    """Turn gradient checkpointing on; ``options`` are those of ``torch.utils.checkpoint``.

    ``keep_attention``: what attention gives is kept, so the backward pass recomputes everything else but not attention, whose
    cost grows with the square of a sample's length.
    """
    if keep_attention:
        options = {**(options or {}), "use_reentrant": False, "context_fn": _keeping_attention}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def _keeping_attention() -> Any:
    import torch
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    kept = torch.ops.grit_kernels.attention_forward.default

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def expert_balance_loss(router_logits: Any, num_experts: int, top_k: int) -> Tensor:
    """transformers' load-balancing loss of a mixture of experts over all tokens of ``router_logits``, a scalar."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(router_logits, num_experts, top_k)
    assert isinstance(loss, Tensor)
    return loss
