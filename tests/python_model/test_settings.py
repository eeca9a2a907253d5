"""Settings are parsed, checked, saved and loaded in one place; what is not understood is refused by name."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path
from typing import Any

import pytest

from python_model.settings import ATTENTION, NAMES, VERSION, AttentionVariant, GritSettings

# as commit bdb9736 wrote it
UNVERSIONED = {
    "pooling_method": "lasttoken",
    "normalized": False,
    "attn": "cccc",
    "embed_eos": "</e>",
    "instruction_count": "reference",
    "bidirectional_window": "full",
    "projection": None,
}


@pytest.mark.parametrize("letters", ATTENTION)
def test_a_variant_is_parsed_into_who_sees_whom(letters: str) -> None:
    variant = AttentionVariant.parse(letters)
    assert str(variant) == (letters + "cc")[:4] and AttentionVariant.parse(str(variant)) == variant
    assert (variant.instruction_causal, variant.embedding_causal) == (letters[0] == "c", letters[1] == "c")
    assert variant.embedding_is_uniform == (letters[0] == letters[1])
    assert variant.generates_causally == (letters[2:] in ("", "cc"))


@pytest.mark.parametrize("letters", ["", "b", "bc", "bbc", "bbbb", "BBCC", "bbcccc"])
def test_other_letters_are_refused(letters: str) -> None:
    with pytest.raises(ValueError, match="attn: expected one of 'bb'"):
        GritSettings(attn=letters)


def test_either_half_of_a_variant_is_checked() -> None:
    for halves, name in ((("bx", "cc"), "embedding"), (("bb", "bx"), "generative"), (("bb", "ccc"), "generative")):
        with pytest.raises(ValueError, match=f"^{name}: expected one of"):
            AttentionVariant(*halves)  # type: ignore[arg-type]
    for halves, name in ((("bbcc", ""), "embedding"), (("", "bbcc"), "embedding"), (("b", "bcc"), "embedding")):
        with pytest.raises(ValueError, match=f"^{name}: expected one of"):
            AttentionVariant(*halves)  # type: ignore[arg-type]
    assert AttentionVariant("cb", "il") == AttentionVariant.parse("cbil")


def test_settings_are_frozen_and_two_letters_are_completed() -> None:
    settings = GritSettings(attn="cb")
    assert settings.attn == "cbcc" and settings == GritSettings(attn="cbcc")
    with pytest.raises(FrozenInstanceError):
        settings.normalized = False  # type: ignore[misc]
    assert settings.changed(normalized=None, attn="bb") == GritSettings()


def test_an_instruction_that_is_read_by_another_flag_has_no_part_in_the_mean() -> None:
    assert GritSettings(attn="cccc", embed_instruction=True).embed_instruction
    with pytest.raises(ValueError, match="^embed_instruction: expected False with attn 'cbcc'.*got True"):
        GritSettings(attn="cbcc", embed_instruction=True)


BROKEN: dict[str, Any] = {
    "pooling_method": "max",
    "normalized": 1,
    "attn": "bxcc",
    "embed_eos": None,
    "instruction_count": "guess",
    "embed_instruction": "yes",
    "bidirectional_window": "half",
    "projection": 0,
    "projection_activation": "tanh",  # without a projection
    "truncate_dim": 0,
    "special_tokens": "eos",
    "format": "tulu",
    "prompts": {"query": 1},
    "default_prompt_name": "query",  # which is not there
}


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_is_checked_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{name}: "):
        GritSettings(**{name: BROKEN[name]})
    file = tmp_path / "grit.json"
    file.write_text(json.dumps({"version": VERSION, **asdict(GritSettings()), name: BROKEN[name]}))
    with pytest.raises(ValueError, match=f"grit.json: {name}: "):
        GritSettings.load(file)


@pytest.mark.parametrize("name", ["projection", "truncate_dim"])
@pytest.mark.parametrize("size", [True, 8.0, "8"])
def test_sizes_are_whole_numbers(name: str, size: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected an int or None, got {size!r}"):
        GritSettings(**{name: size})


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    settings = GritSettings(
        pooling_method="lasttoken",
        normalized=False,
        attn="cbil",
        embed_eos="</e>",
        instruction_count="reference",
        bidirectional_window="full",
        projection=8,
        projection_activation="tanh",
        truncate_dim=4,
        special_tokens="bos",
        format="zephyr",
        prompts={"query": "Find: "},
        default_prompt_name="query",
    )
    defaults = GritSettings()
    changed = {field.name for field in fields(GritSettings)} - {"embed_instruction"}
    assert all(getattr(settings, name) != getattr(defaults, name) for name in changed)
    settings.save(tmp_path)
    assert GritSettings.load(tmp_path / "grit.json") == settings
    assert json.loads((tmp_path / "grit.json").read_text())["version"] == VERSION


def test_a_file_without_a_version_is_read_as_it_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "grit.json"
    file.write_text(json.dumps(UNVERSIONED))
    assert GritSettings.load(file) == GritSettings(
        pooling_method="lasttoken",
        normalized=False,
        attn="cccc",
        embed_eos="</e>",
        instruction_count="reference",
        bidirectional_window="full",
        special_tokens="bos",  # every text began with BOS then
    )
    file.write_text(json.dumps({"attn": None}))
    assert GritSettings.load(file) == GritSettings(special_tokens="bos")


def test_a_file_of_version_1_embeds_whole(tmp_path: Path) -> None:
    file = tmp_path / "grit.json"
    content = {**asdict(GritSettings(attn="cccc")), "version": 1}
    del content["truncate_dim"]
    file.write_text(json.dumps(content))
    assert GritSettings.load(file) == GritSettings(attn="cccc")
    file.write_text(json.dumps({**content, "truncate_dim": 8}))
    with pytest.raises(ValueError, match=r"unknown fields \['truncate_dim'\]"):
        GritSettings.load(file)
    with pytest.raises(ValueError, match="truncate_dim: expected at most the projection's 8, got 9"):
        GritSettings(projection=8, truncate_dim=9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": VERSION + 1}, f"version: expected at most {VERSION}, got {VERSION + 1}"),
        ({"version": "1"}, "version: expected at most"),
        ({**UNVERSIONED, "special_tokens": "bos"}, r"unknown fields \['special_tokens'\]"),
        ({**UNVERSIONED, "pooling": "mean"}, r"unknown fields \['pooling'\]"),
        ({"version": VERSION, **asdict(GritSettings()), "rope": 1}, r"unknown fields \['rope'\]"),
        ({"version": VERSION, "attn": "bbcc"}, "missing fields"),
        ([], "expected an object, got list"),
        ("{", "not a JSON file"),
    ],
)
def test_a_newer_file_and_what_is_not_understood_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "grit.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"{file}: {message}"):
        GritSettings.load(file)
