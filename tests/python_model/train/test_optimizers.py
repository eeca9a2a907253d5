"""The rate's schedule, weight decay, the optimisers, and the Matryoshka loss against their definitions."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

import grit_kernels as gk
from python_model.model.chunks import build_chunk
from python_model.train import Interrupted, Trainer
from python_model.train.config import LossConfig, OptimizerConfig
from python_model.train.distributed import Ranks
from python_model.train.model import TrainingModel
from python_model.train.optimizers import Optimizers, hidden_matrices
from python_model.train.setup import load_model
from python_model.train.step import StepGradients, plan_step
from tests.python_model.training_samples import ToyStream, figures, router_model, toy_config, toy_model, toy_trainer
from tests.ranks import process_group

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "warmup_stable_decay", "constant"])
def test_schedules_are_those_of_transformers_one_step_on(schedule: str) -> None:
    steps, warmup, decay = 40, 4, 10
    config = OptimizerConfig(lr=2.0, warmup_ratio=0.1, schedule=schedule, decay_ratio=0.25)  # type: ignore[arg-type]
    mine = Optimizers(torch.nn.Linear(2, 2), config, LossConfig(), ALONE, steps=steps, embeds=True)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = {
        "linear": lambda: get_linear_schedule_with_warmup(theirs, warmup, steps + 1),
        "cosine": lambda: get_cosine_schedule_with_warmup(theirs, warmup, steps + 1),
        "constant": lambda: get_constant_schedule_with_warmup(theirs, warmup),
        "warmup_stable_decay": lambda: get_wsd_schedule(
            theirs, warmup, decay, num_training_steps=steps + 1, decay_type="linear"
        ),
    }[schedule]()
    for step in range(steps):
        theirs.step()
        scheduler.step()
        assert mine.lr(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6), step
        assert mine.lr(step) > 0


def test_norms_and_biases_do_not_decay(checkpoint: Path, tmp_path: Path) -> None:
    """With a gradient of 0, a step of AdamW only decays."""
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, weight_decay=0.5, lr=0.1, projection=8, warmup_ratio=0.0))
    before = {name: p.detach().clone() for name, p in trainer.grit.named_parameters()}
    for p in trainer.grit.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizers.update(0)
    for name, p in trainer.grit.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == (p.ndim >= 2), name
    assert any(p.ndim < 2 for p in before.values())


def test_the_temperature_starts_at_its_setting_and_does_not_decay(checkpoint: Path, tmp_path: Path) -> None:
    """AdamW's first step has the length of the rate, against the gradient's sign; decay would pull the logarithm to 0."""
    changes = {"learn_temperature": True, "temperature": 0.25, "weight_decay": 0.5, "warmup_ratio": 0.0}
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, lr=0.1, mode="embedding", **changes))
    optimizers = trainer.optimizers
    assert optimizers.temperature == pytest.approx(0.25) and optimizers.log_temperature is not None
    optimizers.log_temperature.grad = torch.full((1,), 3.0)
    optimizers.update(0)
    assert optimizers.temperature == pytest.approx(math.exp(math.log(0.25) - 0.1), rel=1e-4)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_matryoshka_loss_is_the_mean_over_sizes(checkpoint: Path, tmp_path: Path, normalized: bool) -> None:
    config = toy_config(checkpoint, tmp_path, mode="embedding", matryoshka_dims=[8, 32], normalized=normalized)
    model = TrainingModel(toy_model(config))
    samples = ToyStream(model.grit.tokenizer, 4, 0)[0]
    batch = plan_step(samples.queries, samples.passages, [], None, config.batch, config.losses, ALONE)
    gradients = StepGradients(model, config.losses, ALONE, bf16=False, normalized=normalized)
    found = gradients(batch, seed=0).contrastive
    with torch.no_grad():
        vectors, _, _ = model(build_chunk([*samples.queries, *samples.passages], []))
    losses = []
    for dim in (64, 32, 8):
        cut = vectors[:, :dim]
        cut = torch.nn.functional.normalize(cut, dim=-1) if normalized else cut
        losses.append(gk.contrastive_loss(cut[:4], cut[4:], temperature=config.losses.temperature))
    assert found == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


@pytest.mark.parametrize(("projection", "size"), [(None, 64), (32, 32)])
def test_a_matryoshka_size_that_cuts_nothing_is_refused_before_a_step(
    checkpoint: Path, tmp_path: Path, projection: int | None, size: int
) -> None:
    config = toy_config(checkpoint, tmp_path, mode="embedding", matryoshka_dims=[8, size], projection=projection)
    model = toy_model(config)
    with pytest.raises(ValueError, match=f"matryoshka_dims: expected sizes below the embedding's {size}, got {size}"):
        Trainer(model, config, ToyStream(model.tokenizer, 4, 0))


def test_muon_moves_the_layers_matrices_and_adamw_all_else(checkpoint: Path, tmp_path: Path) -> None:
    """A step of Muon is an orthogonal matrix times the rate and torch's scale; AdamW's first step is the sign of the gradient."""
    changes = {"optimizer.kind": "muon", "lr": 0.1, "projection": 8, "warmup_ratio": 0.0, "schedule": "constant"}
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, **changes))
    before = {name: p.detach().clone() for name, p in trainer.grit.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for p in trainer.grit.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    trainer.optimizers.update(0)
    by_muon = 0
    for name, p in trainer.grit.named_parameters():
        step = (p.detach() - before[name]) / 0.1
        if ".layers." in name and p.ndim == 2:
            by_muon += 1
            singular = torch.linalg.svdvals(step / (0.2 * max(p.shape) ** 0.5))
            # the smallest of a random square matrix is near 0, and not all the way after five iterations
            assert 0.6 < singular.median() and singular.max() < 1.3, name
        else:
            torch.testing.assert_close(step.abs(), torch.ones_like(step), rtol=1e-3, atol=1e-3)
    assert by_muon == 14 and len(trainer.optimizers.optimizers) == 2


@needs_torchao
def test_8_bit_adamw_takes_adamws_step_and_keeps_its_moments_to_the_nearest_code(
    checkpoint: Path, tmp_path: Path
) -> None:
    """A step computes in FP32 and then rounds the moments: by at most the widest gap between codes, times a block's largest."""
    changes = {"lr": 0.1, "projection": 8, "warmup_ratio": 0.0, "schedule": "constant", "weight_decay": 0.5}
    trainers = [
        toy_trainer(toy_config(checkpoint, tmp_path, **{"optimizer.kind": kind}, **changes))
        for kind in ("adamw", "adamw_8bit")
    ]
    for trainer in trainers:
        generator = torch.Generator().manual_seed(0)
        for p in trainer.grit.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        trainer.optimizers.update(0)
    plain, rounded = (dict(trainer.grit.named_parameters()) for trainer in trainers)
    states = [trainer.optimizers.optimizers[0].state for trainer in trainers]
    in_8_bits = 0
    for name, p in plain.items():
        torch.testing.assert_close(rounded[name], p, rtol=1e-5, atol=1e-6)
        for moment in ("exp_avg", "exp_avg_sq"):
            kept, exact = states[1][rounded[name]][moment], states[0][p][moment]
            if not hasattr(kept, "codes"):
                torch.testing.assert_close(kept, exact)
                assert p.numel() < 4096 or p.numel() % 256, name
                continue
            in_8_bits += 1
            error = (kept.dequantize() - exact).view(-1, kept.block_size).abs().amax(dim=1)
            largest = exact.view(-1, kept.block_size).abs().amax(dim=1)
            assert kept.codes.dtype == torch.uint8 and bool((error <= kept.qmap.diff().max() * largest).all()), name
    assert in_8_bits > 2
    for trainer in trainers:  # the rate is that of each step
        assert float(trainer.optimizers.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.1)
        trainer.optimizers.config.schedule = "linear"
        trainer.optimizers.update(trainer.optimizers.steps - 1)
        assert float(trainer.optimizers.optimizers[0].param_groups[0]["lr"]) < 0.05


