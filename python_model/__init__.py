"""The unified model on top of grit_kernels: load, embed, generate, train. Uses only the public API of grit_kernels."""

from python_model.model.modeling import GritLM
from python_model.support import moved

moved.install()

__all__ = ["GritLM"]
