"""``grit completion bash``: a script that completes commands, their options and file names.

eval "$(grit completion bash)"          # or zsh; put the output into a file to save the seconds it takes
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
from collections.abc import Sequence

_SCRIPT = """_grit() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" options=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$options" -- "$current"))
  case "$current" in -*) ;; *) COMPREPLY+=($(compgen -f -- "$current")) ;; esac
}}
complete -o filenames -F _grit grit
"""


def options_of(module: str) -> list[str]:
    """The long options that a command's ``--help`` lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", printed.getvalue())))


def script(shell: str) -> str:
    """The completion script of ``bash`` or ``zsh``."""
    from python_model.cli import COMMANDS

    cases = "\n".join(
        f'    {name}) options="{" ".join(options_of(module))}" ;;' for name, (module, _) in COMMANDS.items()
    )
    text = _SCRIPT.format(commands=" ".join(COMMANDS), cases=cases)
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``grit completion``."""
    parser = argparse.ArgumentParser(prog="grit completion", description="Print a completion script for a shell.")
    parser.add_argument("shell", choices=["bash", "zsh"])
    print(script(parser.parse_args(argv).shell))


if __name__ == "__main__":
    main()
