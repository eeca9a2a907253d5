"""Draws docs/images/packed_pass.svg: one pack, three samples, each with its own attention mode.

python tools/draw_packed_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CELL = 13
LEFT, TOP = 176, 92
INK, FAINT = "#1f2937", "#6b7280"


@dataclass(frozen=True)
class Sample:
    name: str
    tokens: int
    instruction: int
    causal: bool
    colour: str
    pale: str
    result: str


SAMPLES = (
    Sample("query, to embed", 9, 4, False, "#2563eb", "#bfdbfe", "mean of its text"),
    Sample("passage, to embed", 13, 2, False, "#0d9488", "#99f6e4", "mean of its text"),
    Sample("chat", 11, 0, True, "#ea580c", "#fed7aa", "next-token loss, reply"),
)


def text(
    x: float, y: float, words: str, size: int = 13, fill: str = INK, anchor: str = "start", weight: str = "400"
) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>'


def cell(x: float, y: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{CELL - 1.5}" height="{CELL - 1.5}" rx="2" fill="{fill}"/>'


def draw() -> str:
    """The picture as SVG."""
    total = sum(s.tokens for s in SAMPLES)
    side = total * CELL
    width, height = LEFT + side + 250, TOP + side + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="ui-sans-serif, system-ui, sans-serif" aria-label="One packed pass: two texts to embed '
        'see both sides, a chat sees only its past, nothing is computed between samples">',
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
        text(24, 34, "One packed pass: the attention mode belongs to the sample", 18, weight="600"),
        text(
            24, 56, "Rows are tokens that look, columns tokens they see. Empty squares are never computed.", 13, FAINT
        ),
    ]
    start = 0
    for s in SAMPLES:
        x0, y0 = LEFT + start * CELL, TOP + start * CELL
        middle = y0 + s.tokens * CELL / 2
        for i in range(s.tokens):
            parts.append(cell(x0 + i * CELL, TOP - 20, s.pale if i < s.instruction else s.colour))
            for j in range(s.tokens):
                if not s.causal or j <= i:
                    parts.append(cell(x0 + j * CELL, y0 + i * CELL, s.pale if i < s.instruction else s.colour))
        mode = "causal=True" if s.causal else "causal=False"
        parts += [
            text(24, middle - 3, s.name, 13, weight="600"),
            text(24, middle + 15, mode, 12, FAINT),
            text(LEFT + side + 18, middle - 3, s.result, 13, s.colour, weight="600"),
        ]
        if s.instruction:
            parts.append(
                text(LEFT + side + 18, middle + 15, f"skips its {s.instruction} instruction tokens", 12, FAINT)
            )
        start += s.tokens
    legend = TOP + side + 34
    parts += [
        cell(24, legend - 10, SAMPLES[0].pale),
        text(44, legend, "instruction: attends, is not pooled", 12, FAINT),
        cell(280, legend - 10, SAMPLES[0].colour),
        text(300, legend, "text: attends and is pooled, or learned", 12, FAINT),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "docs" / "images" / "packed_pass.svg"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(draw(), encoding="utf-8")
