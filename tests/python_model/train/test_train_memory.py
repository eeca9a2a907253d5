"""Memory of training: a chunk decides it, and the plan printed at the start is near what is used."""

from __future__ import annotations

import gc
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grit_kernels as gk
from python_model.commands.train import COMMAND as grit_train
from python_model.train.distributed import Ranks
from python_model.train.memory import device_limit, plan_tokens
from python_model.train.model import TrainingModel
from python_model.train.step import StepGradients, plan_step
from tests.python_model.training_samples import LENGTH, ToyStream, toy_config, toy_model, toy_trainer


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


@pytest.mark.slow
def test_a_run_keeps_no_tensor_of_the_steps_behind_it(checkpoint: Path, tmp_path: Path) -> None:
    """Of steps with different lengths, numbers of chunks and data sets, only their lines in the log remain."""
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=8, chunk_tokens=2 * LENGTH, save_steps=3))
    alive = []

    def count(step: int) -> None:
        gc.collect()
        alive.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))

    trainer.after_step = count
    trainer.train()
    assert alive[1:] == [alive[1]] * 7  # the first step makes the optimiser's states


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


def test_a_dry_run_counts_the_embedding_head(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    grit_train(["--config", "configs/gritlm-7b.yaml", "--dry_run", "true", "--grit.projection", "25000"])
    assert "7,344.2 M weights" in capsys.readouterr().out  # 4,097 times 25,000 more


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


def test_a_steps_tokens_are_counted_at_the_longest_texts() -> None:
    from python_model.data.config import BatchConfig, DataConfig
    from python_model.train.memory import StepTokens, plan_tokens

    data = DataConfig(train_data=".", query_max_len=10, passage_max_len=100, generative_max_len=300, train_group_size=4)
    batch = BatchConfig(embedding_batch_size=9, generative_batch_size=5, chunk_tokens=700)
    texts, talks = 9 * (10 + 4 * 100), 5 * 300
    # two ranks, one with 5 queries: 2050 tokens of texts in chunks of 700
    assert plan_tokens("unified", data, batch, 2) == StepTokens(texts + talks, 700, 3)
    assert plan_tokens("embedding", data, batch, 2) == StepTokens(texts, 700, 3)
    assert plan_tokens("generative", data, batch, 2) == StepTokens(talks, 700, 2)
    whole = replace(batch, chunk_tokens=0)
    assert plan_tokens("unified", data, whole, 2) == StepTokens(texts + talks, 5 * (10 + 4 * 100), 1)
    assert plan_tokens("embedding", data, whole, 4) == StepTokens(texts, 3 * (10 + 4 * 100), 1), (
        "the rank that has most"
    )
    # a query's 3 negatives are the longest part of the paper's split; 5 queries on the rank that has most
    split = replace(batch, chunking="triplet", chunk_tokens=0)
    assert plan_tokens("embedding", data, split, 2) == StepTokens(texts, 5 * 300, 3)
    assert plan_tokens("generative", data, split, 2) == StepTokens(talks, 3 * 300, 1)


def test_weights_gradients_and_moments_are_counted_as_they_are_sharded() -> None:
    """FP32 master weights, gradients and two moments; a BF16 copy of what a layer needs, two layers at a time under FSDP."""
    from transformers import MistralConfig, MistralForCausalLM

    from python_model.train.config import ModelConfig, ParallelConfig
    from python_model.train.memory import StepTokens, plan_memory

    settings = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = MistralForCausalLM(settings)
    count = sum(p.numel() for p in model.parameters())
    layer = (count - 2 * 50 * 32) / 3
    tokens, config = StepTokens(1000, 100, 3), ModelConfig(name="x", bf16=True)

    def plan(world: int, mode: Any = "unified", rounds: int = 3, **parallel: Any) -> Any:
        return plan_memory(
            model, settings, replace(tokens, rounds=rounds), config, ParallelConfig(**parallel), mode, world
        )

    alone = plan(1)
    assert (alone.weights, alone.gradients, alone.kept_gradient) == (4 * count, 4 * count, 4 * count)
    assert (alone.optimizer, alone.working_copy) == (8 * count, 2 * count)
    assert plan(1, "embedding").kept_gradient == 0
    sharded = plan(8, strategy="fsdp")
    assert (sharded.weights, sharded.optimizer) == (4 * count / 8, 8 * count / 8)
    assert sharded.gradients == 4 * count, "whole between the chunks of an objective"
    assert plan(8, strategy="fsdp", reduce_each_chunk=True).gradients == 4 * count / 8
    assert plan(8, strategy="fsdp", rounds=1).gradients == 4 * count / 8
    assert sharded.working_copy == 2 * (2 * layer + 2 * 50 * 32)
    assert plan(8, strategy="fsdp", shard_size=2).weights == 4 * count / 2
    offloaded = plan(8, strategy="fsdp", cpu_offload=True)
    assert (offloaded.weights, offloaded.optimizer, offloaded.kept_gradient) == (0, 0, 0)
    assert plan(8, strategy="ddp").weights == 4 * count
    parts = [
        alone.weights,
        alone.gradients,
        alone.kept_gradient,
        alone.optimizer,
        alone.working_copy,
        alone.activations,
    ]
    assert alone.total == sum(parts)


def test_selective_checkpointing_keeps_attentions_results_as_well() -> None:
    """Per layer and token the output of attention in BF16, and an FP32 LSE of each head."""
    from transformers import MistralConfig, MistralForCausalLM

    from python_model.train.config import ModelConfig, ParallelConfig
    from python_model.train.memory import StepTokens, plan_memory

    settings = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=24,
    )  # fmt: skip
    model, tokens = MistralForCausalLM(settings), StepTokens(1000, 100, 3)

    def activations(checkpointing: Any) -> float:
        config = ModelConfig(name="x", bf16=True, gradient_checkpointing=checkpointing)
        return plan_memory(model, settings, tokens, config, ParallelConfig(), "unified", 1).activations

    assert activations("selective") - activations(True) == 100 * 3 * 2 * (2 * 24 + 4)
    assert activations("selective") < activations(False)


