"""The pages of docs/ that are written by code: the drawn masks, and the API reference from the docstrings.

    python -m tests.docs_pages

tests/test_docs.py compares what is committed with what this writes, so neither can go stale unnoticed.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

import grit_kernels as gk
from grit_kernels.visibility import FARTHEST, dense_mask

DOCS = Path(__file__).parent.parent / "docs"
LENGTH = 10
MARKER = "<!-- drawn masks: python -m tests.docs_pages -->"

HEADER = """# API reference

Written by `python -m tests.docs_pages` from the docstrings.
"""


def drawing(left: int, right: int, hi: torch.Tensor | None = None, len_q: int = LENGTH) -> list[str]:
    """One mask as lines of text: a row per query, a column per key."""
    mask = dense_mask(len_q, LENGTH, left, right, hi)
    return ["".join("██" if seen else " ·" for seen in row) for row in mask.tolist()]


def drawings() -> str:
    """Every pattern of the paper's ablation, and windows, side by side in rows of three."""
    one = torch.tensor([0, LENGTH], dtype=torch.int32)

    def staircase(bidirectional: range) -> torch.Tensor:
        return gk.span_hi(one, torch.tensor([i in bidirectional for i in range(LENGTH)]))

    turns = torch.tensor([i < 3 or 5 <= i < 8 for i in range(LENGTH)])
    pictures = {
        "causal": drawing(FARTHEST, 0),
        "bidirectional": drawing(FARTHEST, FARTHEST),
        "causal, window (3, 0)": drawing(3, 0),
        "bidirectional, window (3, 3)": drawing(3, 3),
        "prefix-LM, prefix of 4": drawing(FARTHEST, 0, staircase(range(4))),
        "CB: instruction of 4 causal": drawing(FARTHEST, 0, staircase(range(4, LENGTH))),
        "interleaved turns 0-2 and 5-7": drawing(FARTHEST, 0, gk.span_hi(one, turns)),
        "3 new tokens after a cache of 7": drawing(FARTHEST, 0, len_q=3),
        "the same, bidirectional": drawing(FARTHEST, FARTHEST, len_q=3),
    }
    names = list(pictures)
    lines: list[str] = []
    for start in range(0, len(names), 3):
        row = names[start : start + 3]
        lines.append("   ".join(name.ljust(2 * LENGTH + 12) for name in row).rstrip())
        for line in range(max(len(pictures[name]) for name in row)):
            cells = [pictures[name][line] if line < len(pictures[name]) else "" for name in row]
            lines.append("   ".join(cell.ljust(2 * LENGTH + 12) for cell in cells).rstrip())
        lines.append("")
    return "```\n" + "\n".join(lines).rstrip() + "\n```\n"


def visibility_page(current: str) -> str:
    """The page with its drawings (everything between the two markers) renewed."""
    before, _, after = current.split(MARKER)
    return f"{before}{MARKER}\n{drawings()}{MARKER}{after}"


def public_objects() -> list[tuple[str, Any]]:
    """(qualified name, object) of everything a user is meant to call, in the order of the pages."""
    import python_model
    from python_model.generate import rerank
    from python_model.generate import text as generate
    from python_model.model import export as sentence_transformers_export
    from python_model.settings import AttentionVariant, GritSettings
    from python_model.train import TrainConfig, Trainer

    found = [(f"grit_kernels.{name}", getattr(gk, name)) for name in gk.__all__ if not name.startswith("_")]
    found += [(f"python_model.{name}", getattr(python_model, name)) for name in python_model.__all__]
    found += [
        ("python_model.settings.GritSettings", GritSettings),
        ("python_model.settings.AttentionVariant", AttentionVariant),
        ("python_model.train.TrainConfig", TrainConfig),
        ("python_model.train.Trainer", Trainer),
        ("python_model.generate.reply", generate.reply),
        ("python_model.generate.replies", generate.replies),
        ("python_model.generate.complete", generate.complete),
        ("python_model.generate.rerank.rerank", rerank.rerank),
        (
            "python_model.model.export.export_sentence_transformers",
            sentence_transformers_export.export_sentence_transformers,
        ),
    ]
    return found


def api_page() -> str:
    """The reference: signature and docstring of each public object, and of the methods of classes."""
    parts = [HEADER]
    for name, thing in public_objects():
        parts.append(_entry("##", name, thing))
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                function = getattr(value, "__func__", value.fget if isinstance(value, property) else value)
                if not method.startswith("_") and inspect.isfunction(function):
                    parts.append(
                        _entry("###", f"{name.split('.')[-1]}.{method}", function, isinstance(value, property))
                    )
    return "\n".join(parts)


def _entry(level: str, name: str, thing: Any, is_property: bool = False) -> str:
    signature = ""
    if not is_property:
        target = thing if not inspect.isclass(thing) else thing.__init__
        parameters = [p for key, p in inspect.signature(target).parameters.items() if key not in ("self", "cls")]
        # the settings of a training run are listed in the docstring
        shown = inspect.Signature(parameters) if len(parameters) < 30 else "(...)"
        signature = str(shown).replace("'", "")
    return f"{level} {name}\n\n```\n{name.split('.')[-1]}{signature}\n```\n\n```text\n{inspect.getdoc(thing)}\n```\n"


def write() -> None:
    """Renew both pages."""
    page = DOCS / "visibility.md"
    page.write_text(visibility_page(page.read_text(encoding="utf-8")), encoding="utf-8")
    (DOCS / "api.md").write_text(api_page(), encoding="utf-8")


if __name__ == "__main__":
    write()
