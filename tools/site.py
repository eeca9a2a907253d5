"""Hooks of mkdocs: the pages show the plots of bench/results, which lie outside of docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "bench" / "results"
OUTSIDE, INSIDE = "](../bench/results/", "](results/"


def on_files(files: Any, config: Any) -> Any:
    """Add every plot as ``results/NAME.png``."""
    from mkdocs.structure.files import File

    for plot in sorted(RESULTS.rglob("*.png")):
        name = f"results/{plot.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point a page's plots there."""
    return markdown.replace(OUTSIDE, INSIDE)
