"""What a command shows of the packages it stands on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
from transformers.utils import logging as transformers_logging

from python_model.support.quiet import KnownMessages, quiet


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What quiet() changes is undone."""
    handlers = logging.getLogger("transformers").handlers
    filters = [(handler, list(handler.filters)) for handler in handlers]
    shown = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        yield
    if shown:
        transformers_logging.enable_progress_bar()
    for handler, before in filters:
        handler.filters[:] = before


def shows(known: KnownMessages, text: str, level: int = logging.WARNING) -> bool:
    return known.filter(logging.LogRecord("transformers.x", level, "", 0, text, None, None))


def test_a_report_about_weights_left_out_on_purpose_is_dropped_and_one_about_missing_weights_is_not() -> None:
    known = KnownMessages()
    assert not shows(known, "MistralModel LOAD REPORT from: x\nlm_head.weight | UNEXPECTED")
    assert shows(known, "MistralModel LOAD REPORT from: x\nlm_head.weight | UNEXPECTED\nnorm.weight | MISSING")


def test_a_warning_is_shown_once_and_information_as_often_as_it_comes() -> None:
    known = KnownMessages()
    assert [shows(known, "beware") for _ in range(3)] == [True, False, False]
    assert shows(known, "beware of another")
    assert [shows(known, "step", logging.INFO) for _ in range(2)] == [True, True]


def test_bars_of_loading_go_and_those_of_downloads_stay() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet()
    assert not transformers_logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    disable_progress_bars()  # as with HF_HUB_DISABLE_PROGRESS_BARS=1
    try:
        quiet()
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()


def test_calling_it_again_changes_nothing() -> None:
    quiet()
    before = [len(handler.filters) for handler in logging.getLogger("transformers").handlers]
    quiet()
    assert [len(handler.filters) for handler in logging.getLogger("transformers").handlers] == before


def test_known_warnings_are_hidden_and_others_shown_once() -> None:
    with warnings.catch_warnings(record=True) as shown:
        quiet()
        for text, category in (
            ("`is_gradient_checkpointing` is deprecated and goes", FutureWarning),
            (
                "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to save",
                UserWarning,
            ),
            ("something to know", UserWarning),
        ):
            for _ in range(2):
                warnings.warn(text, category, stacklevel=1)
    assert {str(warning.message) for warning in shown} == {"something to know"}


def test_what_torchao_says_when_it_is_imported_is_dropped_and_its_other_warnings_are_not() -> None:
    quiet()
    quiet()
    texts = (
        "Failed to load x.so: not a library; register_constant() on Enum subclasses is deprecated",
        "what concerns the user",
    )
    for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree")):
        records = [logging.LogRecord(logger.name, logging.WARNING, "", 0, text, None, None) for text in texts]
        assert [bool(logger.filter(record)) for record in records] == [False, True] and len(logger.filters) == 1
