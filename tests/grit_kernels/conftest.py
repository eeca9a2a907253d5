"""The model of the tests of patch()."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import grit_kernels as gk


@pytest.fixture(scope="module")
def stock() -> Any:
    """A tiny Mistral as transformers makes it."""
    from tests.grit_kernels.tiny_mistral import tiny_model

    return tiny_model()


@pytest.fixture
def model(stock: Any) -> Any:
    """The same weights, patched."""
    return gk.patch(copy.deepcopy(stock))
