"""What must reach the loss and its gradient: trained weights, adapters on the head, the mask of duplicates, router shares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model.model.chunks import build_chunk
from python_model.model.losses import next_token_losses, sums_per_sample
from python_model.train.distributed import Ranks
from python_model.train.model import TrainingModel
from python_model.train.step import StepGradients, _empty_chunk, plan_step
from tests.python_model.training_samples import ToyStream, router_model, toy_config, toy_model, toy_trainer

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save"])
def test_adapters_on_the_head_count_in_the_loss_and_learn(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """The loss through the adapters is that of the model they are merged into, and they get its gradient."""
    from peft import LoraConfig, get_peft_model

    model = toy_model(toy_config(checkpoint, tmp_path))
    model.model.config.tie_word_embeddings = False
    model.model.lm_head.weight = torch.nn.Parameter(model.model.lm_head.weight.detach().clone())
    settings: dict[str, Any] = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    if kind != "modules_to_save":
        settings = {"target_modules": ["lm_head"], "use_dora": kind == "dora"}
    model.model = get_peft_model(model.model, LoraConfig(r=2, lora_dropout=0.0, **settings))
    generator = torch.Generator().manual_seed(0)
    trained = {name: p for name, p in model.model.named_parameters() if p.requires_grad and "lm_head" in name}
    assert trained
    with torch.no_grad():
        for p in trained.values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)

    def loss() -> torch.Tensor:
        chunk = build_chunk([], ToyStream(model.tokenizer, 0, 2)[0].conversations)
        return next_token_losses(model, model.hidden_states(chunk.input_ids, chunk.pack), chunk.labels)

    through_adapters = loss()
    through_adapters.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    model.model = model.model.merge_and_unload()
    torch.testing.assert_close(through_adapters, loss(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["lora", "tokens", "modules_to_save"])
def test_adapters_on_the_input_embeddings_learn_as_in_transformers(
    checkpoint: Path, tmp_path: Path, kind: str, tied: bool
) -> None:
    """Loss and gradients of a packed step are those of PEFT's own model, or the run says that it does not know the head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {
        "lora": {"target_modules": ["embed_tokens"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": list(range(20, 300))},
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    }[kind]

    def adapted(model: Any) -> Any:
        model.config.tie_word_embeddings = tied
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, **settings))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad and "lora" in name:
                    p.normal_(std=0.1)
        return model

    grit = toy_model(toy_config(checkpoint, tmp_path))
    grit.model = adapted(grit.model)
    plain = adapted(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    talks = ToyStream(grit.tokenizer, 0, 2)[0].conversations
    chunk = build_chunk([], talks)
    found = next_token_losses(grit, grit.hidden_states(chunk.input_ids, chunk.pack), chunk.labels).sum()
    found.backward()
    expected = torch.zeros(())
    for talk in talks:
        logits = plain(torch.tensor([talk.input_ids])).logits[0]
        expected = expected + torch.nn.functional.cross_entropy(
            logits, torch.tensor(talk.labels), ignore_index=-100, reduction="sum"
        )
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad and p.grad is not None}
    mine = {name: p.grad for name, p in grit.model.named_parameters() if p.requires_grad and p.grad is not None}
    assert mine.keys() == theirs.keys() and any("embed_tokens" in name for name in theirs)
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, grad in theirs.items():
        assert float((mine[name] - grad).abs().max()) <= 1e-4 * largest, name


@pytest.mark.parametrize(
    "kind", ["hook", "hook of all modules", "own forward", "class of its own", "weight of its own kind"]
)
def test_a_head_that_is_more_than_its_weight_is_called(
    kind: str, checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = toy_model(toy_config(checkpoint, tmp_path))
    chunk = build_chunk([], ToyStream(model.tokenizer, 0, 2)[0].conversations)
    hidden = model.hidden_states(chunk.input_ids, chunk.pack)
    plain = next_token_losses(model, hidden, chunk.labels)
    head = model.model.lm_head
    if kind == "hook":
        head.register_forward_hook(lambda module, inputs, output: output * 0)
    elif kind == "hook of all modules":
        watch = lambda module, inputs, output: output * 0 if module is head else None  # noqa: E731
        request.addfinalizer(torch.nn.modules.module.register_module_forward_hook(watch).remove)
    elif kind == "own forward":
        head.forward = lambda x: torch.nn.functional.linear(x, head.weight) * 0
    elif kind == "class of its own":
        model.model.lm_head = Zero(head.in_features, head.out_features, bias=False)
    else:  # as torchao's: the class is nn.Linear, and the weight says what a product is
        head.weight = torch.nn.Parameter(head.weight.detach().as_subclass(ZeroWeight))
    flat = next_token_losses(model, hidden, chunk.labels)
    uniform = torch.tensor(float(len(model.tokenizer))).log()
    torch.testing.assert_close(flat[flat > 0], uniform.expand(int((flat > 0).sum())))
    assert not torch.allclose(flat, plain)


class Zero(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0


class ZeroWeight(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) * 0 if function is torch.nn.functional.linear else out


def test_the_bias_of_a_language_models_head_counts_and_learns(checkpoint: Path, tmp_path: Path) -> None:
    """GPT-J's head has one; the loss and every gradient are those of the logits that the head gives."""
    model = toy_model(toy_config(checkpoint, tmp_path))
    head = torch.nn.Linear(64, len(model.tokenizer), bias=True)
    torch.nn.init.normal_(head.bias)
    model.model.set_output_embeddings(head)
    chunk = build_chunk([], ToyStream(model.tokenizer, 0, 2)[0].conversations)
    hidden = model.hidden_states(chunk.input_ids, chunk.pack).detach().requires_grad_()
    inputs = (hidden, head.weight, head.bias)
    found = next_token_losses(model, hidden, chunk.labels)
    expected = torch.nn.functional.cross_entropy(head(hidden), chunk.labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_run_names_trained_weights_that_no_gradient_reaches(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=2))
    trainer.grit.decoder[0].idle = torch.nn.Parameter(torch.ones(3))
    trainer = type(trainer)(trainer.grit, trainer.config, trainer.stream)
    trainer.train()
    printed = capsys.readouterr()
    assert "no gradient reached 1 trained weight(s) in step 2: model.model.idle" in printed.out + printed.err


def test_of_many_weights_that_no_gradient_reaches_the_first_five_are_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path))
    for count, end in ((5, "idle.4"), (6, "idle.4, ...")):
        trainer.grit.decoder[0].idle = torch.nn.ParameterList(torch.ones(1) for _ in range(count))
        for name, p in trainer.grit.named_parameters():
            p.grad = torch.zeros_like(p) if "idle.1" in name else None if "idle" in name else torch.ones_like(p)
        trainer._report_unreached(1)
        printed = capsys.readouterr()
        names = ", ".join(f"model.model.idle.{n}" for n in range(4))
        assert f"reached {count} trained weight(s) in step 2: {names}, model.model.{end}\n" in printed.out + printed.err


