"""The tiny checkpoint of the model's tests, for benchmarks that load one."""

from tests.python_model.conftest import checkpoint, tokenizer

__all__ = ["checkpoint", "tokenizer"]
