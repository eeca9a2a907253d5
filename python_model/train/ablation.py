"""``grit ablation --config FILE``: train variants one after another, evaluate each, write one table.

    output_dir: ablation_output
    evaluation: python_model/data/sample     # folder with corpus.jsonl and test/ (default: the bundled sample)
    max_length: 192                          # maximum tokens of a text in the evaluation
    base:                                    # settings of python_model.train that all variants share
      steps: 100
      data: {train_data: ...}
    variants:
      - {group: attention and pooling, name: BBCC mean, changes: {grit.attn: bbcc}}
      - {group: attention and pooling, name: CCCC wmean, changes: {grit.attn: cccc, grit.pooling_method: weightedmean}}
      - {group: attention and pooling, name: base model, untrained: true}

A variant that has finished under the same settings, with the same model and data, is not run again, an interrupted one resumes.
``table.md``, ``table.json`` and the plot ``table.png`` are updated after each variant.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from python_model.data.files import data_files, dataset_name
from python_model.data.index import index_files
from python_model.evaluation.held_out import HeldOut, cut_line, evaluate, held_out_digest
from python_model.support.arguments import check_path
from python_model.support.files import read_yaml, write_json, write_text
from python_model.support.precision import computes_in_bfloat16, device_of
from python_model.train.config import TrainConfig, dotted, flatten
from python_model.train.plot import plot_ablation

COLUMNS = ("ndcg_at_10", "mrr_at_10", "recall_at_10", "next_token_loss")


@dataclass(frozen=True)
class Variant:
    """A row of the table: ``changes`` are settings of python_model.train that override the shared ones; ``untrained`` evaluates
    the model that the others start from.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    untrained: bool = False

    @property
    def folder(self) -> str:
        """The name as a folder name."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.group} {self.name}".lower()).strip("-")


@dataclass(frozen=True)
class Ablation:
    """A file of variants; see the top of this file."""

    base: dict[str, Any]
    variants: list[Variant]
    output_dir: str = "ablation_output"
    evaluation: str = ""
    max_length: int = 512

    def __post_init__(self) -> None:
        check_path("output_dir", self.output_dir)

    def config(self, variant: Variant) -> TrainConfig:
        """The training settings of the variant, with ``model.bf16`` decided: scores in another precision are other results."""
        folder = Path(self.output_dir) / variant.folder
        values = {**flatten(self.base), **flatten(variant.changes), "output_dir": str(folder)}
        config = TrainConfig.from_dict(values)
        bf16 = computes_in_bfloat16(config.model.bf16, device_of(None))
        return replace(config, model=replace(config.model, bf16=bf16))

    @property
    def measured_on(self) -> dict[str, Any]:
        """What the scores depend on besides the model."""
        return {"evaluation": self.evaluation, "max_length": self.max_length}


def read_ablation(path: Path, changes: Mapping[str, Any] | None = None) -> Ablation:
    """Read an ablation; ``changes`` (dotted keys) override its shared settings.

    Raises:
        ValueError: the file has an unknown entry or setting, no variants, or two with the same name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {path}")
    content = read_yaml(path)
    accepted = {entry.name for entry in fields(Ablation)}
    if not isinstance(content, dict) or (unknown := set(content) - accepted):
        given = sorted(unknown) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected {sorted(accepted)}, got {given}")
    known = {entry.name for entry in fields(Variant)}
    variants = []
    for entry in content.get("variants") or []:
        if not isinstance(entry, dict) or "name" not in entry or set(entry) - known:
            raise ValueError(f"{path}: variants: expected a name and any of {sorted(known - {'name'})}, got {entry!r}")
        variants.append(Variant(**{**entry, "changes": entry.get("changes") or {}}))
    base = {**dotted(content.get("base") or {}), **(changes or {})}
    for where, settings_given in (("base", base), *((f"variant {v.name!r}", v.changes) for v in variants)):
        try:
            flatten(settings_given)
        except ValueError as error:
            raise ValueError(f"{path}: {where}: {error}") from None
    names = [variant.folder for variant in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: variants: expected variants with different names, got {names or 'none'}")
    options = {key: value for key, value in content.items() if key not in ("base", "variants")}
    return Ablation(base=base, variants=variants, **options)


def run(ablation: Ablation, *, keep_checkpoints: bool = False) -> list[dict[str, Any]]:
    """Train and evaluate the variants without a result; returns the rows of the table."""
    from python_model.data import sample_dir

    held_out = HeldOut(ablation.evaluation or sample_dir())
    output = Path(ablation.output_dir)
    _digest_of_rows.cache_clear()
    _digest_of_checkpoint.cache_clear()
    rows = []
    for variant in tqdm(ablation.variants, desc="variants", unit="variant"):
        rows.append(_finished(variant, ablation) or _measure(variant, held_out, ablation, keep_checkpoints))
        write_json(output / "table.json", rows)
        write_text(output / "table.md", table(rows))
        plot_ablation(rows, output / "table.png")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, one section per group."""
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [f"## {group}" if group else "", "", "| variant | " + " | ".join(COLUMNS) + " | steps |"]
        lines.append("|---" * (len(COLUMNS) + 2) + "|")
        for row in rows:
            if row["group"] == group:
                scores = [row["scores"][name] for name in COLUMNS]
                cells = ["-" if score is None else f"{score:.3f}" for score in scores]
                lines.append(f"| {row['variant']} | " + " | ".join(cells) + f" | {row['steps']} |")
        lines.append("")
    return "\n".join(lines).strip() + "\n"


def _content(train_data: str, model: str, ablation: Ablation) -> dict[str, str]:
    """Digests of what a variant reads: the files behind a name may change."""
    from python_model.data import sample_dir

    return {
        "data.train_data": _digest_of_rows(train_data),
        "model.name": _digest_of_checkpoint(model),
        "evaluation": held_out_digest(ablation.evaluation or sample_dir()),
    }


@functools.cache
def _digest_of_rows(train_data: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for index in index_files(data_files(train_data)):
        digest.update(f"{dataset_name(index.file)} {index.digest}".encode())
    return digest.hexdigest()


@functools.cache
def _digest_of_checkpoint(name: str) -> str:
    """Of the files of a folder that a model is loaded from; of the name, where it is one on the hub."""
    from python_model.corpora.small_model import resolve_model

    folder = Path(resolve_model(name))
    if not folder.is_dir():
        return str(folder)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        # a card and a calibration change no model
        if path.is_file() and path.suffix != ".md" and path.name != "rag_calibration.json":
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
    return digest.hexdigest()


def _finished(variant: Variant, ablation: Ablation) -> dict[str, Any] | None:
    config = ablation.config(variant)
    file = Path(config.output_dir) / "result.json"
    if not file.exists():
        return None
    row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    same = row["config"] == config.to_dict() and row["steps"] == (0 if variant.untrained else config.steps)
    same = same and row.get("measured_on", ablation.measured_on) == ablation.measured_on
    content = _content(config.data.train_data, config.model.name, ablation)
    same = same and row.get("content", content) == content  # which earlier versions did not record
    return {**row, "variant": variant.name, "group": variant.group} if same else None


def _measure(variant: Variant, held_out: HeldOut, ablation: Ablation, keep_checkpoints: bool) -> dict[str, Any]:
    from python_model.corpora.small_model import resolve_model
    from python_model.model.modeling import GritLM
    from python_model.train.run import run as train

    config = ablation.config(variant)
    tqdm.write(f"{variant.group}: {variant.name}")
    if variant.untrained:
        checkpoint: str | Path = resolve_model(config.model.name)
        options = {name: value for name, value in config.settings_given.items() if not name.startswith("projection")}
    else:
        checkpoint, options = train(config), {}  # a trained checkpoint brings its own
    model = GritLM(checkpoint, mode=config.mode, **options)
    scores, _ = evaluate(model, held_out, max_length=ablation.max_length, bf16=config.model.bf16)
    if model.texts_cut:
        tqdm.write(cut_line(model.texts_cut, held_out, f"max_length ({ablation.max_length} tokens)"))
    row = {
        "variant": variant.name,
        "group": variant.group,
        "scores": scores,
        "steps": 0 if variant.untrained else config.steps,
        "config": config.to_dict(),
        "measured_on": ablation.measured_on,
        "content": _content(config.data.train_data, config.model.name, ablation),
    }
    write_json(Path(config.output_dir) / "result.json", row)
    if not keep_checkpoints and not variant.untrained:
        shutil.rmtree(checkpoint)
        shutil.rmtree(Path(config.output_dir) / "states", ignore_errors=True)
    return row
