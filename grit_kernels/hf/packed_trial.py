"""Decides whether a kind of decoder computes packed passes over a :class:`PackedCache`, by a trial on a tiny random model.

Like proof.py, whose tiny model it uses: samples that are read piece by piece, whole, in either direction and with one token at a
time share passes, and each must give what it gives alone in the unpatched model with eager attention.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grit_kernels.hf import compat, proof, recurrent, rope
from grit_kernels.hf.interface import served_size
from grit_kernels.packing import SamplePack


class StatesGeometry(NamedTuple):
    """What a decoder keeps of each token: ``layers`` times keys and values of ``heads`` heads, in ``dtype``. ``size``: of a key
    and a value; where the two differ, of the larger. ``served``: the size in which a :class:`PackedCache` holds them."""

    layers: int
    heads: int
    size: int
    served: int
    dtype: torch.dtype


@torch.no_grad()
def states_geometry(model: Any) -> StatesGeometry:
    """Found by reading one token into a stock cache.

    Raises:
        ValueError: layers of different geometry, or layers that carry a state.
    """
    decoder = compat.decoder_of(model)
    _refuse_recurrent(decoder)
    cache = compat.new_cache()
    decoder(torch.zeros((1, 1), dtype=torch.int64, device=decoder.device), **{_cache_name(decoder): cache})
    states = compat.cached_states(cache)
    kinds = sorted(
        {(tuple(k.shape[1::2]), tuple(v.shape[1::2])) for k, v in states}
    )  # (heads, size) of keys, of values
    (heads, size), (heads_of_values, size_of_values) = kinds[0]
    dtype = states[0][0].dtype
    if len(kinds) > 1 or heads != heads_of_values or {x.dtype for pair in states for x in pair} != {dtype}:
        raise ValueError(
            "model: expected layers that all keep keys and values of one number of heads, size and dtype, got "
            f"(heads, size) of keys and values {', '.join(map(str, kinds))}"
        )
    size = max(size, size_of_values)
    return StatesGeometry(len(states), heads, size, served_size(size), dtype)


def own_logits(model: Any, states: Tensor) -> Tensor:
    """(tokens, hidden) states after the last norm -> (tokens, vocabulary), by the causal language model's own forward: whatever
    it does around its head (biases, scales, soft caps) is done."""
    inner = compat.unwrapped(model)
    head = _without_decoder(inner, compat.decoder_of(inner))
    # the class's forward: the instance's may be another's, which calls the decoder that is left out here
    return type(inner).forward(head, inputs_embeds=states[None], use_cache=False).logits[0]


class _Stated(nn.Module):
    """In the place of a decoder whose states are known."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return _Output(inputs_embeds)


class _Output:
    """A decoder's output that has nothing but states, under whatever names a head looks for the rest."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _without_decoder(module: Any, decoder: Any) -> Any:
    """A copy of a module around ``decoder`` that shares everything but the decoder."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = {name: _stated(child, decoder) for name, child in module._modules.items()}
    return copied


def _stated(child: Any, decoder: Any) -> Any:
    if child is decoder:
        return _Stated()
    around = child is not None and any(part is decoder for part in child.modules())
    return _without_decoder(child, decoder) if around else child


def packed_cache_refusal(model: Any) -> str | None:
    """Why ``model``, which :func:`patch` accepts, cannot run packed passes over a :class:`PackedCache`; None: it can.

    Tried once per process and kind of model; takes about half a second.
    """
    inner = compat.unwrapped(model)
    model_class, config = type(inner), inner.config
    try:
        _refuse_recurrent(compat.decoder_of(inner))
        values = proof.tiny_values(config)
        if rope.depends_on_length(compat.decoder_of(inner)):
            values = _of_unscaled_length(values)
    except ValueError as reason:
        return str(reason).removeprefix("model: ")
    kinds: tuple[Any, Any] = (model_class, type(config))
    return _tried(*kinds, values)


def _refuse_recurrent(decoder: Any) -> None:
    found = sorted({type(mixer).__name__ for mixer in recurrent.mixers(decoder)})
    if found:
        raise ValueError(
            f"model: expected layers that keep keys and values, got {', '.join(found)}, which carry a state from token to token"
        )


