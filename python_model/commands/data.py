"""``grit data``: build training and held-out data from real text in packages, or from your own rows."""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from python_model.commands.runner import Command, add_json, location, path
from python_model.support.files import cache_folder, make_folder

SIZES = {"negatives": None, "held_out": 50, "max_rows": None, "test_rows": None, "corpus_rows": None}
"""The largest value of each numeric option, where there is one."""
OF_PACKAGES = ("sources", "negatives", "max_rows", "corpus_rows")
"""Options without a meaning for own rows, of which none is left out and no negative is mined."""


def configure(parser: ArgumentParser) -> None:
    """The options of ``grit data``."""
    from python_model.corpora.build import SOURCES

    parser.add_argument("output", type=path, help="new folder")
    parser.add_argument(
        "--from",
        dest="paths",
        type=location,
        nargs="+",
        metavar="ROWS",
        help="use your own rows from these files or folders instead",
    )
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES), help="packages to read")
    parser.add_argument("--negatives", type=int, default=4, help="hard negatives per query")
    parser.add_argument("--held-out", type=int, default=5, help="percentage of entities held out")
    parser.add_argument("--max-rows", type=int, default=40_000, help="rows per training data set")
    parser.add_argument(
        "--test-rows", type=int, default=200, help="held-out queries, conversations or questions per data set"
    )
    parser.add_argument("--corpus-rows", type=int, default=2000, help="passages per data set in the corpus")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    add_json(parser, "the manifest instead of a table")


def run(arguments: Namespace) -> None:
    """Build the folder and print what is in it."""
    from python_model.corpora.build import build, build_own

    for name, most in SIZES.items():
        value = getattr(arguments, name)
        if value < 1 or (most is not None and value > most):
            raise ValueError(
                f"{name.replace('_', '-')}: expected {f'1 to {most}' if most else '1 and more'}, got {value}"
            )
    if arguments.paths:
        options_of = COMMAND.parser()
        for name in OF_PACKAGES:
            if getattr(arguments, name) != options_of.get_default(name):
                instead = "; `grit mine` finds them" if name == "negatives" else ""
                raise ValueError(f"--{name.replace('_', '-')}: expected none beside --from, got it{instead}")
    output = arguments.output
    if output.exists() and not arguments.overwrite:
        raise ValueError(f"output: {output} exists; choose another folder or pass --overwrite")
    if output.is_file():
        raise NotADirectoryError(f"output: expected a folder or a new name, got the file {output}")
    make_folder(output.parent)  # now, rather than after the sources are read
    told: list[str] = []
    if arguments.paths:
        manifest, told = build_own(output, arguments.paths, percent=arguments.held_out, test_rows=arguments.test_rows)
    else:
        manifest = build(
            output,
            list(dict.fromkeys(arguments.sources)),
            cache_folder() / "packages",
            negatives=arguments.negatives,
            percent=arguments.held_out,
            max_rows=arguments.max_rows,
            test_rows=arguments.test_rows,
            corpus_rows=arguments.corpus_rows,
        )
    if arguments.json:
        print(json.dumps(manifest, indent=2, ensure_ascii=False))
        return
    lines = [*told, *(f"{output / path}: {facts['rows']} rows" for path, facts in manifest["files"].items())]
    print("\n".join([*lines, f"train with: grit train --config {output / 'train.yaml'}"]))


COMMAND = Command(
    "data", "Build training and held-out data from real text in packages, or from your own rows.", configure, run
)
