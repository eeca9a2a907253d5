"""Results that are written as they are computed, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from python_model.support.files import FULL, named, place_for_file, sync, write_json


class JsonLines:
    """An append-only jsonl file. Opening it keeps the leading rows for which ``keep(row)`` is true and truncates the rest, in
    particular a half-written last line.

    Attributes:
        rows: what the file holds.
    """

    def __init__(
        self,
        path: Path,
        keep: Callable[[dict[str, Any]], bool] = lambda row: True,
        *,
        broken: Callable[[int, Exception], None] = lambda line, error: None,
    ) -> None:
        """``broken(line, error)`` may raise if a complete line is not a valid row; by default the file is truncated there."""
        self.rows: list[dict[str, Any]] = []
        self._path = path
        end = 0
        self._file = open(place_for_file(path), "a+b")  # noqa: SIM115  (closed by close)
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                kept = keep(row)
            except (ValueError, KeyError, TypeError) as error:
                broken(number, error)
                break
            if not kept:
                break
            self.rows.append(row)
            end += len(line)
        self._file.truncate(end)

    def append(self, *rows: dict[str, Any]) -> None:
        """Append rows; when this returns they are on disk."""
        self.rows += rows
        with named(self._path, *FULL):
            self._file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ResumableRows:
    """Results for ``inputs``, one row ``{"row": index, **input, **result}`` each, in the order in which they are finished.

    Opening reads existing results: a half-written last line is truncated, a row that belongs to a different input is an error,
    and so is one of another ``run``, which names whatever else the results depend on and is written to each row (rows without
    one are taken as they are).
    ``missing`` lists the indices without a result.
    """

    def __init__(self, path: Path, inputs: Sequence[Mapping[str, Any]], *, run: str | None = None) -> None:
        self.path, self.inputs, self.run = path, inputs, run
        self._log = JsonLines(path, self._is_ours, broken=self._refuse)
        done = {row["row"] for row in self._log.rows}
        self.missing = [index for index in range(len(inputs)) if index not in done]

    def __enter__(self) -> ResumableRows:
        return self

    def __exit__(self, *exception: object) -> None:
        self._log.close()

    def write(self, results: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Append (index, result) rows; when this returns they are on disk."""
        own = {} if self.run is None else {"run": self.run}
        self._log.append(*({"row": index, **self.inputs[index], **result, **own} for index, result in results))

    def _is_ours(self, row: dict[str, Any]) -> bool:
        index = row["row"]
        if not (0 <= index < len(self.inputs) and all(row[k] == v for k, v in self.inputs[index].items())):
            raise _Foreign(f"a result for another input (row {index}); choose another output file")
        if self.run is not None and row.get("run", self.run) != self.run:
            raise _Foreign(f"a result of another model or other options (row {index}); choose another output file")
        return True

    def _refuse(self, line: int, error: Exception) -> None:
        why = str(error) if isinstance(error, _Foreign) else f"not a row of an earlier run ({error!r})"
        raise ValueError(f"{self.path}:{line}: {why}") from error


class _Foreign(ValueError):
    """A row of a different run."""


class ResumableArray:
    """A ``.npy`` file of float32 rows, filled from the first to the last; it receives its name when the last row is written.

    Until then the rows are in ``.NAME.part`` and their number in ``.NAME.part.json``; a run with the same ``key`` resumes there.

    Attributes:
        done: number of rows written.

    Raises:
        ValueError: the existing part belongs to another key.
    """

    def __init__(self, path: Path, rows: int, key: str) -> None:
        self.path, self.rows, self.key, self.done = path, rows, key, 0
        self._part = path.with_name(f".{path.name}.part")
        self._state = path.with_name(f".{path.name}.part.json")
        self._file: BinaryIO | None = None
        place_for_file(path)
        if self._state.exists() and self._part.exists():
            state = json.loads(self._state.read_text(encoding="utf-8"))
            if (state.get("key"), state.get("rows")) != (key, rows):
                raise ValueError(
                    f"output: {self._part} holds an interrupted run with other texts or settings; delete it or use another file"
                )
            self.done = int(state["done"])

    def append(self, block: np.ndarray) -> None:
        """Write the next rows (n, size); when this returns they are on disk."""
        if self._file is None:
            again = {} if self.done else {"dtype": np.float32, "shape": (self.rows, block.shape[1])}
            with named(self.path, *FULL):
                array = np.lib.format.open_memmap(self._part, mode="r+" if self.done else "w+", **again)
            self._offset, self._dtype = array.offset, array.dtype
            self._file = open(self._part, "r+b")  # noqa: SIM115  (closed by finish)
        # written, not mapped: on a full disk the system ends a process that fills its map
        rows = np.ascontiguousarray(block, dtype=self._dtype)
        with named(self.path, *FULL):
            self._file.seek(self._offset + self.done * rows[:1].nbytes)
            self._file.write(rows.tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.done += len(block)
        write_json(self._state, {"key": self.key, "rows": self.rows, "done": self.done})

    def finish(self) -> tuple[int, int]:
        """Give the file its final name; returns its shape."""
        if self._file is not None:
            self._file.close()
        os.replace(self._part, self.path)
        sync(self.path.parent)
        self._state.unlink()
        rows, size = np.load(self.path, mmap_mode="r").shape
        return rows, size
