"""What mteb's ``encode_kwargs`` mean here: each reaches the model, or is refused by name. mteb itself need not be installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from python_model.evaluation.mteb_adapter import GritEncoder


class Noting:
    """A model that keeps the options of its calls."""

    texts_cut = 0
    formatter = SimpleNamespace(embed_instruction=lambda text: f"<{text}>")

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def encode(self, texts: list[str], **options: Any) -> list[str]:
        self.calls.append(options)
        return texts


def encode(**encode_kwargs: Any) -> dict[str, Any]:
    model: Any = Noting()
    encoder: Any = GritEncoder(model, max_length=9, batch_size=7)
    encoder.get_instruction = lambda *given: "Find"
    task: Any = {"task_metadata": SimpleNamespace(type="STS", name="x"), "hf_split": "test", "hf_subset": "default"}
    assert encoder.encode([{"text": ["a", "b"]}, {"text": ["c"]}], **task, **encode_kwargs) == ["a", "b", "c"]
    (options,) = model.calls
    return dict(options)


def test_what_mteb_is_told_reaches_the_model() -> None:
    always = {"max_length": 9, "instruction": "<Find>"}
    assert encode() == {**always, "batch_size": 7}
    given = {"batch_size": 32, "show_progress_bar": False, "precision": "float32", "unset": None}
    assert encode(**given) == {**always, "batch_size": 32, "show_progress_bar": False}


def test_what_would_be_ignored_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="precision: expected 'float32', in which vectors are scored, got 'int8'"):
        encode(precision="int8")
    with pytest.raises(TypeError, match=r"encode_kwargs: expected any of batch_size, .*, got \['max_length'\]"):
        encode(max_length=2048)
