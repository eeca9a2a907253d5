"""Training data: reading and checking rows (jsonl.py) and the bundled sample (sample/, built by python_model.corpora.sample)."""

from __future__ import annotations

from pathlib import Path


def sample_dir() -> Path:
    """The folder of the bundled real sample; its README says what the files hold."""
    return Path(__file__).parent / "sample"
