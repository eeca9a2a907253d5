"""What the README says runs: its Python blocks, and the names and files it points to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from python_model.support import tested
from tests.conftest import needs_source_tree

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


# tests/test_blocks.py runs the others
ON_THE_SMALL_MODEL = [block for block in PYTHON_BLOCKS if "fetch_small_model" in block]


@pytest.mark.model
@pytest.mark.parametrize("block", ON_THE_SMALL_MODEL, ids=lambda block: block.splitlines()[0][:40])
def test_python_block_on_the_small_model_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


@needs_source_tree
def test_files_the_readme_names_exist() -> None:
    for name in re.findall(
        r"`((?:configs|python_model|csrc|bench|docs)/[\w./-]+|[A-Z]+\.md)`|(?<=--config )(\S+)", README
    ):
        path = next(part for part in name if part)
        assert path == "FILE" or (ROOT / path).exists(), path


def test_make_targets_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z-]+)\b", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@needs_source_tree
def test_the_readme_counts_model_types_as_the_page_does() -> None:
    page = " ".join((ROOT / "docs" / "families.md").read_text(encoding="utf-8").split())
    types, right, refused = re.search(
        r"All (\d+) causal types .*? (\d+) are correct and admitted, (\d+) are refused", page
    ).groups()  # type: ignore[union-attr]
    assert (
        f"Of transformers' {types} causal types, {right} are correct on tiny models and {refused} are refused"
        in " ".join(README.split())
    )
    correct = set(re.findall(r"`(\w+)`", page.partition("Correct: ")[2].partition("| refused")[0]))
    assert {"gpt_oss", "deepseek_v3", "gemma3_text", "qwen3_moe", "qwen3_5_text", "lfm2"} <= correct


@needs_source_tree
def test_peers_are_compared_in_the_versions_that_are_tested() -> None:
    """A new lock is a reason to read the table of peers again; docs/export.md says what the servers' code does."""
    header = next(line for line in README.splitlines() if line.startswith("| | grit_kernels | gritlm"))
    locked = tested.tested_versions()
    for name in ("transformers", "sentence-transformers"):
        assert f"| {name} {locked[name].rpartition('.')[0]} |" in header, name
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    servers = (r"vLLM (\d+\.\d+)", r"llama-cpp-python (\d+\.\d+\.\d+)")
    for pattern in servers:
        here, there = re.search(pattern, README), re.search(pattern, page)
        assert here and there and here[1] == there[1], pattern
