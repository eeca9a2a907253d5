"""WordNet 3.0: senses with their words, definition and example sentences.

Source: the Debian package ``wordnet-base``; its licence allows use and redistribution with the notice kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from python_model.corpora.sources.packages import deb_files, fetch_deb, read_checked
from python_model.support.files import new_folder

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
    common: bool  # its first word occurs with this sense in a sense-tagged text
    instance_of: tuple[str, ...] = ()  # for a person or a place: what it is an instance of
    known_name: bool = False  # an instance whose name occurs with this sense in a sense-tagged text

    @property
    def query(self) -> str:
        """Words and part of speech, as a query."""
        return f"{', '.join(self.words[:3])} ({NAMES[self.part]})"

    def example_with(self, word: str) -> str | None:
        """The first example sentence that contains the word, in any inflection."""
        stem = re.escape(word[: max(3, len(word) - 2)])
        for example in self.examples:
            if 4 <= len(example.split()) <= 25 and re.search(rf"\b{stem}", example, re.IGNORECASE):
                return example
        return None


def fetch_wordnet(cache: Path) -> Path:
    """A folder with the database files, extracted from the Debian package."""
    folder = cache / "wordnet-3.0"
    if not all((folder / name).is_file() for name in WORDNET_SHA256):
        files = deb_files(fetch_deb("wordnet-base", cache, "1:3.0*").read_bytes(), WORDNET_SHA256)
        with new_folder(folder) as unpacked:
            for name, content in files.items():
                (unpacked / name).write_bytes(content)
    return folder


def read_wordnet(folder: Path) -> dict[str, Synset]:
    """Synsets by key."""
    files = {name: read_checked(folder / name, sha).decode() for name, sha in WORDNET_SHA256.items()}
    common: set[tuple[str, str]] = set()  # (word, synset) found in tagged text
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
            instance_of = tuple(p + offset for symbol, offset, p in pointers if symbol == "@i")
            synsets[key] = Synset(
                key=f"wordnet:{key}",
                part=part,
                words=words,
                gloss=gloss.strip(" ;"),
                examples=tuple(
                    e.strip('" ;') for e in examples if re.fullmatch(r'"[^"]+"[; ]*', e)
                ),  # no quoted authors
                groups=tuple(p + offset for symbol, offset, p in pointers if symbol in ("@", "&")),
                common=not instance_of and (words[0].lower(), key) in common,
                instance_of=instance_of,
                known_name=bool(instance_of) and any((w.lower().replace(" ", "_"), key) in common for w in words),
            )
    return synsets
