"""``python -m python_model.train``: the same as ``grit train``, for torchrun."""

from python_model.commands.train import COMMAND

if __name__ == "__main__":
    COMMAND()
