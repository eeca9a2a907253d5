"""One packed step: decoding rows, chunks of prompts and texts to embed share every product and one attention call per layer.

Generalises :mod:`python_model.generate.step` to samples of any length, each with its own flag and its own range of keys in
an :class:`~python_model.serve.arena.Arena`:

    x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),  n = rms_norm(x)
    x = x + down_proj(act(gate_proj(m)) * up_proj(m)),                       m = rms_norm(x)

Everything with weights is the model's own module. Other families run the same steps through their own forward (own_forward.py). A
sample's result does not depend on what shares the step, except for the summation order of matrix products.

On a CPU, oneDNN generates code for 16-bit products of each number of rows, and keeps it; that takes longer than the products.
As steps have any number of rows, they are rounded up to one of few, with rows that attend to nothing and that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import grit_kernels as gk
from grit_kernels.attention import packed_problem, prepared_attention
from python_model.generate.step import LEAST_HEAD, add_and_norm, heads_fit, unlike
from python_model.model.heads import head_size
from python_model.model.losses import next_token_losses
from python_model.model.modeling import GritLM
from python_model.rag.rope import STATIC_ROPE_TYPES
from python_model.serve.arena import Arena, Interval

if TYPE_CHECKING:
    from grit_kernels.attention.problem import AttentionProblem
    from python_model.serve.graphs import DecodingGraphs

KNOWN = ("Llama", "Mistral", "Mixtral", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe")
WITHOUT_WINDOW = ("LlamaDecoderLayer",)


@dataclass(frozen=True)
class Item:
    """A sample of a step.

    Attributes:
        ids: its new tokens, at least one.
        interval: where its states go, after the ``past`` ones it holds already; None for a text read whole in scratch rows.
        past: tokens before the new ones.
        causal: True: sees only its past. False: sees all of the text, which must then be whole.
        causal_prefix: leading tokens of a bidirectional text that are causal, for a model with causal instructions
            (``attn="cb.."``). None for other models.
    """

    ids: Sequence[int]
    interval: Interval | None = None
    past: int = 0
    causal: bool = True
    causal_prefix: int | None = None


@dataclass(frozen=True)
class Call:
    """The arguments of a step's attention, which all layers share. B counts the sample of spare rows, if there is one.

    ``problems``: what the layers share but for where the keys lie, by window and scale; made by the first of them.
    """

    causal: Tensor
    cu_seqlens: Tensor
    starts: Sequence[Tensor]  # of each layer, int32 (B)
    lengths: Tensor
    longest: tuple[int, int]
    hi: Tensor | None  # int32 (tokens), the upper bounds without a window
    nearest: Tensor | None  # int32 (tokens), the key after each token's own
    problems: dict[tuple[int | None, float], tuple[AttentionProblem, dict[Any, Tensor]]] = field(default_factory=dict)


def unfit(model: GritLM) -> str | None:
    """Why :class:`PackedStep` cannot compute what ``model`` does, or None."""
    if (what := unlike(model.model, KNOWN)) is not None:
        return f"model: expected a plain one of transformers' {', '.join(KNOWN)}, got {what}"
    rope = getattr(model.decoder[0].rotary_emb, "rope_type", "default")
    if rope not in STATIC_ROPE_TYPES:
        # other types scale positions by the longest sequence in the batch, so a neighbour would change the result
        return f"model: expected rotary positions of type {', '.join(STATIC_ROPE_TYPES)}, got {rope!r}"
    if not heads_fit(model.model.config):
        size = head_size(model.model.config)
        return f"model: expected heads of a multiple of 8 from {LEAST_HEAD} on, as the kernels read them, got {size}"
    return None


class PackedStep:
    """Steps of one model over one arena.

    Args:
        model: see :func:`unfit`.
        arena: with the model's geometry, dtype and device.
        rounds: compute a number of rows that :func:`rounded` gives; default: on a CPU with weights of 16 bits.

    ``graphs``: captured decoding steps (graphs.py); set by whoever knows how many sequences there will be.

    Raises:
        ValueError: a model that is refused, with the reason.
    """

    def __init__(self, model: GritLM, arena: Arena, *, rounds: bool | None = None) -> None:
        self.model, self.arena, self.decoder = model, arena, model.decoder[0]
        self._prepare()
        in_16_bits = arena.keys.device.type == "cpu" and arena.keys.dtype != torch.float32
        self.rounds = in_16_bits if rounds is None else rounds
        self.graphs: DecodingGraphs | None = None

    @property
    def can_be_captured(self) -> bool:
        """Whether a decoding step has fixed sizes and reads nothing back: not with experts, each of which takes some tokens."""
        return all(type(layer.mlp).__name__.endswith("MLP") for layer in self.decoder.layers)

    def _prepare(self) -> None:
        reason = unfit(self.model)
        if reason is not None:
            raise ValueError(reason)
        config = self.model.model.config
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.windows = [_window(layer, config) for layer in self.decoder.layers]

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> tuple[Tensor, list[int]]:
        """States after the last norm (tokens, hidden), samples in the given order, and where each begins (B + 1)."""
        if self.graphs is not None and self.graphs.takes(items):
            self._rows(items)  # which checks them
            hidden = self.graphs(items)
            self._note(items)
            return hidden, list(range(len(items) + 1))
        rows, starts = self._rows(items)
        tokens = rows.shape[1]
        spare = rounded(tokens) - tokens if self.rounds else 0
        call = self._call(items, starts, spare)
        device = self.arena.keys.device
        ids = torch.tensor([*(token for item in items for token in item.ids), *[0] * spare], device=device)
        positions = [np.arange(item.past, item.past + len(item.ids)) for item in items]
        where = torch.from_numpy(np.concatenate([*positions, np.zeros(spare, np.int64)])).to(device)
        x = self._states(ids, where, rows, call)
        self._note(items)
        offsets = list(accumulate((len(item.ids) for item in items), initial=0))
        return x[:tokens], offsets

    def decode(self, numbers: Tensor, causal: Tensor, cu_seqlens: Tensor) -> Tensor:
        """A step of samples of one token each, whose sizes depend on no value: what a CUDA graph captures.

        ``numbers`` int64 (4, B): token, position, first row of the sequence in layer 0, keys with the new one (0: no sample).
        ``causal`` (B) all true, ``cu_seqlens`` int32 (0 .. B). Returns states after the last norm (B, hidden).
        """
        arena = self.arena
        ids, positions, first, keys = numbers.unbind()
        layers = torch.arange(arena.layers, device=numbers.device)[:, None] * arena.rows
        scratch = cu_seqlens[:-1].to(torch.int64) + arena.scratch_start
        rows = torch.where(keys > 0, first + positions + layers, scratch)
        starts = (first + layers).to(torch.int32).unbind()
        lengths = keys.to(torch.int32)
        call = Call(causal, cu_seqlens, starts, lengths, (1, arena.rows), None, None)
        return self._states(ids, positions, rows, call)

    def _note(self, items: Sequence[Item]) -> None:
        for item in items:
            if item.interval is not None:
                item.interval.filled = item.past + len(item.ids)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocabulary)."""
        rows = hidden.shape[0]
        if self.rounds:
            hidden = functional.pad(hidden, (0, 0, 0, rounded(rows) - rows))
        return self._head(hidden)[:rows]

    @torch.inference_mode()
    def label_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """States and labels of the same rows -> float32 (rows): minus each label's log-probability, 0 for IGNORE_INDEX."""
        return next_token_losses(self.model, hidden, labels)

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.model.get_output_embeddings()(hidden)

    def _states(self, ids: Tensor, positions: Tensor, rows: Tensor, call: Call) -> Tensor:
        """Token ids and positions, int64 (rows of the step), -> states after the last norm (rows of the step, hidden)."""
        decoder = self.decoder
        x = decoder.embed_tokens(ids)
        tables = decoder.rotary_emb(x, positions[None])  # cos, sin (1, tokens, D)
        branch: Tensor | None = None  # of the previous layer, not yet added to x
        for index, layer in enumerate(decoder.layers):
            h, x = add_and_norm(x, branch, layer.input_layernorm)
            attended = self._attention(layer.self_attn, index, h, tables, rows[index], call)
            h, x = add_and_norm(x, attended, layer.post_attention_layernorm)
            branch = layer.mlp(h[None])[0]  # a mixture of experts expects (B, T, hidden)
        x, _ = add_and_norm(x, branch, decoder.norm)
        return x

    def _rows(self, items: Sequence[Item]) -> tuple[Tensor, np.ndarray]:
        """Where each new token's states go, int64 (layers, tokens), and the first key row of each sample, (layers, B)."""
        arena = self.arena
        scratch = arena.scratch_start
        starts, strides, places = [], [], []
        for item in items:
            new = len(item.ids)
            if not new:
                raise ValueError("ids: expected at least one token, got none")
            if item.interval is None:
                if item.past:
                    raise ValueError(f"past: expected 0 for a text in scratch rows, got {item.past}")
                start, stride = scratch, 0
                scratch += new
            else:
                if item.past + new > item.interval.rows or item.past > item.interval.filled:
                    raise ValueError(
                        f"past: expected at most {item.interval.filled} filled rows, and with {new} new ones at most "
                        f"{item.interval.rows}, got {item.past}"
                    )
                start, stride = item.interval.start, arena.rows
            starts.append(start)
            strides.append(stride)
            places.append(np.arange(start + item.past, start + item.past + new))
        if scratch > arena.scratch_start + arena.scratch:
            raise ValueError(
                f"ids: expected at most {arena.scratch} tokens in scratch rows, got {scratch - arena.scratch_start}"
            )
        layers = np.arange(arena.layers)[:, None]
        per_token = np.repeat(strides, [len(item.ids) for item in items])
        rows = np.concatenate(places)[None] + layers * per_token[None]
        return torch.from_numpy(rows).to(arena.keys.device), np.array(starts)[None] + layers * np.array(strides)[None]

    def _call(self, items: Sequence[Item], starts: np.ndarray, spare: int) -> Call:
        """The attention call of each layer; ``spare`` rows at the end are a sample without keys, whose output is 0."""
        device = self.arena.keys.device
        lens_q = [len(item.ids) for item in items]
        lens_k = [item.past + len(item.ids) for item in items]
        causal = [item.causal for item in items]
        first_keys = starts.astype(np.int32)
        hi = nearest = None
        if any(item.causal_prefix is not None for item in items):
            hi = np.concatenate([_upper_bounds(item) for item in items])
            nearest = np.concatenate([np.arange(item.past, item.past + len(item.ids)) + 1 for item in items])
        if spare:
            lens_q.append(spare)
            lens_k.append(0)
            causal.append(True)
            first_keys = np.pad(first_keys, ((0, 0), (0, 1)))
            if hi is not None and nearest is not None:
                hi, nearest = np.pad(hi, (0, spare)), np.pad(nearest, (0, spare))
        return Call(
            torch.tensor(causal, device=device),
            torch.tensor(list(accumulate(lens_q, initial=0)), dtype=torch.int32, device=device),
            torch.from_numpy(first_keys).to(device).unbind(),
            torch.tensor(lens_k, dtype=torch.int32, device=device),
            (max(lens_q), max(lens_k)),
            None if hi is None else torch.from_numpy(hi).to(device),
            None if nearest is None else torch.from_numpy(nearest.astype(np.int32)).to(device),
        )

    def _attention(
        self,
        attention: Any,
        index: int,
        h: Tensor,
        tables: tuple[Tensor, Tensor],
        rows: Tensor,
        call: Call,
    ) -> Tensor:
        """(rows, hidden) -> the same; the states of the first ``len(rows)`` rows go into the arena's ``rows``."""
        q, k, v = self._projections(attention, h)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        (q,), (k,) = gk.rotary(q, k, *tables)
        tokens = rows.shape[0]
        keys, values = self.arena.keys, self.arena.values
        keys.index_copy_(0, rows, k[:tokens])
        values.index_copy_(0, rows, v[0, :tokens])
        out = self._attend(call, index, q, attention.scaling)
        return attention.o_proj(out.view(h.shape[0], -1))

    def _projections(self, attention: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (rows, hidden), each (1, rows, heads, D)."""
        dim = self.arena.keys.shape[-1]
        if hasattr(attention, "qkv_proj"):
            joint = attention.qkv_proj(h).view(1, h.shape[0], -1, dim)
            q, k, v = joint.split([*self.heads, self.heads[1]], dim=2)
            return q, k, v
        shape = 1, h.shape[0], -1, dim
        return attention.q_proj(h).view(shape), attention.k_proj(h).view(shape), attention.v_proj(h).view(shape)

    def _attend(self, call: Call, index: int, q: Tensor, scale: float) -> Tensor:
        """One layer's attention: q (rows, heads, D) -> the same."""
        keys, values = self.arena.keys, self.arena.values
        window = self.windows[index]
        if (window, scale) not in call.problems:
            sizes, hi = _visible(call, window, self.model.settings.bidirectional_window)
            problem = packed_problem(
                q,
                keys,
                call.causal,
                call.cu_seqlens,
                None,
                *call.longest,
                window_size=sizes,
                hi=hi,
                softmax_scale=scale,
                k_starts=call.starts[index],
                seqlens_k=call.lengths,
            )
            call.problems[window, scale] = problem, {}
        problem, plans = call.problems[window, scale]
        return prepared_attention(q, keys, values, replace(problem, k_start=call.starts[index]), plans)


def rounded(rows: int) -> int:
    """The least of these that is not below ``rows``: 1 to 4, multiples of 4 up to 64, eight numbers from each power of 2 to the
    next.
    """
    if rows <= 4:
        return rows
    step = max(4, 1 << (rows - 1).bit_length() >> 4)
    return -(-rows // step) * step


def _window(layer: Any, config: Any) -> int | None:
    """The sliding window of a layer, None if it has none."""
    if type(layer).__name__ in WITHOUT_WINDOW:
        return None
    default = getattr(config, "sliding_window", None)
    return getattr(layer.self_attn, "sliding_window", default)


def _visible(
    call: Call, window: int | None, bidirectional_window: str
) -> tuple[tuple[int, int] | Tensor, Tensor | None]:
    """Window sizes and upper bounds of a layer, as in patch(): (W - 1, 0) for a causal sample, (W, W) or the whole text for a
    bidirectional one, with the upper bounds clipped to that."""
    if window is None:
        return (-1, -1), call.hi
    reach = window if bidirectional_window == "transformers" else -1
    sizes = [torch.where(call.causal, window - 1, reach), torch.where(call.causal, 0, reach)]
    hi = call.hi
    if hi is not None and call.nearest is not None and reach >= 0:
        hi = torch.minimum(hi, call.nearest + reach)
    return torch.stack(sizes, dim=1).to(torch.int32), hi


def _upper_bounds(item: Item) -> np.ndarray:
    """The first key that each new token does not see, int32, for a step with causal instructions."""
    ends = np.arange(item.past + 1, item.past + len(item.ids) + 1, dtype=np.int32)
    if not item.causal:
        ends[item.causal_prefix or 0 :] = ends[-1]
    return ends
