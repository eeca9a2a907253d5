"""``python -m python_model.generate``: the same as ``grit generate``."""

from python_model.commands.generate import COMMAND

COMMAND()
