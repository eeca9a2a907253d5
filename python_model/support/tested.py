"""The tested versions: the constraints that `make install` uses, and which installed packages differ from them."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
DISTRIBUTION = "grit-kernels"


@dataclass(frozen=True)
class Outside:
    """An installed package that is older than required or newer than what was tested, or a Python that was not tested."""

    name: str
    installed: str
    tested: str

    def __str__(self) -> str:
        return f"{self.name} {self.installed} (tested: {self.tested})"


def tested_versions(text: str | None = None) -> dict[str, str]:
    """Tested version by canonical package name, for the running Python; of Python and torch all, with spaces between."""
    content = CONSTRAINTS.read_text(encoding="utf-8") if text is None else text
    found: dict[str, str] = {}
    for line in content.splitlines():
        if line.startswith("# tested:"):
            found |= {name.lower(): version for name, version in re.findall(r"(\w+) ([\d. ]+)", line)}
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                (pin,) = requirement.specifier
                found[canonicalize_name(requirement.name)] = pin.version
    return found


def differences() -> dict[str, tuple[str, str]]:
    """(installed, tested) of every installed package, including indirect ones, whose version differs from the tested one."""
    found = {}
    for name, tested in sorted(tested_versions().items()):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(Version(installed).public) not in map(Version, tested.split()):
            found[name] = (installed, tested)
    return found


def lowest_versions() -> dict[str, str]:
    """The lower bound of each direct requirement, including extras, by canonical name; "" if there is none."""
    found: dict[str, str] = {}
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # on the path as sources, not installed
        return found
    for line in lines:
        requirement = Requirement(line)
        bounds = [pin.version for pin in requirement.specifier if pin.operator in (">=", "==", "~=")]
        name = canonicalize_name(requirement.name)
        if bounds or name not in found:
            found[name] = max(bounds, key=Version, default="")
    return found


def outside_of_tested() -> list[Outside]:
    """Direct requirements, including extras, installed in a version outside the tested range."""
    tested, found = tested_versions(), []
    for name, lowest in sorted(lowest_versions().items()):
        if name not in tested or name == DISTRIBUTION:
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        # a local part such as +cpu identifies the build, not the version
        number = Version(Version(installed).public)
        highest = max(tested[name].split(), key=Version)
        if number > Version(highest) or (lowest and number < Version(lowest)):
            span = f"{lowest} to {highest}" if lowest else f"up to {highest}"
            found.append(Outside(name, installed, span))
    python = ".".join(map(str, sys.version_info[:2]))
    if python not in (pythons := tested["python"].split()):
        found.insert(0, Outside("Python", python, ", ".join(pythons)))
    return found
