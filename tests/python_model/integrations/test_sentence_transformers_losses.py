"""SentenceTransformerTrainer over an exported model: each loss trains the packed module as it trains the padded one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
from sentence_transformers.sentence_transformer import losses as st_losses  # noqa: E402

from python_model.model.export import export_sentence_transformers  # noqa: E402

pytestmark = pytest.mark.tools
COLUMNS = {
    "query": ["river", "sum of two", "capital of France", "lines"],
    "document": [
        "A river flows through the city.",
        "def add(first, second):\n    return first + second",
        "Paris is the capital of France.",
        "blank lines are common",
    ],
}
LOSSES: dict[str, Callable[[Any], Any]] = {
    "MultipleNegativesRanking": lambda m: st_losses.MultipleNegativesRankingLoss(m, scale=20.0),
    "CachedMultipleNegativesRanking": lambda m: st_losses.CachedMultipleNegativesRankingLoss(
        m, scale=20.0, mini_batch_size=2
    ),
    "Matryoshka": lambda m: st_losses.MatryoshkaLoss(
        m, st_losses.MultipleNegativesRankingLoss(m, scale=20.0), matryoshka_dims=[64, 16]
    ),
    "CachedGIST": lambda m: st_losses.CachedGISTEmbedLoss(m, _guide(m), mini_batch_size=2),
}


def _guide(model: Any) -> Any:
    """A frozen twin judges which negatives are none."""
    import copy

    return copy.deepcopy(model).eval()


def trained(folder: Path, packed: bool, loss: Callable[[Any], Any], run: Path) -> list[float]:
    torch.manual_seed(0)
    model = st.SentenceTransformer(str(folder), device="cpu", trust_remote_code=packed)
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(run),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        prompts=model.prompts,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = st.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(COLUMNS), loss=loss(model)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_trains_the_packed_module_like_the_padded_one(checkpoint: Path, tmp_path: Path, name: str) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    found = {}
    for packed in (False, True):
        folder = export_sentence_transformers(
            model, tmp_path / f"packed {packed}", instructions={"query": "Find the text", "document": ""}, packed=packed
        )
        found[packed] = trained(folder, packed, LOSSES[name], tmp_path / f"run {packed}")
    assert len(found[True]) == 4 and found[True] == pytest.approx(found[False], rel=1e-3)
    assert found[True][-1] < found[True][0]


@pytest.mark.parametrize("packed", [False, True])
def test_several_processes_embed_what_one_does(checkpoint: Path, tmp_path: Path, packed: bool) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    folder = export_sentence_transformers(model, tmp_path / "st", packed=packed)
    loaded = st.SentenceTransformer(str(folder), device="cpu", trust_remote_code=packed)
    texts = ["A river flows. " * (n % 5 + 1) for n in range(12)]
    pool = loaded.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = loaded.encode(texts, prompt_name="document", pool=pool, chunk_size=3)
    finally:
        loaded.stop_multi_process_pool(pool)
    one = loaded.encode(texts, prompt_name="document")
    assert abs(found - one).max() <= 1e-6