def test_a_run_that_reaches_all_weights_names_none(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes in ({}, {"lora_rank": 2}):
        toy_trainer(toy_config(checkpoint, tmp_path, steps=2, resume=False, **changes)).train()
    printed = capsys.readouterr()
    assert "no gradient" not in printed.out + printed.err


@pytest.mark.parametrize("masked", [True, False])
def test_a_step_takes_no_duplicate_of_a_positive_as_negative(checkpoint: Path, tmp_path: Path, masked: bool) -> None:
    """The trainer's contrastive loss against its definition, where two queries share a positive."""
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, mode="embedding", mask_duplicates=masked, normalized=True))
    samples = trainer.stream[0]  # type: ignore[index]
    samples.passages[2] = samples.passages[0]
    samples.query_ids[1] = samples.passage_ids[2] = samples.query_ids[0]
    chunk = build_chunk([*samples.queries, *samples.passages], [])
    with torch.no_grad():
        vectors, _, _ = TrainingModel(trainer.grit)(chunk)
    queries = len(samples.queries)
    scores = vectors[:queries] @ vectors[queries:].T / trainer.config.losses.temperature
    own = 2 * torch.arange(queries)
    if masked:
        same = torch.tensor(samples.query_ids)[:, None] == torch.tensor(samples.passage_ids)[None]
        same[torch.arange(queries), own] = False
        assert int(same.sum()) == 2
        scores = scores.masked_fill(same, float("-inf"))
    expected = torch.nn.functional.cross_entropy(scores, own)
    assert trainer.step(samples, 0)["contrastive_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_chunks_router_loss_counts_by_its_share_of_the_tokens(tokenizer: Any, tmp_path: Path) -> None:
    """Chunks of unequal length: the step's router loss is the mean over tokens, and its gradient is that of this mean."""
    model, config = router_model(tokenizer, tmp_path)
    talks = [s for seed in range(8) for s in ToyStream(tokenizer, 0, 2)[seed].conversations]
    talks = [max(talks, key=len), min(talks, key=len)]
    batch = plan_step([], [], talks, None, config.batch, config.losses, ALONE)
    lengths = [chunk.pack.tokens for chunk in batch.conversation_chunks]
    assert len(lengths) == 2 and max(lengths) > min(lengths)
    losses = StepGradients(model, config.losses, ALONE, bf16=False, router_loss_weight=2.0)(batch, seed=0)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = torch.zeros(())
    for chunk in batch.conversation_chunks:
        _, _, router = model(chunk)
        expected = expected + router * (chunk.pack.tokens / sum(lengths))
    (2.0 * expected).backward()
    assert losses.router == pytest.approx(float(expected.detach()), rel=1e-5)
    gates = [name for name in found if "gate" in name and "gate_up" not in name]
    assert gates
    for name in gates:
        torch.testing.assert_close(found[name], dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-7)


def test_a_rank_without_work_adds_nothing_to_the_router_loss(tokenizer: Any, tmp_path: Path) -> None:
    """Ranks with fewer chunks run an empty one of a token, to take part in collectives: it must not count."""
    model, config = router_model(tokenizer, tmp_path)
    talks = ToyStream(tokenizer, 0, 1)[0].conversations
    batch = plan_step([], [], talks, None, config.batch, config.losses, ALONE)
    steps = []
    for extra in (0, 2):
        model.zero_grad()
        padded = replace(
            batch, conversation_chunks=[*batch.conversation_chunks, *[_empty_chunk() for _ in range(extra)]]
        )
        losses = StepGradients(model, config.losses, ALONE, bf16=False, router_loss_weight=2.0)(padded, seed=0)
        steps.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (alone, gradients), (beside, others) = steps
    assert beside.router == alone.router and alone.router is not None and alone.router > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-6, atol=0)


def test_sums_per_sample_are_sums() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert sums_per_sample(values, torch.tensor([0, 1, 1, 4])).tolist() == [1.0, 0.0, 9.0]