@pytest.mark.parametrize("adapters", [0, 2])
def test_the_planned_optimizer_is_what_a_step_leaves(checkpoint: Path, tmp_path: Path, adapters: int) -> None:
    """Two moments of a weight under AdamW, in 32 or 8 bits, one momentum of a layer's matrix under Muon; the dry run plans the
    same."""
    from python_model.train.setup import plan_dry_run

    def stored(x: torch.Tensor) -> int:
        """Bytes of a tensor, or of those that it consists of."""
        if type(x) is torch.Tensor:
            return x.numel() * x.element_size()
        return sum(stored(getattr(x, name)) for name in x.__tensor_flatten__()[0])  # type: ignore[attr-defined]

    for kind in ("adamw", "muon", *(["adamw_8bit"] if importlib.util.find_spec("torchao") else [])):
        config = toy_config(checkpoint, tmp_path, lora_rank=adapters, **{"optimizer.kind": kind})
        trainer = toy_trainer(config)
        for p in trainer.model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        trainer.optimizers.update(0)
        kept = sum(
            stored(x)
            for optimizer in trainer.optimizers.optimizers
            for state in optimizer.state.values()
            for x in state.values()
            if isinstance(x, torch.Tensor) and x.ndim
        )
        assert trainer.memory.optimizer == kept
        tokens = plan_tokens(config.mode, config.data, config.batch, 1)
        dry, _ = plan_dry_run(config.model, config.parallel, tokens, 1, optimizer=config.optimizer.kind)
        assert dry.optimizer == kept


def test_the_limit_of_a_cpu_is_its_free_memory_if_psutil_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=9, available=7))
    for module, limit in ((free, 7.0), (None, None)):
        monkeypatch.setitem(sys.modules, "psutil", module)
        assert device_limit(torch.device("cpu")) == limit
