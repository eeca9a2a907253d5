"""SamplePack: the per-sample numbers that every kernel reads, and the conversion between padded batches and packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from grit_kernels.checks import check_mask, described, is_integer, mask_faults
from grit_kernels.context import Contexts
from grit_kernels.visibility import positions_and_samples


@dataclass(frozen=True)
class SamplePack:
    """A batch as a pack of samples, one after another without padding. Build one per pass and share it among all layers.

    Values are checked here, once; the kernels trust them. Create it with :meth:`from_lengths` or :meth:`from_mask`.

    Attributes:
        cu_seqlens: int32 (B + 1), where each sample's tokens start in the pack.
        causal: bool (B). True: a token sees only its past. False: it sees both sides.
        instruction_lens: int32 (B), leading tokens that attend but are excluded from pooling.
        max_seqlen: length of the longest sample.
        tokens: number of tokens in the pack.
        hi: int32 (tokens) or None, upper bounds per token that replace the right bound (see visibility.py).
        indices: int64 (tokens) or None: the index of each token in the flattened padded batch.
        padded_shape: (B, T) of that batch, or None.
        contexts: which samples also see tokens of other samples (see context.py), or None.
        first_positions: int32 (B) or None, position of each sample's first token; by default 0.
        starts: int32 (B), first token of each sample.
        lengths: int32 (B), tokens of each sample.
    """

    cu_seqlens: Tensor
    causal: Tensor
    instruction_lens: Tensor
    max_seqlen: int
    tokens: int
    hi: Tensor | None = None
    indices: Tensor | None = None
    padded_shape: tuple[int, int] | None = None
    contexts: Contexts | None = None
    first_positions: Tensor | None = None
    starts: Tensor = field(init=False)
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # derived once and read by every layer; plain attributes, since torch.compile cannot trace a cached property
        object.__setattr__(self, "starts", self.cu_seqlens[:-1].contiguous())
        object.__setattr__(self, "lengths", self.cu_seqlens.diff())

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | Tensor,
        causal: bool | Sequence[bool] | Tensor,
        instruction_lens: Sequence[int] | Tensor | None = None,
        *,
        hi: Tensor | None = None,
        contexts: Sequence[Sequence[int] | Tensor | None] | None = None,
        first_positions: Sequence[int] | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> SamplePack:
        """A pack of samples of the given ``lengths`` (tokens each, 0 allowed).

        ``causal``: one flag for all or one per sample. ``instruction_lens``: default 0; at most the sample's length minus one
        for a sample that is pooled, which :func:`grit_kernels.pool` checks. ``contexts``: for each sample the tokens of the pack
        that precede its own as keys, in this order (tokens of samples that have no context themselves), or None.
        ``first_positions``: position of each sample's first token, int (B), default 0; a sample's positions are consecutive.
        """
        sizes = torch.as_tensor(lengths, dtype=torch.int64, device="cpu").reshape(-1)
        batch = sizes.shape[0]
        if batch == 0:
            raise ValueError("lengths: expected at least one sample, got an empty batch")
        if bool((sizes < 0).any()):
            raise ValueError(f"lengths: expected values >= 0, got {sizes.tolist()}")
        flags = torch.as_tensor(causal, device="cpu")
        if flags.dtype != torch.bool or flags.shape not in ((), (batch,)):
            raise ValueError(f"causal: expected a bool or bools ({batch},), got {described(flags)}")
        if instruction_lens is None:
            skip = torch.zeros_like(sizes)
        else:
            skip = torch.as_tensor(instruction_lens, dtype=torch.int64, device="cpu").reshape(-1)
        if skip.shape != (batch,) or bool(((skip < 0) | (skip > sizes)).any()):
            raise ValueError(
                f"instruction_lens: expected one value in 0..length for each of {sizes.tolist()}, got {skip.tolist()}"
            )
        tokens = int(sizes.sum())
        if tokens >= 2**31:
            raise ValueError(f"lengths: expected fewer than 2**31 tokens in one pack, got {tokens}")
        cu_seqlens = sizes.new_zeros(batch + 1, dtype=torch.int32)
        cu_seqlens[1:] = sizes.cumsum(0)
        if hi is not None:
            _check_upper_bounds(hi, cu_seqlens, sizes)
            hi = hi.to(device=device, dtype=torch.int32)
        seen = None if contexts is None else Contexts.of(sizes, contexts)
        if seen is not None and hi is not None:
            raise ValueError("hi: expected none with contexts, got both")
        if first_positions is not None:
            firsts = torch.as_tensor(first_positions, device="cpu").reshape(-1)
            if not is_integer(firsts, batch) or bool((firsts < 0).any()):
                raise ValueError(
                    f"first_positions: expected one int >= 0 for each of {batch} samples, got {firsts.tolist()}"
                )
            first_positions = firsts.to(device=device, dtype=torch.int32)
        return cls(
            cu_seqlens=cu_seqlens.to(device),
            causal=flags.expand(batch).contiguous().to(device),
            instruction_lens=skip.to(device=device, dtype=torch.int32),
            max_seqlen=int(sizes.max()),
            tokens=tokens,
            hi=hi,
            contexts=None if seen is None else seen.to(device),
            first_positions=first_positions,
        )

    @classmethod
    def from_mask(
        cls,
        attention_mask: Tensor,
        causal: bool | Tensor = True,
        instruction_lens: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> SamplePack:
        """The pack of a padded batch: ``attention_mask`` (B, T) is 0 at padding and 1 at real tokens; left padding and holes are
        fine.

        By default a row is one sample, but an integer mask may number the samples of a row (1, 1, 2, 2, 0), and
        ``position_ids`` (B, T) that restart begin a new sample, as in :meth:`from_position_ids`; after a hole, only positions
        that decrease do. Lengths and flags are read back from the device, once for all layers. ``causal``: bool or bool (B),
        the flag of each row's samples. ``instruction_lens``: int (B), for rows of one sample.
        """
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask: expected (B, T), got {tuple(attention_mask.shape)}")
        batch, length = attention_mask.shape
        if position_ids is not None and tuple(position_ids.shape) != (batch, length):
            raise ValueError(f"position_ids: expected {(batch, length)}, got {tuple(position_ids.shape)}")
        device = attention_mask.device
        real = attention_mask != 0
        indices = real.reshape(-1).nonzero()[:, 0]
        sizes, faults = real.sum(dim=1), mask_faults(attention_mask)
        if faults is not None:  # read back with the lengths
            both = torch.cat([sizes, faults[None]]).to("cpu")
            check_mask("attention_mask", attention_mask, int(both[-1]))
            sizes = both[:-1]
        sizes, rows = sizes.to("cpu"), torch.arange(batch, device="cpu")
        begins = _begins_inside_rows(attention_mask, position_ids, indices)
        if begins is not None and bool(begins.any()):
            if instruction_lens is not None:
                raise ValueError("instruction_lens: expected one sample per row, got rows of several samples")
            row = indices.to("cpu") // length
            first = torch.cat([begins.new_ones(1), begins]).to("cpu")
            first[1:] |= row.diff() != 0
            starts = first.nonzero()[:, 0]
            empty = (sizes == 0).nonzero()[:, 0]
            ends = torch.cat([starts[1:], starts.new_tensor([row.shape[0]])])
            rows, order = torch.cat([row[starts], empty]).sort(stable=True)
            sizes = torch.cat([ends - starts, torch.zeros_like(empty)])[order]
        flags = _flags_of_rows(causal, batch, rows)
        lens = None if instruction_lens is None else instruction_lens.to("cpu")
        pack = cls.from_lengths(sizes, flags, lens, device=device)
        return replace(pack, indices=indices, padded_shape=(batch, length))

    @classmethod
    def from_position_ids(cls, position_ids: Tensor, causal: bool | Tensor = True) -> SamplePack:
        """The pack of flattened input without a mask: a sample starts wherever a position in ``position_ids`` (B, T) does not
        follow its left neighbour (transformers' convention). They are read back from the device.

        ``causal``: bool, or bool (B), the flag of each row's samples.
        """
        if position_ids.ndim != 2 or position_ids.numel() == 0:
            raise ValueError(f"position_ids: expected a non-empty (B, T), got {tuple(position_ids.shape)}")
        batch, length = position_ids.shape
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids.diff(dim=1) != 1
        first = starts.reshape(-1).nonzero()[:, 0].to("cpu")
        lengths = torch.cat([first, first.new_tensor([batch * length])]).diff()
        flags = _flags_of_rows(causal, batch, first // length)
        pack = cls.from_lengths(lengths, flags, device=position_ids.device)
        every = torch.arange(batch * length, device=position_ids.device)
        return replace(pack, indices=every, padded_shape=(batch, length))

    def __len__(self) -> int:
        return self.causal.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.cu_seqlens.device

    @property
    def position_ids(self) -> Tensor:
        """Position of each token within its sample, from the sample's first position on; int64 (tokens)."""
        positions, samples = positions_and_samples(self.cu_seqlens, self.tokens)
        return positions if self.first_positions is None else positions + self.first_positions[samples]

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (tokens, ...): the real tokens of a padded batch."""
        if self.indices is None or self.padded_shape is None:
            raise ValueError("this SamplePack was not made from a padded batch (SamplePack.from_mask)")
        if tuple(padded.shape[:2]) != self.padded_shape:
            raise ValueError(f"padded: expected {self.padded_shape} + (...), got shape {tuple(padded.shape)}")
        return padded.flatten(0, 1).index_select(0, self.indices)

    def unpack(self, packed: Tensor) -> Tensor:
        """(tokens, ...) -> (B, T, ...): back to the padded batch, with zeros as padding. Differentiable."""
        if self.indices is None or self.padded_shape is None:
            raise ValueError("this SamplePack was not made from a padded batch (SamplePack.from_mask)")
        if packed.shape[0] != self.tokens:
            raise ValueError(f"packed: expected the {self.tokens} tokens of the pack, got {packed.shape[0]} rows")
        batch, length = self.padded_shape
        flat = packed.new_zeros((batch * length, *packed.shape[1:]))
        return flat.index_copy(0, self.indices, packed).unflatten(0, (batch, length))

    def split(self, packed: Tensor) -> list[Tensor]:
        """(tokens, ...) -> one (length, ...) view per sample."""
        return list(packed.split(self.lengths.tolist()))

    def to(self, device: torch.device | str) -> SamplePack:
        """The same pack on another device."""
        return SamplePack(
            self.cu_seqlens.to(device),
            self.causal.to(device),
            self.instruction_lens.to(device),
            self.max_seqlen,
            self.tokens,
            None if self.hi is None else self.hi.to(device),
            None if self.indices is None else self.indices.to(device),
            self.padded_shape,
            None if self.contexts is None else self.contexts.to(device),
            None if self.first_positions is None else self.first_positions.to(device),
        )


def _flags_of_rows(causal: bool | Tensor, batch: int, rows: Tensor) -> bool | Tensor:
    """The flags of the samples that lie in ``rows`` (int64, on the CPU), from one for all or one for each of ``batch`` rows."""
    if not isinstance(causal, Tensor) or causal.ndim == 0:
        return causal
    if causal.shape != (batch,):
        raise ValueError(f"causal: expected a bool or bools ({batch},), got {described(causal)}")
    return causal.to("cpu")[rows]


def _begins_inside_rows(attention_mask: Tensor, position_ids: Tensor | None, indices: Tensor) -> Tensor | None:
    """bool (tokens - 1): whether the next real token begins a sample in the same row; None if no row has several samples."""
    numbered = attention_mask.dtype != torch.bool and not attention_mask.is_floating_point()
    if indices.shape[0] < 2 or not (numbered or position_ids is not None):
        return None
    row = indices // attention_mask.shape[1]
    begins = torch.zeros_like(row[1:], dtype=torch.bool)
    if numbered:
        begins |= attention_mask.reshape(-1)[indices].diff() != 0
    if position_ids is not None:
        step, gap = position_ids.reshape(-1)[indices].diff(), indices.diff()
        begins |= torch.where(gap == 1, step != 1, step <= 0)
    return begins & (row.diff() == 0)


def _check_upper_bounds(hi: Tensor, cu_seqlens: Tensor, sizes: Tensor) -> None:
    tokens = int(cu_seqlens[-1])
    if not is_integer(hi, tokens):
        raise ValueError(f"hi: expected int32 ({tokens},), got {described(hi)}")
    values = hi.to("cpu")
    for b, part in enumerate(values.split(sizes.tolist())):
        if part.numel() and (bool((part.diff() < 0).any()) or int(part[0]) < 0 or int(part[-1]) > part.numel()):
            raise ValueError(
                f"hi: expected non-decreasing values in 0..{part.numel()}, got others in sample {b} "
                "(a mask of blocks of documents cannot be expressed; make them samples, see contexts)"
            )
