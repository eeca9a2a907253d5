"""What a checkpoint holds beside its decoder: settings, embedding head, and a config that per-sample flags need changed."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import grit_kernels as gk
from python_model.model.modules_json import head_of_modules, limit_of_modules, settings_of_modules
from python_model.settings import SETTINGS_FILE, GritSettings
from python_model.support.arguments import check_path

HEAD_FILE = "embedding_head.safetensors"
WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
"""Arguments of ``from_pretrained`` that locate a checkpoint's files."""


def check_place(path: str | os.PathLike[str]) -> None:
    """Check that a checkpoint may be there: a folder with a config, or a name that the hub may know.

    Raises:
        ValueError, FileNotFoundError, NotADirectoryError: it can be neither.
    """
    check_path("model_name_or_path", path)
    folder = Path(path)
    if not folder.exists() and str(path).startswith((".", "/", "~")):
        raise FileNotFoundError(f"model_name_or_path: there is no folder {path}")
    if folder.is_file():
        raise NotADirectoryError(f"model_name_or_path: expected a checkpoint's folder or name, got the file {path}")


def saved_settings(path: str | os.PathLike[str], **where: Any) -> GritSettings | None:
    """The settings saved with a checkpoint, a folder or a name on the hub; None if it has none. ``where``: see ``WHERE``.

    Raises:
        ValueError: a settings file holds something that is not understood.
    """
    if (file := _file(str(path), SETTINGS_FILE, **where)) is not None:
        return GritSettings.load(file)
    try:
        return settings_of_modules(functools.partial(_file, str(path), **where))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def saved_head(path: str | os.PathLike[str], **where: Any) -> dict[str, Tensor] | None:
    """Weight and bias of the embedding head saved with a checkpoint, or None."""
    from safetensors.torch import load_file

    if (file := _file(str(path), HEAD_FILE, **where)) is not None:
        return load_file(file)
    if _file(str(path), SETTINGS_FILE, **where) is not None:
        return None
    return head_of_modules(functools.partial(_file, str(path), **where))


def saved_limit(path: str | os.PathLike[str], tokenizer: Any, positions: int, **where: Any) -> int | None:
    """See :func:`python_model.model.modules_json.limit_of_modules`; None for a checkpoint with settings of its own, too.

    Raises:
        ValueError: it cuts texts in another way than GritLM.
    """
    if _file(str(path), SETTINGS_FILE, **where) is not None:
        return None
    try:
        return limit_of_modules(functools.partial(_file, str(path), **where), tokenizer, positions)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_no_head(path: str | os.PathLike[str], *, subfolder: str = "") -> None:
    """Check that a folder whose settings name no embedding head has none: its embeddings would lack it.

    Raises:
        ValueError: it has one.
    """
    if (Path(path) / subfolder / HEAD_FILE).exists():
        raise ValueError(
            f"projection: expected the size of the head in {HEAD_FILE}, which {path} has, got none in its settings; give it, or "
            "remove the file"
        )


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Errors about a checkpoint that cannot be read name it: transformers' name the hub, safetensors' nothing."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"model: expected a checkpoint, got {path} with weights that cannot be read ({error})"
        ) from error
    except OSError as error:
        if Path(path).exists():
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(f"model: there is no folder {path}, and no such model was found on the hub ({reason})") from error


def one_flag_per_sample(path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """``from_pretrained``'s arguments, with a config whose attention follows each sample's flag.

    A Gemma 3 made bidirectional by its config sees ``|i - j| < sliding_window``; by the flag it sees ``<=``.
    """
    if "config" in arguments:
        return arguments
    from transformers import AutoConfig

    names = (*WHERE, "trust_remote_code")
    config: Any = AutoConfig.from_pretrained(path, **{name: arguments[name] for name in names if name in arguments})
    if not gk.hf.reads_texts_both_ways(getattr(config, "use_bidirectional_attention", None)):
        return arguments
    config.use_bidirectional_attention = False
    config.sliding_window -= 1
    return {**arguments, "config": config}


def _file(path: str, name: str, **where: Any) -> Path | None:
    """A file of a checkpoint, or None if the checkpoint has none of that name."""
    from transformers.utils import cached_file

    with reading(path):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)
    return None if found is None else Path(found)
