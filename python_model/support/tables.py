"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Align cells in columns, each as wide as its widest cell; the last cell of a shorter line may extend over the missing
    columns.
    """
    count = max(map(len, lines))
    widths = [
        max((len(line[i]) for line in lines if i < len(line) - (len(line) < count)), default=0) for i in range(count)
    ]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines)
