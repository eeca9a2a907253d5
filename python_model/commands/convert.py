"""``grit convert``: what training reads in a file, of whatever tool; and the same as this project's own rows.

grit convert rows.json                       # how the first rows are read, what is left out, which columns are ignored
grit convert rows.parquet ROWS.jsonl         # writes them too
grit convert sts.jsonl ROWS.jsonl --positive-score 4     # sentence pairs: which scores count as a positive
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from python_model.data.reading import tolerant_rows
from python_model.data.report import DataReport
from python_model.data.rows import Row, to_object
from python_model.support.files import new_file

WIDTH = 88


def shown(value: Any, indent: str = "  ") -> list[str]:
    """A row for people: one line per text, cut."""
    found = []
    for name, content in value.items():
        items = content if isinstance(content, list) and name in ("pos", "neg", "text") else [content]
        for item in items:
            text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
            line = f"{indent}{name:<8} {json.dumps(text, ensure_ascii=False)[1:-1]}"
            found.append(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``grit convert``."""
    parser = argparse.ArgumentParser(
        prog="grit convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="file or folder: jsonl, json, either with .gz, parquet; or an address for fsspec")
    parser.add_argument("output", nargs="?", type=Path, help=".jsonl file to write")
    parser.add_argument(
        "--positive-score", type=float, help="least score (or label) of a sentence pair that is a positive"
    )
    parser.add_argument("--show", type=int, default=3, help="rows to print (default: 3)")
    arguments = parser.parse_args(argv)
    report = DataReport()
    try:
        rows = tolerant_rows(arguments.input, report, positive_score=arguments.positive_score)
        if arguments.output is None:
            _print(rows, arguments.show)
        else:
            with new_file(arguments.output) as file:
                _print(_written(rows, file), arguments.show)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"grit convert: {error}") from error
    print("\n".join(report.lines()))
    if not report.used:
        raise SystemExit("grit convert: no row can be used")


def _written(rows: Iterator[Row], file: Any) -> Iterator[Row]:
    for row in rows:
        file.write(json.dumps(to_object(row), ensure_ascii=False).encode() + b"\n")
        yield row


def _print(rows: Iterator[Row], count: int) -> None:
    for number, row in enumerate(rows):
        if number < count:
            print("\n".join([row.origin, *shown(to_object(row))]))


if __name__ == "__main__":
    main()
