"""``grit completion bash``: a shell script that completes commands, options and file names.

eval "$(grit completion bash)"          # or zsh; save the output to a file to skip the seconds it takes
"""

from __future__ import annotations

import importlib

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import Command, location, path
from python_model.support.optional import require

SHELLS = ("bash", "zsh")


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit completion``."""
    parser.add_argument("shell", choices=SHELLS, help="shell to write the script for")


def script(shell: str) -> str:
    """The completion script for ``bash`` or ``zsh``, from the parsers of all commands."""
    from python_model.cli import COMMANDS

    shtab = require("shtab", "completion")

    root = ArgumentParser(prog="grit")
    commands = root.add_subcommands()
    for name, (module, text) in COMMANDS.items():
        parser = importlib.import_module(module).COMMAND.parser()
        for action in parser._actions:
            if action.type in (location, path):
                action.complete = shtab.FILE
        commands.add_subcommand(name, parser, help=text)
    return str(shtab.complete(root, shell))


def run(arguments: Namespace) -> None:
    """Print the script."""
    print(script(arguments.shell))


COMMAND = Command("completion", "Print a completion script for a shell.", configure, run)