def _cut_and_resume(rank: int, world: int, folder: str, checkpoint: str) -> None:
    root = Path(folder)
    with process_group(rank, world, root / "store") as group:
        here = Ranks(rank, world, torch.device("cpu"), group)

        def run(name: str, stop: int = 0) -> list[list[Any]]:
            kind = {"optimizer.kind": "adamw_8bit", "parallel": "fsdp"}
            config = toy_config(Path(checkpoint), root / name, steps=4, lr=1e-2, save_steps=1, **kind)
            model = load_model(config.model, here.device, seed=config.seed, weights=here.first)
            trainer = Trainer(model, config, ToyStream(model.tokenizer, 4, 2, here), here)
            trainer.after_step = lambda done: setattr(trainer, "_stop", done == stop)
            if stop:
                with pytest.raises(Interrupted):
                    trainer.train()
                return []
            records = figures(trainer.train())
            moments = [x for state in trainer.optimizers.optimizers[0].state.values() for x in state.values()]
            assert any(hasattr(x.to_local(), "codes") for x in moments if isinstance(x, DTensor))
            return records

        whole = run("whole")
        run("cut", stop=2)
        assert run("cut") == whole


@needs_torchao
@pytest.mark.slow
def test_8_bit_moments_resume_on_the_shards_they_were_saved_from(checkpoint: Path, tmp_path: Path) -> None:
    mp.spawn(_cut_and_resume, (2, str(tmp_path), str(checkpoint)), nprocs=2)


def test_8_bit_moments_are_not_written_in_the_background(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="logging.async_save: expected false with optimizer.kind adamw_8bit, .*, got true"
    ):
        toy_config(checkpoint, tmp_path, async_save=True, **{"optimizer.kind": "adamw_8bit"})


def test_muon_leaves_the_routers_of_a_mixture_to_adamw(tokenizer: Any, tmp_path: Path) -> None:
    model, _ = router_model(tokenizer, tmp_path)
    layer = dict(model.grit.decoder[0].layers[0].named_parameters())
    chosen = {id(p) for p in hidden_matrices(model)}
    assert {name for name, p in layer.items() if id(p) in chosen} == {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    assert any(name.endswith(".gate.weight") and p.ndim == 2 for name, p in layer.items())
    assert len(chosen) == 4


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["gpt_oss", "cohere"])
def test_biases_of_experts_and_norms_of_heads_are_no_matrices(family: str, kind: str) -> None:
    """GPT-OSS keeps the biases of all experts, Cohere the norms of all heads, in one weight of two dimensions."""
    from transformers import CohereConfig, CohereForCausalLM, GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    if family == "gpt_oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        model = GptOssForCausalLM(GptOssConfig(head_dim=32, **sizes, **heads, **experts))
    else:
        model = CohereForCausalLM(CohereConfig(use_qk_norm=True, pad_token_id=0, **sizes, **heads))
    spared = {name: p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name}
    assert {p.ndim for p in spared.values()} == {1, 2}
    config = OptimizerConfig(kind=kind, weight_decay=0.5)
    for optimizer in Optimizers(model, config, LossConfig(), ALONE, steps=1, embeds=False).optimizers:
        decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
        assert decayed and not {id(p) for p in decayed} & {id(p) for p in spared.values()}