def _of_unscaled_length(values: proof.Values) -> proof.Values:
    """The config's values with rotary frequencies that do not change within a trial: keys in a cache keep theirs, so longer
    texts are not for it (see :func:`frequency_change`)."""
    found = proof.Values({**values, "max_position_embeddings": proof.SIZES["max_position_embeddings"]})
    if "original_max_position_embeddings" in found:
        found["original_max_position_embeddings"] = found["max_position_embeddings"]
    parameters = dict(found["rope_parameters"])
    if parameters.get("original_max_position_embeddings"):
        parameters["original_max_position_embeddings"] = found["max_position_embeddings"]
    found["rope_parameters"] = parameters
    return found


def _cache_name(decoder: Any) -> str:
    name = compat.cache_argument(type(decoder).forward)
    if name is None:
        raise ValueError(f"model: expected a decoder that takes a KV cache, got {type(decoder).__name__}")
    return name


@functools.cache
def _tried(model_class: type, config_class: type, values: proof.Values) -> str | None:
    try:
        with proof.alone():
            error = _try(model_class, config_class(**values))
    except Exception as failure:
        return proof.named(failure)
    if not error <= proof.TOLERANCE:
        return f"on a tiny random model, packed passes over a cache are off by {error:.2g} of the largest value"
    return None


PIECES = (
    ((0, 14, True), (2, 5, True)),
    ((0, 6, True), (1, 11, False), (2, 1, True)),
    ((2, 1, True), (0, 1, True), (1, 11, False)),
    ((0, 1, True), (2, 1, True)),
)
"""The passes of a trial: (text, new tokens, causal) of each sample."""
LENGTHS = (22, 11, 8)
ROWS = 60
"""Rows of a layer; more than the texts need, so that what lies between them is seen to be ignored."""
STARTS = (31, 0, 15)


def _try(model_class: Any, config: Any) -> float:
    """The largest difference from what a text gives alone, as a fraction of the largest value, in states and logits."""
    config._attn_implementation = "eager"
    stock = model_class(config).eval().float()
    proof.draw_weights(stock)
    model = proof.patched_copy(stock)
    plain, patched = compat.decoder_of(stock), compat.decoder_of(model)
    texts = [torch.randint(3, 97, (1, length)) for length in LENGTHS]
    truth = [
        proof.alone_in_stock(plain, text, causal)[0] for text, causal in zip(texts, (True, False, True), strict=True)
    ]
    geometry = states_geometry(patched)
    keys, values = torch.full((2, geometry.layers * ROWS, geometry.heads, geometry.served), float("nan"))
    expected, found, done = [], [], [0] * len(texts)
    for samples in PIECES:
        ids = [texts[text][0, done[text] * causal :][:new] for text, new, causal in samples]
        past = [done[text] * causal for text, _, causal in samples]
        states = patched(
            torch.cat(ids)[None],
            sample_pack=SamplePack.from_lengths([len(x) for x in ids], [causal for _, _, causal in samples]),
            cache=_cache_of(keys, values, geometry.layers, [STARTS[text] for text, _, _ in samples], past, ids),
        )[0][0]
        found.append(states)
        for (text, new, causal), before in zip(samples, past, strict=True):
            expected.append(truth[text][before : before + new])
            done[text] = before + new if causal else 0
    largest = max(float(x.abs().max()) for x in expected)
    error = float((torch.cat(found) - torch.cat(expected)).abs().max()) / largest
    if compat.unwrapped(stock) is not plain:
        logits = stock(texts[0], use_cache=False).logits[0]
        error = max(error, float((own_logits(model, truth[0]) - logits).abs().max() / logits.abs().max()))
    return error


def _cache_of(keys: Tensor, values: Tensor, layers: int, starts: list[int], past: list[int], ids: list[Tensor]) -> Any:
    from grit_kernels.hf.packed_cache import PackedCache

    lengths = [before + len(new) for before, new in zip(past, ids, strict=True)]
    positions = torch.cat([torch.arange(before, end) for before, end in zip(past, lengths, strict=True)])
    first = torch.cat([torch.full((len(new),), start) for start, new in zip(starts, ids, strict=True)])
    base = torch.arange(layers)[:, None] * ROWS
    return PackedCache(
        keys,
        values,
        rows=base + (first + positions)[None],
        starts=[torch.tensor(starts, dtype=torch.int32) + int(layer) for layer in base],
        lengths=torch.tensor(lengths, dtype=torch.int32),
        longest=max(lengths),
        positions=positions,
    )
