"""Tile sizes of the attention kernels: a table by (kernel, head dimension, element size, architecture), and how to override it.

Nothing is tuned on a user's first call. ``with override_config("forward", Config(...))`` or the environment variable
GRIT_KERNELS_ATTENTION_CONFIG (``forward=128x64x8x3pa,backward_keys=...``: rows x keys x warps x stages, ``p`` for a persistent
grid, ``a`` for products ahead) replace an entry; ``python -m bench.attention_tune`` measures candidates on the GPU at hand.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from grit_kernels.triton_launch import architecture

KERNELS = ("forward", "decode", "backward_keys", "backward_rows", "backward")
"""forward: one tile of rows walks over keys. decode: the same, keys split. backward_keys: a tile of keys walks over rows
(dK, dV). backward_rows: a tile of rows walks over keys (dQ). backward: backward_keys that adds up dQ as well, by atomics."""

VARIABLE = "GRIT_KERNELS_ATTENTION_CONFIG"


class Config(NamedTuple):
    """``rows`` x ``keys`` of one tile, warps of one program, depth of the software pipeline.

    ``persistent`` (forward only): as many programs as fit take tiles off a list, longest first; else one program per tile in
    that order. Enabled where the loop around the tile spills no register.
    ``ahead`` (forward only): the next block's q k is issued before a block's softmax. Enabled nowhere: only a GPU can say where
    the tensor cores' time that it hides is worth the registers.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    persistent: bool = False
    ahead: bool = False

    def __str__(self) -> str:
        """As the environment variable takes it."""
        return "x".join(map(str, self[:4])) + "p" * self.persistent + "a" * self.ahead


# (kernel, element bytes, head dimension up to) -> architecture -> Config; "" is any other architecture. Every entry fits the
# shared memory of its architecture; tests compile them all and hold each to a recorded number of spilled bytes.
_TABLE: dict[tuple[str, int, int], dict[str, Config]] = {
    ("forward", 2, 64): {"gfx9": Config(128, 64, 4, 1, True), "": Config(128, 64, 8, 3, True)},
    ("forward", 2, 128): {
        "sm80": Config(128, 32, 8, 3, True),
        "sm90": Config(128, 64, 8, 3, True),
        "gfx9": Config(128, 64, 4, 1, True),
        "": Config(128, 64, 8, 3),
    },
    ("forward", 2, 256): {"sm80": Config(64, 32, 8, 2), "gfx9": Config(64, 32, 4, 1), "": Config(128, 64, 8, 2)},
    ("forward", 2, 512): {"sm90": Config(64, 16, 8, 2), "gfx9": Config(16, 16, 4, 1), "": Config(32, 16, 8, 2)},
    ("forward", 4, 64): {"gfx9": Config(64, 32, 4, 1), "": Config(64, 32, 8, 2)},
    ("forward", 4, 128): {"gfx9": Config(32, 32, 4, 1), "": Config(32, 32, 8, 2)},
    ("forward", 4, 256): {"sm100": Config(16, 16, 8, 2), "gfx9": Config(16, 32, 4, 1), "": Config(32, 16, 8, 2)},
    ("forward", 4, 512): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 1)},
    ("decode", 2, 128): {"gfx9": Config(16, 64, 4, 1), "": Config(16, 64, 4, 3)},
    ("decode", 2, 256): {"gfx9": Config(16, 32, 4, 1), "": Config(16, 32, 4, 3)},
    ("decode", 2, 512): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 2)},
    ("decode", 4, 128): {"gfx9": Config(16, 32, 4, 1), "": Config(16, 32, 8, 2)},
    ("decode", 4, 256): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 2)},
    ("decode", 4, 512): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 1)},
    ("backward_keys", 2, 64): {"gfx9": Config(64, 64, 4, 1), "": Config(64, 128, 8, 2)},
    ("backward_keys", 2, 128): {"sm80": Config(32, 128, 8, 2), "gfx9": Config(32, 64, 4, 1), "": Config(64, 128, 8, 2)},
    ("backward_keys", 2, 256): {
        "sm80": Config(16, 64, 8, 2),
        "sm90": Config(16, 64, 8, 2),  # 32 rows spill 2 to 4 times as much, on Triton 3.9 within the loop
        "gfx9": Config(16, 32, 4, 1),
        "": Config(32, 64, 8, 2),
    },
    ("backward_keys", 2, 512): {"sm90": Config(16, 32, 8, 2), "gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 2)},
    ("backward_keys", 4, 64): {"gfx9": Config(32, 32, 4, 1), "": Config(32, 32, 8, 2)},
    ("backward_keys", 4, 128): {"gfx9": Config(16, 32, 4, 1), "": Config(16, 32, 8, 2)},
    ("backward_keys", 4, 256): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 2)},
    ("backward_keys", 4, 512): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 1)},
    ("backward_rows", 2, 64): {"gfx9": Config(64, 64, 4, 1), "": Config(128, 64, 8, 2)},
    ("backward_rows", 2, 128): {"sm80": Config(128, 32, 8, 2), "gfx9": Config(64, 32, 4, 1), "": Config(128, 64, 8, 2)},
    ("backward_rows", 2, 256): {"sm80": Config(64, 16, 8, 2), "gfx9": Config(32, 32, 4, 1), "": Config(64, 32, 8, 2)},
    ("backward_rows", 2, 512): {"sm90": Config(32, 16, 8, 2), "gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 2)},
    ("backward_rows", 4, 64): {"gfx9": Config(32, 32, 4, 1), "": Config(32, 32, 4, 2)},
    ("backward_rows", 4, 128): {"gfx9": Config(32, 16, 4, 1), "": Config(32, 16, 4, 2)},
    ("backward_rows", 4, 256): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 2)},
    ("backward_rows", 4, 512): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 1)},
    ("backward", 2, 64): {"sm80": Config(32, 128, 8, 2), "gfx9": Config(32, 64, 4, 1), "": Config(64, 128, 8, 2)},
    ("backward", 2, 128): {
        "sm80": Config(32, 64, 8, 2),
        "sm90": Config(64, 64, 8, 2),  # with 32 rows, each product of ds and k waits for the one before
        "gfx9": Config(16, 64, 4, 1),
        "": Config(32, 128, 8, 2),
    },
    ("backward", 2, 256): {"sm80": Config(16, 32, 8, 2), "gfx9": Config(16, 16, 4, 1), "": Config(32, 32, 8, 2)},
    ("backward", 2, 512): {"sm80": Config(16, 16, 8, 1), "gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 2)},
    ("backward", 4, 64): {"gfx9": Config(16, 32, 4, 1), "": Config(32, 32, 8, 2)},
    ("backward", 4, 128): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 32, 8, 2)},
    ("backward", 4, 256): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 2)},
    ("backward", 4, 512): {"gfx9": Config(16, 16, 4, 1), "": Config(16, 16, 8, 1)},
}
_INTERPRETED = Config(16, 16, 4, 1, True)

