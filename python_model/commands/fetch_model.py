"""``grit fetch-model``: download the small model into the cache, once."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import Command, path


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit fetch-model``."""
    parser.add_argument("--cache-dir", type=path, help="where to keep it; default: the cache folder")
    parser.add_argument("--offline", action="store_true", help="never download")


def run(arguments: Namespace) -> None:
    """Download it if it is missing, and print its folder."""
    from python_model.corpora.small_model import fetch_small_model

    print(fetch_small_model(cache_dir=arguments.cache_dir, offline=arguments.offline))


COMMAND = Command(
    "fetch-model", "Download SmolLM2-135M-Instruct once and print the folder of its checkpoint.", configure, run
)
