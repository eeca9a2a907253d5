"""A run is the same from any container of its rows, on disk or at a URL."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model.train import TrainConfig, Trainer
from python_model.train.distributed import Ranks
from tests.python_model.training_samples import LENGTH, WORDS, data_folder, figures, toy_config


def _run(config: TrainConfig) -> list[list[Any]]:
    return figures(Trainer.from_config(config, Ranks(0, 1, torch.device("cpu"))).train())


@pytest.mark.parametrize("container", ["parquet", "jsonl.gz", "memory"])
def test_a_run_is_that_of_the_same_rows_as_lines(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "cache"))
    lines, other = data_folder(tmp_path / "lines"), tmp_path / "other"
    other.mkdir()
    source = f"memory://{tmp_path.name}" if container == "memory" else str(other)
    for file in lines.iterdir():
        text = file.read_text()
        if container == "parquet":
            pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            rows = [json.loads(line) for line in text.splitlines()]
            parquet.write_table(pa.Table.from_pylist(rows), other / f"{file.stem}.parquet")
        elif container == "memory":
            with pytest.importorskip("fsspec").open(f"{source}/{file.name}", "w") as out:
                out.write(text)
        else:
            with gzip.open(other / f"{file.name}.gz", "wt") as out:
                out.write(text)
    runs = [
        _run(toy_config(checkpoint, tmp_path / name, train_data=data, steps=3, chunk_tokens=2 * LENGTH))
        for name, data in (("a", str(lines)), ("b", source))
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 3


def test_the_card_says_how_many_rows_of_each_data_set_were_used(checkpoint: Path, tmp_path: Path) -> None:
    config = toy_config(checkpoint, tmp_path, train_data=str(data_folder(tmp_path / "data")), steps=1)
    trainer = Trainer.from_config(config, Ranks(0, 1, torch.device("cpu")))
    trainer.train()
    card = (trainer.save() / "README.md").read_text()
    assert re.search(rf"\| emb +\| {len(WORDS)} +\|\n\| gen +\| {len(WORDS)} +\|", card)
