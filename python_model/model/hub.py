"""Uploads a checkpoint to the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from python_model.support.arguments import check_path

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "README.md")
"""Files of a checkpoint; anything else in the folder is not uploaded."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""``owner/name``."""


def check_hub_name(argument: str, name: str) -> None:
    """ValueError unless ``name`` is ``owner/name``."""
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"{argument}: expected owner/name, got {name!r}")


def check_credentials(argument: str) -> None:
    """ValueError if the machine has no token of the hub; whether the hub accepts it is not asked."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError(f"{argument}: expected the credentials of `hf auth login` or HF_TOKEN, got none")


def push_to_hub(folder: str | os.PathLike[str], name: str, *, private: bool = True, api: Any = None) -> str:
    """Upload a checkpoint as ``name`` (``owner/name``), created if it does not exist; returns its URL.

    The user is the one of ``hf auth login`` or ``HF_TOKEN``: a token is not an argument, so that no file of a run contains it.

    Args:
        private: whether a new repository is private.
        api: a ``huggingface_hub.HfApi``.

    Raises:
        ValueError: a malformed name. FileNotFoundError: the folder holds no checkpoint. OSError: the hub did not take it.
    """
    check_hub_name("name", name)
    check_path("folder", folder)
    source = Path(folder)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"folder: there is no config.json in {source}")
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=source, allow_patterns=list(PATTERNS), commit_message="Upload a GRIT checkpoint"
        )
    except Exception as error:  # of the network, the hub or its client, which have no base in common
        later = f"`hf upload {name} {source}{' --private' if private else ''}` uploads it later"
        raise OSError(f"{source} is complete, but was not uploaded to {name} ({_told(error)}); {later}") from error
    return str(getattr(commit, "repo_url", None) or f"https://huggingface.co/{name}")


def _told(error: BaseException | None) -> str:
    """The message on one line, with those of its causes: the client says which file failed, and only its cause says why."""
    from huggingface_hub.errors import HfHubHTTPError

    messages = []
    while error is not None:
        messages.append(re.sub(r" For more information check: \S+", "", " ".join(str(error).split())))
        error = None if isinstance(error, HfHubHTTPError) else error.__cause__  # whose cause says less than itself
    return ": ".join(messages)
