"""Training data: reading and checking rows, and the bundled sample (sample/, built by python_model.corpora.sample)."""

from __future__ import annotations

from pathlib import Path


def sample_dir() -> Path:
    """The folder of the bundled sample; its README describes the files."""
    return Path(__file__).parent / "sample"
