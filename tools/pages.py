"""Draws the masks of docs/visibility.md with the rule that they show.

    python -m tools.pages

tests/test_docs.py compares what is committed with what this writes.
"""

from __future__ import annotations

from pathlib import Path

import torch

import grit_kernels as gk
from grit_kernels.visibility import FARTHEST, dense_mask

PAGE = Path(__file__).parent.parent / "docs" / "visibility.md"
LENGTH = 10
MARKER = "<!-- drawn masks: python -m tools.pages -->"


def drawing(left: int, right: int, hi: torch.Tensor | None = None, len_q: int = LENGTH) -> list[str]:
    """One mask as lines of text: a row per query, a column per key."""
    mask = dense_mask(len_q, LENGTH, left, right, hi)
    return ["".join("██" if seen else " ·" for seen in row) for row in mask.tolist()]


def drawings() -> str:
    """Every pattern of the paper's ablation, and windows, side by side in rows of three."""
    one = torch.tensor([0, LENGTH], dtype=torch.int32)

    def upper_bounds(bidirectional: range) -> torch.Tensor:
        return gk.span_hi(one, torch.tensor([i in bidirectional for i in range(LENGTH)]))

    turns = torch.tensor([i < 3 or 5 <= i < 8 for i in range(LENGTH)])
    pictures = {
        "causal": drawing(FARTHEST, 0),
        "bidirectional": drawing(FARTHEST, FARTHEST),
        "causal, window (3, 0)": drawing(3, 0),
        "bidirectional, window (3, 3)": drawing(3, 3),
        "prefix-LM, prefix of 4": drawing(FARTHEST, 0, upper_bounds(range(4))),
        "CB: instruction of 4 causal": drawing(FARTHEST, 0, upper_bounds(range(4, LENGTH))),
        "interleaved turns 0-2, 5-7": drawing(FARTHEST, 0, gk.span_hi(one, turns)),
        "3 new tokens, cache of 7": drawing(FARTHEST, 0, len_q=3),
        "the same, bidirectional": drawing(FARTHEST, FARTHEST, len_q=3),
    }
    names = list(pictures)
    lines: list[str] = []
    for start in range(0, len(names), 3):
        row = names[start : start + 3]
        lines.append("   ".join(name.ljust(2 * LENGTH + 8) for name in row).rstrip())
        for line in range(max(len(pictures[name]) for name in row)):
            cells = [pictures[name][line] if line < len(pictures[name]) else "" for name in row]
            lines.append("   ".join(cell.ljust(2 * LENGTH + 8) for cell in cells).rstrip())
        lines.append("")
    return "```\n" + "\n".join(lines).rstrip() + "\n```\n"


def visibility_page(current: str) -> str:
    """The page with its drawings (everything between the two markers) redrawn."""
    before, _, after = current.split(MARKER)
    return f"{before}{MARKER}\n{drawings()}{MARKER}{after}"


if __name__ == "__main__":
    PAGE.write_text(visibility_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
