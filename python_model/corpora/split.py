"""Choices by hashes of keys: the side of the split an entity is on, and orders that need no random state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Keyed(Protocol):
    """Anything about one entity."""

    @property
    def key(self) -> str:
        """Names the entity."""


K = TypeVar("K", bound=Keyed)


def digest(text: str) -> int:
    """64 bits of SHA-256, on which every choice here is based."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_out(key: str, percent: int) -> bool:
    """Whether all rows about this key are held out, in both streams; a larger ``percent`` holds out a superset."""
    return digest(f"split:{key}") % 100 < percent


def in_hash_order(items: Iterable[K], purpose: str) -> list[K]:
    """The items in an order that depends only on their keys and the purpose."""
    return sorted(items, key=lambda item: digest(f"{purpose}:{item.key}"))
