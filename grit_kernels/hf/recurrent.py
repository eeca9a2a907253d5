"""Layers that carry a state from token to token, in a packed pass: the state starts over where a sample begins.

transformers' mixers of this kind (short convolutions, Mamba, gated delta rule) take one sample per row. Their torch code ignores
or refuses the sample borders that their CUDA packages understand, so around such a mixer, and nowhere else, the pack is laid
out as one row per sample, padded on the right: a state moves forwards only, so what stands behind a sample cannot reach it.
The mixer itself runs as it is, with whatever kernels it has chosen; it computes the padding of its rows. It has one direction,
with ``is_causal=False`` too, as in the unpatched model.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from grit_kernels.hf import compat
from grit_kernels.packing import SamplePack
from grit_kernels.visibility import positions_and_samples

if TYPE_CHECKING:
    from grit_kernels.hf.attention_pass import AttentionPass

LAYER_KINDS = ("linear_attention", "conv")
"""What transformers' configs call such layers."""


def mixers(decoder: nn.Module) -> list[nn.Module]:
    """The modules of ``decoder`` that carry a state: those with a convolution per channel along the text that are called with
    ``hidden_states``, a cache and keywords of any name (which is how a pass reaches them)."""
    return [module for module in decoder.modules() if _convolves(module) and _takes_a_pass(type(module))]


def has_recurrent_layers(model: nn.Module) -> bool:
    """Whether some layers of ``model``'s decoder carry a state, so that a cache of keys and values is not enough for it."""
    return bool(mixers(compat.decoder_of(model)))


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv1d) and child.groups == child.in_channels for child in module.children())


def _takes_a_pass(kind: type[nn.Module]) -> bool:
    parameters = inspect.signature(kind.forward).parameters
    return "hidden_states" in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def attach(decoder: nn.Module) -> None:
    """Put the layout around every mixer. The hooks have no state, so copies and pickles of the model carry them along."""
    for mixer in mixers(decoder):
        mixer.register_forward_pre_hook(_rows, with_kwargs=True)
        mixer.register_forward_hook(_pack, with_kwargs=True)


def detach(decoder: nn.Module) -> None:
    """Undo :func:`attach`."""
    for module in decoder.modules():
        for hooks, kept in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in (_rows, _pack)]:
                del hooks[key], kept[key]


def check_cache(cache: Any) -> None:
    """Check that a cache given to a decoder with such layers has room for their states.

    Raises:
        ValueError: it holds keys and values only.
    """
    if not any(hasattr(layer, "update_conv_state") for layer in getattr(cache, "layers", ())):
        raise ValueError(
            "cache: expected one with room for the states of layers that do not attend, as transformers makes it "
            f"(use_cache=True, or DynamicCache(config=model.config)), got {type(cache).__name__} for keys and values"
        )


def places(pack: SamplePack) -> Tensor:
    """int64 (tokens): where each token of the pack stands among rows of the longest sample's length."""
    positions, samples = positions_and_samples(pack.cu_seqlens, pack.tokens)
    return samples * pack.max_seqlen + positions


def _rows(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """hidden_states (1, tokens, hidden) -> (samples, longest, hidden), zeros behind a sample."""
    given: AttentionPass | None = kwargs.get("grit_pass")
    if given is None or given.pack is None or given.places is None:
        return None
    pack = given.pack
    states = args[0] if args else kwargs["hidden_states"]
    count = len(pack)
    rows = states.new_zeros((count * pack.max_seqlen, states.shape[-1]))
    rows = rows.index_copy(0, given.places, states[0]).unflatten(0, (count, pack.max_seqlen))
    kwargs = {**kwargs, "attention_mask": None}
    if args:
        return (rows, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": rows}


def _pack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """(samples, longest, hidden) -> (1, tokens, hidden)."""
    given: AttentionPass | None = kwargs.get("grit_pass")
    if given is None or given.places is None:
        return None
    return output.flatten(0, 1).index_select(0, given.places)[None]
