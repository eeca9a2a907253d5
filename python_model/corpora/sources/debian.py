"""Packages of this machine's Debian archive: one-line summary and full description, one binary package per source package.

Source: apt's package index with English descriptions, downloaded into the cache folder; apt's own lists are not touched. The
texts are under the packages' licences: build with them, but do not redistribute them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from python_model.corpora.sources.packages import SourceError, require_apt, run

_HELPER = "/usr/lib/apt/apt-helper"


@dataclass(frozen=True)
class Package:
    """One source package."""

    key: str
    name: str
    homepage: str
    summary: str
    description: str


def fetch_index(cache: Path) -> tuple[str, str]:
    """The texts of the largest index of packages and of its English descriptions.

    Raises:
        SourceError: apt is missing or cannot reach the archive, or the archive is not a Debian archive.
    """
    require_apt("debian")
    folder = cache / "apt"
    options = ["-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
    options += ["-o", "Acquire::Languages=en"]
    targets = _targets(options)
    if len(targets) < 2:  # not downloaded yet
        for part in ("lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        run(["apt-get", "-q", "update", *options], "debian")
        targets = _targets(options)
    if missing := {"Packages", "Translations"} - targets.keys():
        raise SourceError(f"debian: apt has no index of {missing.pop()} for component main; leave the source out")
    packages, descriptions = (_text(targets[kind]) for kind in ("Packages", "Translations"))
    return packages, descriptions


def read_debian(packages: str, descriptions: str) -> list[Package]:
    """Packages with a summary of three words and a description of 80 characters or more; each text once."""
    translated = {
        (entry.get("Package"), entry.get("Description-md5")): entry.get("Description-en", "")
        for entry in _entries(descriptions)
    }
    best: dict[str, Package] = {}
    for entry in _entries(packages):
        name, source = entry["Package"], entry.get("Source", entry["Package"]).split()[0]
        text = translated.get((name, entry.get("Description-md5")))
        if not text or (name != source and re.search(r"-(dbg|dbgsym|doc|prof|dev|common|data)$", name)):
            continue
        if source not in best or name == source:
            summary, _, rest = text.partition("\n")
            paragraphs = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in re.split(r"\n \.\n", rest))
            homepage = re.sub(r"^https?://([^/]*/[^/]*).*", r"\1", entry.get("Homepage", ""))
            description = "\n".join(filter(None, paragraphs))
            best[source] = Package(f"debian:{source}", name, homepage, summary.strip(), description)
    found: list[Package] = []
    seen: set[str] = set()
    for package in best.values():
        texts = {package.summary.lower(), package.description.lower()}
        unusable = re.search("transitional|dummy", package.summary, re.IGNORECASE)
        if not unusable and len(package.summary.split()) >= 3 and len(package.description) >= 80 and not seen & texts:
            seen |= texts
            found.append(package)
    return found


def _targets(options: list[str]) -> dict[str, Path]:
    """The largest downloaded index file of each kind in component main."""
    command = ["apt-get", "indextargets", "--format", "$(CREATED_BY)\t$(COMPONENT)\t$(FILENAME)", *options]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, Path] = {}
    for line in answer.stdout.splitlines():
        kind, component, name = line.split("\t")
        path = Path(name)
        if component == "main" and path.is_file():
            larger = kind not in found or path.stat().st_size > found[kind].stat().st_size
            found[kind] = path if larger else found[kind]
    return found


def _text(path: Path) -> str:
    """An index, whatever its compression."""
    answer = subprocess.run([_HELPER, "cat-file", str(path)], capture_output=True, check=False)
    if answer.returncode:
        raise SourceError(f"debian: {_HELPER} cannot read {path}: {answer.stderr.decode().strip()}")
    return answer.stdout.decode("utf-8", "replace")


def _entries(text: str) -> Iterator[dict[str, str]]:
    """The paragraphs of a control file as fields; continuation lines are joined by newlines."""
    for paragraph in text.split("\n\n"):
        entry: dict[str, str] = {}
        field = ""
        for line in paragraph.split("\n"):
            if line[:1] in (" ", "\t") and field:
                entry[field] += "\n" + line
            elif ":" in line:
                field, _, value = line.partition(":")
                entry[field] = value.strip()
        if entry:
            yield entry
