"""ResumableRows: a jsonl file of results, written batch by batch, that an interrupted run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ResumableRows:
    """Results for ``inputs``, one row ``{"row": index, **input, **result}`` each, in the order they are finished.

    Opening reads what is there already: a half-written last line is cut off, a row whose input is not the one given now is an
    error. ``missing`` are the indices without a result.
    """

    def __init__(self, path: Path, inputs: Sequence[Mapping[str, Any]]) -> None:
        self.path, self.inputs = path, inputs
        done, end = self._read()
        self.missing = [index for index in range(len(inputs)) if index not in done]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115  (closed by __exit__)
        self._file.seek(end)
        self._file.truncate()

    def __enter__(self) -> ResumableRows:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, results: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Append (index, result) rows; when this returns they are on the disk."""
        for index, result in results:
            row = {"row": index, **self.inputs[index], **result}
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[set[int], int]:
        done: set[int] = set()
        if not self.path.exists():
            return done, 0
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:end].splitlines(), 1):
            try:
                row = json.loads(line)
                index = row["row"]
                same = 0 <= index < len(self.inputs) and all(row[k] == v for k, v in self.inputs[index].items())
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}:{number}: not a row of an earlier run ({error!r})") from error
            if not same:
                raise ValueError(f"{self.path}:{number}: a result for another input; choose another output file")
            done.add(index)
        return done, end