_overrides: dict[str, Config] = {}


def parse_configs(text: str) -> dict[str, Config]:
    """``"forward=128x64x8x3,decode=16x64x4x3"`` as a dict; ValueError names what is wrong."""
    configs = {}
    for entry in filter(None, text.split(",")):
        kernel, _, numbers = entry.partition("=")
        ahead = numbers.endswith("a")
        persistent = numbers.removesuffix("a").endswith("p")
        values = numbers.removesuffix("a").removesuffix("p").split("x")
        if kernel not in KERNELS or len(values) != 4 or not all(x.isdigit() for x in values):
            raise ValueError(
                f"{VARIABLE}: expected <kernel>=<rows>x<keys>x<warps>x<stages>[p][a] with a kernel of "
                f"{KERNELS}, got {entry!r}"
            )
        rows, keys, warps, stages = map(int, values)
        configs[kernel] = Config(rows, keys, warps, stages, persistent, ahead)
    return configs


@functools.cache
def _from_environment(text: str) -> dict[str, Config]:
    return parse_configs(text)


@contextlib.contextmanager
def override_config(kernel: str, config: Config) -> Iterator[None]:
    """Use ``config`` for ``kernel`` (one of KERNELS) inside the block, for every head dimension and dtype."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected {KERNELS}, got {kernel!r}")
    previous = _overrides.get(kernel)
    _overrides[kernel] = config
    try:
        yield
    finally:
        if previous is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = previous


def table_config(kernel: str, dim: int, element_bytes: int, arch: str) -> Config:
    """The table's entry."""
    for limit in (64, 128, 256, 512):
        if dim <= limit and (entry := _TABLE.get((kernel, element_bytes, limit))):
            return entry.get(arch, entry[""])
    raise ValueError(f"head dim {dim} with elements of {element_bytes} bytes has no entry for {kernel}")


def choose_config(kernel: str, dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    """What a launcher uses: an override, the environment's entry, or the table's."""
    if kernel in _overrides:
        return _overrides[kernel]
    if (text := os.environ.get(VARIABLE)) and (config := _from_environment(text).get(kernel)):
        return config
    arch = architecture(device)
    return _INTERPRETED if arch == "cpu" else table_config(kernel, dim, dtype.itemsize, arch)
