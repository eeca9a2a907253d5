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
TERMINATED = 143
"""Exit status after SIGTERM, as a shell reports it."""


def parse_arguments(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """What ``parser`` makes of the command line; an error ends the process with the usage."""
    return parser.parse_args(list(argv))


@dataclass(frozen=True)
class Command:
    """A subcommand of ``grit``; calling it runs it with the given arguments (default: the process's).

    Args:
        name: how the user calls it.
        description: the first lines of ``--help``.
        configure: adds the options to a parser.
        run: does the work with what ``parse`` returned.
        parse: makes of the parser and the command line what ``run`` takes, by default a namespace of the options.
    """

    name: str
    description: str
    configure: Callable[[ArgumentParser], None]
    run: Callable[[Any], None]
    parse: Callable[[ArgumentParser, Sequence[str]], Any] = parse_arguments

    def parser(self) -> ArgumentParser:
        """A new parser with this command's options."""
        parser = ArgumentParser(prog=f"grit {self.name}", description=self.description)
        self.configure(parser)
        return parser

    def __call__(self, argv: Sequence[str] | None = None) -> None:
        with readable_errors(self.name):
            self.run(self.arguments(argv))

    def arguments(self, argv: Sequence[str] | None = None) -> Any:
        """What ``run`` takes for these arguments (default: the process's)."""
        return self.parse(self.parser(), sys.argv[1:] if argv is None else argv)


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


def add_search(parser: ArgumentParser) -> None:
    """``--hybrid`` and ``--where``, for commands that search an index."""
    parser.add_argument("--hybrid", action="store_true", help="search by words (BM25) as well, and fuse the ranks")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        help="find only documents with source='notes/*', FIELD=VALUE, FIELD>=NUMBER or FIELD<=NUMBER; repeat it",
    )


def add_truncation(parser: ArgumentParser) -> None:
    """``--truncate-dim``, read by :func:`load`."""
    parser.add_argument(
        "--truncate-dim", type=int, help="cut embeddings to so many numbers, for a model that was trained for it"
    )


def add_json(parser: ArgumentParser, what: str = "one JSON object") -> None:
    """``--json``, read by :func:`show`."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def load(arguments: Namespace, mode: str = "unified", **options: Any) -> GritLM:
    """The model of ``--model`` on ``--device``."""
    from python_model.corpora.small_model import resolve_model
    from python_model.model.modeling import GritLM

    if (size := getattr(arguments, "truncate_dim", None)) is not None:
        options["truncate_dim"] = size
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
