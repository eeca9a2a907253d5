"""The options of every command with their types and defaults are those of options.txt, so that none changes unseen.

After a change that is meant: python -m tests.python_model.commands.test_options
"""

from __future__ import annotations

import importlib
from argparse import Action
from pathlib import Path

import pytest

from python_model.cli import COMMANDS

LISTED = Path(__file__).with_name("options.txt")
FROM_SETTINGS = ("train", "ablation")
"""Their options are the fields of the settings, see train/test_defaults.py."""


def shown(action: Action) -> str:
    """An option on one line: its names, its type, and what else it was made with."""
    kind = getattr(action, "_typehint", action.type)  # jsonargparse keeps the type that it parses itself
    made = {
        "default": action.default,
        "choices": action.choices,
        "nargs": action.nargs,
        "metavar": action.metavar,
        "required": bool(action.option_strings) and action.required,
    }
    words = ["/".join(action.option_strings) or action.dest]
    if (name := type(action).__name__) not in ("_StoreAction", "ActionTypeHint"):
        words.append(name.strip("_"))
    if kind is not None and not (spelled := getattr(kind, "__name__", str(kind))).startswith("_"):
        words.append(spelled)
    words += [f"{name}={value!r}" for name, value in made.items() if value not in (None, "==SUPPRESS==")]
    return " ".join(word for word in words if word not in ("required=False", "nargs=0"))


def options(name: str) -> str:
    """The options of a command, in the order of its help."""
    command = importlib.import_module(COMMANDS[name][0]).COMMAND
    lines = [shown(action) for action in command.parser()._actions if "--help" not in action.option_strings]
    return "\n".join([f"grit {name}", *(f"  {line}" for line in lines)]) + "\n"


def written() -> str:
    """What options.txt should hold."""
    return "\n".join(options(name) for name in COMMANDS if name not in FROM_SETTINGS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in FROM_SETTINGS])
def test_a_commands_options_are_the_listed_ones(name: str) -> None:
    listed = {part.split("\n", 1)[0]: part for part in LISTED.read_text(encoding="utf-8").split("\n\n")}
    assert options(name).strip() == listed[f"grit {name}"].strip()


if __name__ == "__main__":
    LISTED.write_text(written(), encoding="utf-8")
