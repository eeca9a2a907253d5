"""What the commands do not print: progress bars of loading and saving, reports of no consequence, repeated messages.

``grit`` calls :func:`quiet` before every command. Messages are recognised by their text, each listed with the reason why it does
not concern the user of a command; whatever is not listed here is shown.
"""

from __future__ import annotations

import logging
import sys
import warnings

KNOWN_WARNINGS = (
    # PEFT uses the old name of gradient checkpointing (training with adapters)
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated"),
    # torch's checkpoints of a single process, which is intended (states of `grit train`)
    (UserWarning, r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent"),
)
"""Category and beginning of warnings that need no action: between other packages, or about what is intended."""

KNOWN_LOGS = (
    # kernels for GPUs that are not here; its 8-bit optimiser has none of them
    ("torchao", "Failed to load "),
    # torchao uses the old way of naming constants to torch
    ("torch.utils._pytree", "register_constant() on Enum subclasses is deprecated"),
)
"""Logger and part of messages that need no action: transformers imports torchao wherever it is installed."""

LOAD_REPORT = "LOAD REPORT"
PROBLEMS = ("MISSING", "MISMATCH", "CONVERSION")


class KnownMessages(logging.Filter):
    """Drops a log record of transformers that was shown before, or that only lists weights which a command omits on purpose,
    such as the language-model head when a checkpoint is loaded as an embedding model."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show the record."""
        text = record.getMessage()
        if LOAD_REPORT in text and not any(word in text for word in PROBLEMS):
            return False
        if record.levelno < logging.WARNING or text not in self.shown:
            self.shown.add(text)
            return True
        return False


class Without(logging.Filter):
    """Drops a log record that contains this text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show the record."""
        return self.text not in record.getMessage()


def quiet() -> None:
    """Print only what a command was asked for. Calling it again has no effect."""
    if not sys.warnoptions:  # -W and PYTHONWARNINGS take precedence
        warnings.simplefilter("once")  # wherever it comes from
        # Python itself shows these only to the author of a script
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", hidden)
    for category, text in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", text, category)
    for name, text in KNOWN_LOGS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, Without) for known in logger.filters):
            logger.addFilter(Without(text))
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # of loading and writing weights
    if downloads:  # disabled along with them, but downloads deserve a bar
        enable_progress_bars()
    for handler in logging.getLogger("transformers").handlers:
        if not any(isinstance(known, KnownMessages) for known in handler.filters):
            handler.addFilter(KnownMessages())
