"""``grit convert``: show how training reads a file in any supported format, and convert it to this project's own rows.

grit convert rows.json                       # how the first rows are read, what is skipped, which columns are ignored
grit convert rows.parquet ROWS.jsonl         # also writes the rows
grit convert sts.jsonl ROWS.jsonl --positive-score 4     # sentence pairs: the score from which a pair is a positive
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import Command, location, path
from python_model.data.reading import tolerant_rows
from python_model.data.report import DataReport
from python_model.data.rows import Row, to_object
from python_model.support.files import new_file

WIDTH = 80


def shown(row: dict[str, Any]) -> list[str]:
    """A row for display: one truncated line per text, its instruction in brackets before it."""
    found = []
    for name, content in row.items():
        many = name in ("pos", "neg", "text", "documents") and isinstance(content, list)
        for item in content if many else [content]:
            texts = item if isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) else None
            text = f"[{texts[0]}] {texts[1]}" if texts else str(item)
            line = f"  {name:<8} {json.dumps(text, ensure_ascii=False)[1:-1]}"
            found.append(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…")
    return found


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit convert``."""
    parser.add_argument(
        "input", type=location, help="file or folder: jsonl, json (both also gzipped) or parquet; or a URL for fsspec"
    )
    parser.add_argument("output", nargs="?", type=path, help=".jsonl file to write")
    parser.add_argument(
        "--positive-score", type=float, help="lowest score (or label) of a sentence pair that counts as a positive"
    )
    parser.add_argument("--show", type=int, default=3, help="number of rows to print")


def run(arguments: Namespace) -> None:
    """Read, show, write, report."""
    report = DataReport()
    rows = tolerant_rows(arguments.input, report, positive_score=arguments.positive_score)
    if arguments.output is None:
        _print(rows, arguments.show)
    else:
        with new_file(arguments.output) as file:
            _print(_written(rows, file), arguments.show)
    print("\n".join(report.lines()))
    if not report.used:
        raise ValueError("no usable rows")


def _written(rows: Iterator[Row], file: Any) -> Iterator[Row]:
    for row in rows:
        file.write(json.dumps(to_object(row), ensure_ascii=False).encode() + b"\n")
        yield row


def _print(rows: Iterator[Row], count: int) -> None:
    for number, row in enumerate(rows):
        if number < count:
            print("\n".join([row.origin, *shown(to_object(row))]))


DESCRIPTION = "Show how training reads a file in any supported format, and convert it to rows."
COMMAND = Command("convert", DESCRIPTION, configure, run)
