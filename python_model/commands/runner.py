"""What all commands share: the parser, the options ``--model``, ``--device`` and ``--json``, progress, and readable errors.

A command is a module with a ``COMMAND``: a function that adds its options to a parser, and one that does the work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, Namespace
from tqdm.auto import tqdm

from python_model.support.files import reason_of

if TYPE_CHECKING:
    from python_model.model.modeling import GritLM
    from python_model.rag.modes import Document

SMALL_MODEL = "smollm2-135m"
STDOUT = 1
"""The file descriptor of standard output."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell reports it (128 + SIGINT)."""
TERMINATED = 143
"""Exit status after SIGTERM, as a shell reports it (128 + SIGTERM)."""
READER_GONE = 141
"""Exit status after the reader of standard output has left (``grit doctor | head -1``), as a shell reports it (128 + SIGPIPE)."""


class HelpFormatter(DefaultHelpFormatter):
    """Help that names no class of Python's, and no default where there is none."""

    def _expand_help(self, action: Any) -> str:
        text = re.sub(
            r"(, )?(type: <function [^>]*>|default: (null|\[\])?(?=\)$))", "", str(super()._expand_help(action))
        )
        return text.replace("(, ", "(").removesuffix(" ()")


class Parser(ArgumentParser):
    """A command's parser: what it says of a value of another type is one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=HelpFormatter)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the usage and the message, and exit."""
        found = re.match(
            r"Parser key \"([\w.]+)\":\s+Expected an? <class '(\w+)'>. Got value: (.*)", message, re.DOTALL
        )
        if found and self.exit_on_error:  # else the caller words it
            expected = f"{'an' if found[2] == 'int' else 'a'} {found[2]}"
            message = f"--{found[1].replace('_', '-')}: expected {expected}, got {found[3]!r}"
        message = re.sub(r"^argument (?=[^:]+: expected )", "", message)
        super().error(message, ex)


def location(text: str) -> str:
    """The type of an option for a path, a URL or the name of a model: an empty text would be the current folder."""
    if text == "":  # the values of a repeated option come one by one, then as a list
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return text


def path(text: str) -> Path:
    """The type of an option for a path."""
    return Path(location(text))


