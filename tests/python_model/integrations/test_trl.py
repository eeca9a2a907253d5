"""TRL's SFTTrainer over a patched model: padded, packed and padding-free batches give the unpatched model's losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import grit_kernels as gk

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.tools,
    # TRL warns of attention implementations that it does not know to keep samples apart; this one does, which is what is tested
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # it sets an option of transformers under its old name
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]
TEXTS = [
    "A river flows through the city.",
    "Paris",
    "def add(first, second):\n    return first + second",
    "blank lines",
]


def losses(checkpoint: Path, tokenizer: Any, folder: Path, patched: bool, **options: Any) -> list[float]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(TEXTS),
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        **{"max_length": 256, **options},
    )
    trainer = trl.SFTTrainer(
        model=gk.patch(model) if patched else model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": True}, {"padding_free": True, "max_length": None}],
    ids=["padded", "packing", "padding_free"],
)
def test_sft_learns_what_the_unpatched_model_learns(
    checkpoint: Path, tokenizer: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    want = losses(checkpoint, tokenizer, tmp_path / "stock", patched=False)
    found = losses(checkpoint, tokenizer, tmp_path / "patched", patched=True, **options)
    assert found == pytest.approx(want, rel=1e-3)
    assert found[-1] < found[0]


def test_packing_would_be_wrong_without_the_patch(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The test above can fail: flattened rows whose samples see each other have another loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rows = [tokenizer(text + "</s>")["input_ids"] for text in TEXTS]
    flat = torch.tensor([[token for row in rows for token in row]])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        mixed = model(flat, attention_mask=torch.ones_like(flat)).logits
        apart = gk.patch(model)(flat, position_ids=positions, use_cache=False).logits
    assert (mixed - apart).abs().max() > 0.01
