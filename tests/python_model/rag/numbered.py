"""Numbered documents with unit vectors, and conditions on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from python_model.rag.modes import Document


def unit(count: int, size: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def documents(count: int, start: int = 0) -> list[Document]:
    return [
        Document(
            str(i),
            f"text number{i}",
            source=f"{'notes' if i % 3 else 'mail'}/{i % 7}.md",
            metadata={"year": 2000 + i % 20, "lang": ("de", "fr", "en")[i % 3], "done": i % 2 == 0},
        )
        for i in range(start, start + count)
    ]


def keys(found: Any) -> list[list[str]]:
    return [[hit.document.key for hit in hits] for hits in found]


MAIL = ("mail/1.md", "mail/2.md", "mail/3.md")
FILTERS: list[tuple[dict[str, Any], Callable[[Document], bool]]] = [
    ({"lang": "de"}, lambda d: d.metadata["lang"] == "de"),
    ({"lang": ["de", "fr"], "year": 2003}, lambda d: d.metadata["lang"] != "en" and d.metadata["year"] == 2003),
    ({"year": {"min": 2005, "max": 2007.5}}, lambda d: 2005 <= d.metadata["year"] <= 2007),
    ({"year": {"min": 2019}}, lambda d: d.metadata["year"] >= 2019),
    ({"done": True}, lambda d: d.metadata["done"] is True),
    ({"done": 1}, lambda d: False),
    ({"source": "notes/*"}, lambda d: d.source.startswith("notes/")),
    ({"source": ["mail/1.md", "mail/[23].md"], "done": False}, lambda d: d.source in MAIL and not d.metadata["done"]),
    ({"source": "nowhere"}, lambda d: False),
    ({"nothing": "x"}, lambda d: False),
    ({"year": "2003"}, lambda d: False),
]  # fmt: skip
