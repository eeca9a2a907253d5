"""Moves cached keys to other positions: exact for rotary embeddings, verified per model.

A key at position p is R(p) k, and R(a) R(b) = R(a + b); so R(new - old) turns the stored key into the one the model would have
computed at the new position from the same hidden state. Keys are rotated in FP32 from the stored copy and rounded once,
so the error does not grow with the distance.

Note that a document's states still have not seen the texts it is joined with.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from python_model.generate.states import TextStates, concatenate
from python_model.model.modeling import GritLM
from python_model.rag.reading import read

STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE variants whose frequencies do not depend on the length of the text."""
_CHECK_TOKENS = 24
_CHECK_OFFSET = 1000

_checked: weakref.WeakKeyDictionary[torch.nn.Module, float] = weakref.WeakKeyDictionary()


def frequencies(model: GritLM) -> Tensor:
    """Radians per position, float64 (rotary_dim / 2).

    Raises:
        ValueError: the model has no rotary embedding, or one that changes with the length.
    """
    rotary = getattr(model.decoder[0], "rotary_emb", None)
    inverse = getattr(rotary, "inv_freq", None)
    kind = getattr(rotary, "rope_type", "default")
    if inverse is None or kind not in STATIC_ROPE_TYPES:
        raise ValueError(
            f"model: expected rotary embeddings of type {', '.join(map(repr, STATIC_ROPE_TYPES))} to move cached keys, "
            f"got {kind if inverse is not None else None!r}"
        )
    return inverse.detach().double()


def rotate(keys: Tensor, distance: Tensor, radians: Tensor) -> Tensor:
    """Keys (..., tokens, head_dim) rotated by ``distance`` (tokens) positions; channel i is paired with i + rotary_dim / 2."""
    half = radians.shape[0]
    angle = distance.to(keys.device).double()[:, None] * radians.to(keys.device)  # [tokens, rotary_dim / 2]
    cos, sin = angle.cos().float(), angle.sin().float()
    x = keys.float()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return turned.to(keys.dtype)


def move(states: TextStates, positions: Tensor, model: GritLM) -> TextStates:
    """``states`` with their keys at ``positions`` (tokens)."""
    distance = positions.to(states.positions.device) - states.positions
    if not bool(distance.any()):
        return states
    check(model)
    keys = rotate(states.keys_values[:, 0], distance, frequencies(model))
    return replace(
        states,
        keys_values=torch.stack([keys, states.keys_values[:, 1]], dim=1),
        positions=positions.to(states.positions.device),
    )


def join(parts: Sequence[TextStates], model: GritLM) -> tuple[TextStates, list[int]]:
    """One cache of several texts, and where each starts in it: each text's keys are moved after those of the previous one.

    A BOS at the start of any but the first text is dropped.
    """
    bos = model.tokenizer.bos_token_id
    moved: list[TextStates] = []
    starts: list[int] = []
    end = 0
    for part in parts:
        if moved and bos is not None and len(part) > 1 and int(part.input_ids[0]) == bos:
            part = part.slice(1)
        moved.append(move(part, torch.arange(end, end + len(part)), model))
        starts.append(end)
        end += len(part)
    return concatenate(moved), starts


def check(model: GritLM) -> float:
    """Largest relative error, over the layers, of moved keys against keys that the model computes at the new positions.

    Run once per loaded model, before its first key is moved; two short forward passes.

    Raises:
        ValueError: the error exceeds rounding (16 roundings of the model's dtype, and 1e-4), so this model's keys are not
            rotated as assumed and joining its caches would corrupt them.
    """
    decoder = model.decoder[0]
    if decoder not in _checked:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.model.config.vocab_size, (_CHECK_TOKENS,), generator=generator).tolist()
        (near,) = read(model, [ids], causal=True)
        (far,) = read(model, [ids], causal=True, start=_CHECK_OFFSET)
        moved = rotate(near.keys_values[:, 0], far.positions - near.positions, frequencies(model)).float()
        want = far.keys_values[:, 0].float()
        error = float(((moved - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)).max())
        allowed = max(1e-4, 16 * torch.finfo(model.model.dtype).eps)
        if not error <= allowed:
            raise ValueError(
                f"model: moved keys differ from computed ones by {error:.2g} (accepted up to {allowed:.2g}), so the caches of "
                f"a {type(decoder).__name__} of this kind cannot be joined; use a mode with one cached text"
            )
        _checked[decoder] = error
    return _checked[decoder]