def parse_arguments(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse the command line; an error ends the process with the usage message."""
    return parser.parse_args(list(argv))


@dataclass(frozen=True)
class Command:
    """A subcommand of ``grit``; calling it runs it with the given arguments (default: those of the process).

    Args:
        name: its name on the command line.
        description: the first lines of ``--help``.
        configure: adds the options to a parser.
        run: does the work with what ``parse`` returned.
        parse: turns the command line into the argument of ``run``, by default a namespace of the options.
    """

    name: str
    description: str
    configure: Callable[[ArgumentParser], None]
    run: Callable[[Any], None]
    parse: Callable[[ArgumentParser, Sequence[str]], Any] = parse_arguments

    def parser(self) -> ArgumentParser:
        """A new parser with this command's options."""
        parser = Parser(prog=f"grit {self.name}", description=self.description)
        self.configure(parser)
        return parser

    def __call__(self, argv: Sequence[str] | None = None) -> None:
        with readable_errors(self.name):
            self.run(self.arguments(argv))

    def arguments(self, argv: Sequence[str] | None = None) -> Any:
        """The argument of ``run`` for this command line (default: that of the process)."""
        return self.parse(self.parser(), sys.argv[1:] if argv is None else argv)


@contextlib.contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Report errors that a user can fix in one line and exit; other errors keep their traceback.

    Nothing is said if the reader of standard output has left: ``head`` does so.
    """
    from python_model.corpora.small_model import SmallModelError

    try:
        yield
        sys.stdout.flush()  # here, where a closed pipe is expected, rather than at the interpreter's exit
    except BrokenPipeError as error:
        if not _reader_gone():
            raise SystemExit(f"grit {name}: {error}") from error
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # what is left in the buffer has to go somewhere
        raise SystemExit(READER_GONE) from None
    except OSError as error:
        raise SystemExit(f"grit {name}: {reason_of(error, with_path=True)}") from error
    except KeyError as error:
        raise SystemExit(f"grit {name}: {error.args[0] if error.args else error}") from error
    except (
        ValueError,
        TypeError,
        RuntimeError,
        FloatingPointError,
        ImportError,
        SmallModelError,
        sqlite3.Error,
    ) as error:
        raise SystemExit(f"grit {name}: {error}") from error
    except KeyboardInterrupt:
        print(f"\ngrit {name}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _reader_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def refuse_both(arguments: Namespace, first: str, second: str) -> None:
    """Refuse two options of which one would be ignored."""
    if getattr(arguments, first) is not None and getattr(arguments, second) is not None:
        raise ValueError(f"--{first}, --{second}: expected at most one of them, got both")


def refuse_without(arguments: Namespace, parser: ArgumentParser, main: str, *names: str) -> None:
    """Refuse options that would be ignored without the option ``main``: those with another value than by default."""
    if getattr(arguments, main) in (None, False, 0, []):
        for name in names:
            if getattr(arguments, name) != parser.get_default(name):
                option, missing = name.replace("_", "-"), main.replace("_", "-")
                raise ValueError(f"--{option}: expected --{missing} beside it, got none")


def add_model(parser: ArgumentParser) -> None:
    """``--model`` and ``--device``, read by :func:`load`."""
    parser.add_argument(
        "--model", type=location, default=SMALL_MODEL, help="checkpoint folder or name; default: the small model"
    )
    parser.add_argument("--device", help="device to compute on, such as cpu or cuda:1; default: CUDA if available")


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


def add_precision(parser: ArgumentParser) -> None:
    """``--bf16`` and ``--no-bf16``; None where neither is given."""
    parser.add_argument(
        "--bf16",
        action=ActionYesNo(yes_prefix="", no_prefix="no-"),
        default=None,
        help="compute in bfloat16; default: unless the CPU emulates its products",
    )


def add_json(parser: ArgumentParser, what: str = "one JSON object") -> None:
    """``--json``, read by :func:`show`."""
    parser.add_argument("--json", action="store_true", help=f"print {what}")


def load(arguments: Namespace, mode: str = "unified", **options: Any) -> GritLM:
    """Load the model of ``--model`` on ``--device``."""
    from python_model.corpora.small_model import resolve_model
    from python_model.model.modeling import GritLM

    if (size := getattr(arguments, "truncate_dim", None)) is not None:
        options["truncate_dim"] = size
    return GritLM(resolve_model(arguments.model), mode=mode, device=arguments.device, **options)


def add_chunks(parser: ArgumentParser, what: str) -> None:
    """``--chunk-tokens`` and ``--overlap``, read by :func:`chunks_of`; ``what`` is done with chunks."""
    parser.add_argument(
        "--chunk-tokens", type=int, default=0, help=f"{what} of at most so many tokens; 0: leave it whole"
    )
    parser.add_argument(
        "--overlap", type=int, default=0, help="with --chunk-tokens: tokens shared by neighbouring chunks"
    )


def documents_at(name: str, path: str | os.PathLike[str]) -> list[Document]:
    """The documents of a file or folder; says on standard error which files of a folder are skipped, and why."""
    from python_model.rag.documents import read_documents

    def skip(file: os.PathLike[str], reason: str) -> None:
        print(f"grit {name}: skipped {os.fspath(file)}: {reason}", file=sys.stderr, flush=True)

    return list(read_documents(path, skip))


def chunks_of(arguments: Namespace, model: GritLM, documents: Iterable[Document]) -> tuple[list[Document], list[int]]:
    """The chunks of all documents, and the index of the document that each belongs to; without ``--chunk-tokens`` the documents
    are whole.
    """
    from python_model.rag.documents import chunk

    if not arguments.chunk_tokens:
        whole = list(documents)
        return whole, list(range(len(whole)))
    parts, owners = [], []
    for owner, document in enumerate(documents):
        found = chunk(document, model.tokenizer, arguments.chunk_tokens, arguments.overlap) or [document]
        parts += found
        owners += [owner] * len(found)
    return parts, owners


def chunked_texts(
    arguments: Namespace, model: GritLM, texts: Sequence[str]
) -> tuple[Sequence[str], Sequence[int] | None]:
    """The chunks of all texts, and the index of the text that each belongs to; without ``--chunk-tokens`` the texts and None."""
    from python_model.rag.modes import Document

    if not arguments.chunk_tokens:
        return texts, None
    parts, owners = chunks_of(arguments, model, [Document(str(index), text) for index, text in enumerate(texts)])
    return [part.text for part in parts], owners


def tell_cut(name: str, model: GritLM, limit: str, split: str = "") -> None:
    """Say on standard error how many texts ``model`` has truncated, if any; ``limit`` is the option that sets the length,
    ``split`` what ``--chunk-tokens`` would split.
    """
    if model.texts_cut:
        what = "1 text is" if model.texts_cut == 1 else f"{model.texts_cut} texts are"
        instead = f" (--chunk-tokens splits {split} instead)" if split else ""
        print(f"grit {name}: {what} longer than {limit} tokens; what follows is ignored{instead}", file=sys.stderr)


def show(arguments: Namespace, result: Any, text: str) -> None:
    """Print ``result`` as JSON with ``--json``, otherwise ``text``."""
    print(json.dumps(result, ensure_ascii=False) if arguments.json else text, flush=True)


@contextlib.contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields the callback ``(done, total)`` that updates it."""
    with tqdm(desc=what, unit=unit, file=sys.stderr, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
