"""Choices by hashes of keys: which side of the split an entity is on, and orders that depend on no random state."""

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
    """64 bits of SHA-256, the source of every choice made here."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_out(key: str, percent: int) -> bool:
    """Whether all rows about this key are for testing, in both streams; what a smaller ``percent`` holds out, a larger does."""
    return digest(f"split:{key}") % 100 < percent


def in_hash_order(items: Iterable[K], purpose: str) -> list[K]:
    """The items in an order that depends on their keys and the purpose alone."""
    return sorted(items, key=lambda item: digest(f"{purpose}:{item.key}"))
