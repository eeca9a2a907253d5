"""docs/families.md: which features of patch() are tested on which family.

    python -m tools.families_table

runs tests/grit_kernels/hf/test_families.py and writes the table. A cell says yes when every test that carries the feature's
marker (``@pytest.mark.feature("name", ...)``) on that family passed. test_families.py compares the committed table with its
own markers, so the table cannot go stale unnoticed.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "grit_kernels" / "hf" / "test_families.py"
TABLE = ROOT / "docs" / "families.md"
MARKER = "<!-- the rest of this page is written by `python -m tools.families_sweep` -->"
YES, NO, NONE = "yes", "**failed**", "-"

Pair = tuple[str, str]  # feature, family

TEXT = """# What patch() does for each family

Written by `python -m tools.families_table` from a run of `tests/grit_kernels/hf/test_families.py` (transformers {version}), on a
tiny random model of each family: FP32 on the CPU, logits within 1e-5 of the unpatched model's largest logit. "{none}": the
family has no sliding window.

{table}

* **causal / bidirectional = unpatched**: the same logits as unpatched transformers with `is_causal=True` / `False`; **mixed
  rows**: a batch of both equals separate runs. Each is tested packed, padded and with a cache.
* **packed input**: a `SamplePack`, transformers' `cu_seq_lens_q`, and position ids that restart, against padded input.
* **generate**: 12 prompt tokens with left padding and 7 new ones, beyond a window of 5; prefilling in chunks of 4 tokens and
  prompt lookup give the same tokens.
* **bidirectional prefill, then causal**: a cache filled with `is_causal=False` and continued, as with unpatched transformers.
* **gradients**: of a mixed batch, with and without checkpointing, equal those of separate runs.
* **nothing read back**: a pass over a `SamplePack` runs on the meta device, so no layer waits for the device.
* **one compiled graph**: `torch.compile(model, fullgraph=True)` of a padded batch and of a packed one.

## Window conventions

What token `i` sees under `sliding_window = W`, by `patch()`'s option `bidirectional_window`:

| sample | `"transformers"` (default) | `"full"` |
|---|---|---|
| causal | `i - W < j <= i` | `i - W < j <= i` |
| bidirectional | `i - W <= j <= i + W` | every `j` |
| like | unpatched transformers, causal and with `is_causal=False` | the published GritLM models' sdpa path |

As `window_size=(left, right)` of the kernels: `(W - 1, 0)` for a causal sample, `(W, W)` or no limit for a bidirectional one. Up
to W tokens the two agree. Layers without a window (Gemma's and Qwen's full-attention layers) see the same under both. `i` and `j`
count real tokens; transformers counts slots, which differs only where there is padding between tokens. The row "window
conventions beyond W" above compares both on samples of more than 2 W tokens: `"transformers"` with the unpatched model, `"full"`
with the unpatched model with its window lifted for bidirectional samples.
"""


def declared_pairs(module: ModuleType) -> set[Pair]:
    """(feature, family) of every marked test of ``module``, from its markers, without running anything."""
    pairs: set[Pair] = set()
    for function in vars(module).values():
        marks = list(getattr(function, "pytestmark", []))
        parameters = {mark.args[0]: mark.args[1] for mark in marks if mark.name == "parametrize"}
        inner = [mark for values in parameters.values() for value in values for mark in getattr(value, "marks", ())]
        names = {name for mark in marks + inner if mark.name == "feature" for name in mark.args}
        pairs |= {(name, family) for name in names for family in parameters["family"]}
    return pairs


def committed_pairs() -> set[Pair]:
    """(feature, family) of every yes in docs/families.md."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    families = [re.sub("`", "", cell) for cell in header[1:]]
    return {
        (row[0], family)
        for row in rows
        if len(row) == len(header)
        for family, cell in zip(families, row[1:], strict=True)
        if cell == YES
    }


class _Recorder:
    """A pytest plugin that collects the outcome of every (feature, family)."""

    def __init__(self) -> None:
        self.marked: dict[str, list[Pair]] = {}
        self.passed: dict[Pair, bool] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
            names = [name for mark in item.iter_markers("feature") for name in mark.args]
            self.marked[item.nodeid] = [(name, family) for name in names]

    def pytest_runtest_logreport(self, report: Any) -> None:
        for pair in self.marked.get(report.nodeid, []):
            self.passed[pair] = self.passed.get(pair, True) and report.passed


def render(passed: dict[Pair, bool], families: Iterable[str]) -> str:
    """The Markdown table, with rows in the order of the tests."""
    columns = list(families)
    lines = ["| | " + " | ".join(f"`{family}`" for family in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(name for name, _ in passed):
        cells = ({True: YES, False: NO, None: NONE}[passed.get((name, family))] for family in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the tests and write the table; the exit status of the run."""
    recorder = _Recorder()
    status = pytest.main(
        [str(TESTS), "-k", "not committed_table", "-m", "not gpu", "-p", "no:cacheprovider"], plugins=[recorder]
    )
    if not recorder.passed:
        return int(status) or 1
    families = sorted({family for _, family in recorder.passed})
    TABLE.parent.mkdir(exist_ok=True)
    table = render(recorder.passed, families)
    version = importlib.metadata.version("transformers")
    _, marker, sweep = TABLE.read_text(encoding="utf-8").partition(MARKER) if TABLE.exists() else ("", "", "")
    TABLE.write_text(
        TEXT.format(version=version, table=table, none=NONE) + ("\n" + marker + sweep if marker else ""),
        encoding="utf-8",
    )
    print(table)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
