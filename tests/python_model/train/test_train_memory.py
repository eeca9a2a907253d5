"""Memory of training: a chunk decides it, and the plan printed at the start is near what is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import grit_kernels as gk
from python_model.commands.train import COMMAND as grit_train
from python_model.train.distributed import Ranks
from python_model.train.model import TrainingModel
from python_model.train.step import StepGradients, plan_step
from tests.python_model.training_samples import LENGTH, ToyStream, toy_config, toy_model


def test_memory_depends_on_the_chunk_not_on_the_batch(checkpoint: Path, tmp_path: Path) -> None:
    """The bytes that autograd keeps at once, at 4 and at 32 queries: the same but for the embeddings."""
    kept = {}
    for queries in (4, 32):
        config = toy_config(checkpoint, tmp_path, embedding_batch_size=queries, chunk_tokens=4 * LENGTH)
        model = TrainingModel(toy_model(config))
        ranks = Ranks(0, 1, torch.device("cpu"))
        samples = ToyStream(model.grit.tokenizer, queries, 2)[0]
        share = plan_step(
            samples.queries, samples.passages, samples.conversations, None, config.batch, config.losses, ranks
        )
        peak = size = 0

        def pack(x: torch.Tensor) -> tuple[torch.Tensor, int]:
            nonlocal peak, size
            size += x.numel() * x.element_size()
            peak = max(peak, size)
            return x, size

        class Counting(torch.nn.Module):
            def __init__(self, model: TrainingModel = model) -> None:
                super().__init__()
                self.model = model

            def forward(self, chunk: Any) -> Any:
                nonlocal size
                size = 0  # the graph of the chunk before is gone
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
                    return self.model(chunk)

        StepGradients(Counting(), config.losses, ranks, bf16=False)(share, seed=0)
        kept[queries] = peak
    assert kept[32] < 1.2 * kept[4]


@pytest.mark.parametrize("name", ["gritlm-7b", "gritlm-8x7b", "embedding-7b", "generative-7b"])
def test_shipped_recipes_plan_their_memory_without_weights(
    name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    monkeypatch.setenv("WORLD_SIZE", "64")
    grit_train(["--config", f"configs/{name}.yaml", "--dry_run", "true"])
    printed = capsys.readouterr().out
    assert "64 rank(s)" in printed and "fits" in printed
    assert ("46,70" if "8x7b" in name else "7,2" if name != "embedding-7b" else "7,1") in printed


def test_planned_activations_are_near_those_that_autograd_keeps(tmp_path: Path) -> None:
    """A Mistral of usual proportions: what one chunk's graph holds, against the estimate."""
    from transformers import MistralConfig, MistralForCausalLM

    from python_model.train.memory import activation_bytes

    settings = MistralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=448, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = gk.patch(MistralForCausalLM(settings)).model
    weights = {p.data_ptr() for p in model.parameters()}
    pack = gk.SamplePack.from_lengths([200, 56], False)
    for bf16 in (False, True):
        seen: dict[int, int] = {}

        def keep(x: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights and x.shape[0:2] == (1, 256) or x.shape[0] == 256:
                seen[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                states = model(input_ids=torch.zeros(1, 256, dtype=torch.int64), sample_pack=pack).last_hidden_state
        measured = sum(seen.values()) / 256 / 4
        assert states.requires_grad
        assert measured == pytest.approx(activation_bytes(settings, bf16), rel=0.2), bf16
