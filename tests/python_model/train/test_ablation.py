"""The ablation runner: every variant once, finished ones are kept, one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from python_model.commands.ablation import COMMAND
from python_model.settings import GritSettings
from python_model.train import ablation
from python_model.train.ablation import read_ablation, run
from tests.conftest import needs_source_tree

ROOT = Path(__file__).parents[3]


def _file(tmp_path: Path, checkpoint: Path, **changes: Any) -> Path:
    rows = [
        {"query": ["Find", f"where is {word}"], "pos": [["", f"{word} is here"]], "neg": [["", "nothing"]], "key": word}
        for word in ("river", "city", "code", "word")
    ]
    talks = [{"text": [f"say {word}", f"{word} it is"]} for word in ("river", "city", "code", "word")]
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "embedding.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (tmp_path / part / "generative.jsonl").write_text("".join(json.dumps(r) + "\n" for r in talks))
    passages = [{"key": r["key"], "text": r["pos"][0][1]} for r in rows]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages))
    content = {
        "output_dir": str(tmp_path / "out"),
        "evaluation": str(tmp_path),
        "max_length": 64,
        "base": {
            "steps": 2,
            "model": {"name": str(checkpoint), "bf16": False},
            "data": {"train_data": str(tmp_path / "train")},
            "batch": {"embedding_batch_size": 2, "generative_batch_size": 2},
        },
        "variants": [
            {"group": "unified", "name": "BBCC mean", "changes": {}},
            {
                "group": "unified",
                "name": "CCCC wmean",
                "changes": {"grit.attn": "cccc", "grit.pooling_method": "weightedmean"},
            },
            {"group": "alone", "name": "embedding", "changes": {"mode": "embedding"}},
            {"group": "alone", "name": "prefix-LM", "changes": {"mode": "generative", "grit.attn": "bbbc"}},
            {"group": "alone", "name": "base", "untrained": True},
        ],
        **changes,
    }
    file = tmp_path / "ablation.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_variants_are_trained_measured_and_tabled_once(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _file(tmp_path, checkpoint)
    COMMAND(["--config", str(file)])
    printed = capsys.readouterr().out
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in printed and table.count("\n| ") == 2 * 1 + 5 and "## unified" in table
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["variant"] for row in rows] == ["BBCC mean", "CCCC wmean", "embedding", "prefix-LM", "base"]
    assert all(0 <= row["scores"]["ndcg_at_10"] <= 1 for row in rows)
    assert [row["scores"]["next_token_loss"] is None for row in rows] == [False, False, True, False, False]
    assert rows[0]["scores"] != rows[1]["scores"] and [row["steps"] for row in rows] == [2, 2, 2, 2, 0]
    assert (checkpoint / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob("*/checkpoint"))
    image = (tmp_path / "out" / "table.png").read_bytes()
    assert image.startswith(b"\x89PNG") and int.from_bytes(image[16:20], "big") == 1080  # the width

    # a second run finds everything done; a variant under other settings is run again, the others are kept
    again: list[str] = []
    measure = ablation._measure
    monkeypatch.setattr(ablation, "_measure", lambda v, *rest: again.append(v.name) or measure(v, *rest))
    run(read_ablation(file))
    assert again == []
    content = yaml.safe_load(file.read_text())
    content["variants"][1]["changes"]["losses.temperature"] = 0.5
    file.write_text(yaml.safe_dump(content))
    run(read_ablation(file))
    assert again == ["CCCC wmean"]
    # the same models measured otherwise are other results
    file.write_text(yaml.safe_dump({**content, "max_length": 20, "variants": content["variants"][-1:]}))
    capsys.readouterr()
    (row,) = run(read_ablation(file))
    assert again[1:] == ["base"] and row["measured_on"]["max_length"] == 20
    assert "texts were longer than max_length (20 tokens); what follows was not read" in capsys.readouterr().out


def test_a_variant_that_reads_another_content_under_the_same_name_is_run_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    file = _file(tmp_path, model, variants=[{"name": "base", "untrained": True}])
    again: list[str] = []
    measure = ablation._measure
    monkeypatch.setattr(ablation, "_measure", lambda v, *rest: again.append(v.name) or measure(v, *rest))

    def measured() -> int:
        again.clear()
        run(read_ablation(file))
        return len(again)

    assert (measured(), measured()) == (1, 0)
    for path in ("train/embedding.jsonl", "test/generative.jsonl", "model/grit.json"):
        changed = tmp_path / path
        if path == "model/grit.json":
            GritSettings(pooling_method="cls").save(model)
        else:
            changed.write_text(changed.read_text().replace("river", "rivers"))
        assert (measured(), measured()) == (1, 0), path
    (model / "README.md").write_text("a card")
    (model / "rag_calibration.json").write_text("{}")
    assert measured() == 0, "neither changes the model"
    result = tmp_path / "out" / "base" / "result.json"
    row = json.loads(result.read_text())
    del row["content"]  # as earlier versions wrote it
    result.write_text(json.dumps(row))
    assert measured() == 0


def test_scores_of_another_precision_are_other_results(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"model": {"name": str(checkpoint)}, "data": {"train_data": str(tmp_path / "train")}}
    file = _file(tmp_path, checkpoint, base=base, variants=[{"name": "base", "untrained": True}])
    again: list[Any] = []
    measure = ablation._measure
    monkeypatch.setattr(ablation, "_measure", lambda v, *rest: again.append(v.name) or measure(v, *rest))
    for bf16 in (False, False, True):
        monkeypatch.setattr(ablation, "computes_in_bfloat16", lambda wanted, device, here=bf16: here)
        (row,) = run(read_ablation(file))
        assert row["config"]["model"]["bf16"] is bf16
    assert len(again) == 2


def test_mistakes_in_the_file_are_named(checkpoint: Path, tmp_path: Path) -> None:
    file = _file(tmp_path, checkpoint, variants=[{"name": "a", "changes": {"grit.atn": "cccc"}}])
    with pytest.raises(SystemExit, match=r"variant 'a': grit.atn: unknown setting; did you mean grit.attn"):
        COMMAND(["--config", str(file)])
    file.write_text(yaml.safe_dump({"base": {}, "variants": [], "more": 1}))
    with pytest.raises(ValueError, match=r"got \['more'\]"):
        read_ablation(file)
    for entry in ({"name": "a", "change": {}}, {"changes": {}}, "a"):
        file.write_text(yaml.safe_dump({"variants": [entry]}))
        with pytest.raises(
            ValueError, match=r"variants: expected a name and any of \['changes', 'group', 'untrained'\]"
        ):
            read_ablation(file)
    file.write_text("variants:\n  - name: a\n    changes:\n")
    assert read_ablation(file).variants[0].changes == {}
    file.write_text(yaml.safe_dump({"variants": [{"name": "a", "changes": {}}, {"name": "A", "changes": {}}]}))
    with pytest.raises(ValueError, match="different names"):
        read_ablation(file)


@needs_source_tree
@pytest.mark.parametrize("name", ["paper", "ratios", "small"])
def test_shipped_files_have_settings_that_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shipped = read_ablation(ROOT / "configs" / "ablations" / f"{name}.yaml")
    configs = [shipped.config(variant) for variant in shipped.variants]
    assert len(configs) == {"paper": 27, "ratios": 7, "small": 4}[name]
