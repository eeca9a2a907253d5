"""What the site needs beside mkdocs.yml: the plots of bench/results, which are outside docs/, and docstrings as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

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


class Roles(Extension):
    """Docstrings refer to names as Sphinx does, :func:`pool`; in Markdown this becomes code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite every docstring that is read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":(?:class|func|meth|mod|data|attr):(?=`)", "", obj.docstring.value)
