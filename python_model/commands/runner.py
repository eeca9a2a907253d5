"""What all commands share: the parser, the options ``--model``, ``--device`` and ``--json``, progress, and readable errors.

A command is a module with a ``COMMAND``: a function that adds its options to a parser, and one that does the work and returns
what it prints.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from python_model.model.modeling import GritLM

SMALL_MODEL = "smollm2-135m"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell reports it."""


@dataclass(frozen=True)
class Command:
    """A subcommand of ``grit``; calling it runs it with the given arguments (default: the process's).

    Args:
        name: how the user calls it.
        description: the first lines of ``--help``.
        configure: adds the options to a parser.
        run: does the work.
    """

    name: str
    description: str
    configure: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]

    def parser(self) -> ArgumentParser:
        """A new parser with this command's options."""
        parser = ArgumentParser(prog=f"grit {self.name}", description=self.description)
        self.configure(parser)
        return parser

    def __call__(self, argv: Sequence[str] | None = None) -> None:
        arguments = self.parser().parse_args(None if argv is None else list(argv))
        with readable_errors(self.name):
            self.run(arguments)


@contextlib.contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Errors that a user can mend end the process with one line; others keep their traceback."""
    from python_model.corpora.small_model import SmallModelError

    try:
        yield
    except KeyError as error:
        raise SystemExit(f"grit {name}: {error.args[0] if error.args else error}") from error
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError, SmallModelError) as error:
        raise SystemExit(f"grit {name}: {error}") from error
    except KeyboardInterrupt:
        print(f"\ngrit {name}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def add_model(parser: ArgumentParser) -> None:
    """``--model`` and ``--device``, read by :func:`load`."""
    parser.add_argument(
        "--model", default=SMALL_MODEL, help="checkpoint folder or name; the default is the small model"
    )
    parser.add_argument("--device", help="where to compute, such as cpu or cuda:1; the default is CUDA if there is one")


def add_json(parser: ArgumentParser, what: str = "one JSON object") -> None:
    """``--json``, read by :func:`show`."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def load(arguments: Namespace, mode: str = "unified", **options: Any) -> GritLM:
    """The model of ``--model`` on ``--device``."""
    from python_model.corpora.small_model import resolve_model
    from python_model.model.modeling import GritLM

    return GritLM(resolve_model(arguments.model), mode=mode, device=arguments.device, **options)


def show(arguments: Namespace, result: Any, text: str) -> None:
    """Print ``result`` as JSON with ``--json``, else ``text``."""
    print(json.dumps(result, ensure_ascii=False) if arguments.json else text, flush=True)


@contextlib.contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error; yields the callback ``(done, total)`` that long work calls."""
    with tqdm(desc=what, unit=unit, file=sys.stderr, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
