"""Gradients of a step: one pass, chunks of any size, the paper's split and any number of ranks give the same ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from python_model import GritLM
from python_model.data.stream import StepSamples
from python_model.model.chunks import build_chunk, first_fit, plan_texts
from python_model.model.prompts import IGNORE_INDEX, EncodedSample
from python_model.settings import AttentionVariant
from python_model.train.adapters import add_adapters
from python_model.train.balance import ObjectiveGradients, cosine, limit_factor
from python_model.train.config import BatchConfig, LossConfig, TrainConfig
from python_model.train.distributed import Ranks, wrap
from python_model.train.model import TrainingModel
from python_model.train.optimizers import Optimizers
from python_model.train.setup import compile_layers, recompute_activations
from python_model.train.step import StepGradients, StepLosses, _empty_chunk, plan_step
from tests.python_model.training_config import make_config
from tests.python_model.training_samples import LENGTH, ToyStream, toy_config, toy_model
from tests.ranks import process_group

QUERIES, CONVERSATIONS = 6, 3


def config_of(**changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "train_data": ".",
        "embedding_batch_size": QUERIES,
        "generative_batch_size": CONVERSATIONS,
        "query_max_len": LENGTH,
        "passage_max_len": LENGTH,
        "generative_max_len": LENGTH,
        "temperature": 0.1,
        "bf16": False,
    }
    return make_config(**{**options, **changes})


def load(checkpoint: Path, config: TrainConfig) -> GritLM:
    torch.manual_seed(7)
    grit = GritLM(
        checkpoint,
        mode=config.mode,
        **config.settings_given,
        is_inference=False,
        device="cpu",
        dtype="float32",
    )
    add_adapters(grit, config.model, config.mode)
    return grit


def test_any_seed_that_is_not_negative_is_accepted(checkpoint: Path) -> None:
    """A date is one: 20251231 * 2^20 steps * chunks * ranks is more than the 64 bits that torch takes."""
    config = config_of(mode="generative", seed=20251231)
    samples = ToyStream(load(checkpoint, config).tokenizer, 0, CONVERSATIONS)[0]
    ranks = Ranks(0, 1, torch.device("cpu"))
    batch = plan_step([], [], samples.conversations, None, config.batch, config.losses, ranks)
    runner = StepGradients(TrainingModel(load(checkpoint, config)), config.losses, ranks)
    assert runner(batch, config.seed * 2**20 + 5).total > 0
    with pytest.raises(ValueError, match="seed: .*-1"):
        config_of(seed=-1)


def gradients_of(
    checkpoint: Path, config: TrainConfig, samples: StepSamples, ranks: Ranks | None = None
) -> tuple[StepLosses, dict[str, torch.Tensor]]:
    """Losses and gradients of one step, whole on every rank."""
    ranks = ranks or Ranks(0, 1, torch.device("cpu"))
    training_model = TrainingModel(load(checkpoint, config))
    recompute_activations(training_model.grit, config.model)
    compile_layers(training_model.grit, config.model, "aot_eager")  # traces as inductor does, and needs no C++ compiler
    training_model.touch_all = ranks.group is not None
    bf16 = bool(config.model.bf16)
    model = wrap(training_model, config.parallel, ranks, bf16=bf16)
    optimizers = Optimizers(model, config.optimizer, config.losses, ranks, steps=1, embeds=config.embeds)
    batch = plan_step(
        samples.queries if config.embeds else [],
        samples.passages if config.embeds else [],
        samples.conversations if config.generates else [],
        (samples.query_ids, samples.passage_ids),
        config.batch,
        config.losses,
        ranks,
        attention=training_model.grit.attention,
        scores=samples.passage_scores,
        datasets=(
            samples.query_datasets if config.embeds else [],
            samples.conversation_datasets if config.generates else [],
        ),
        num_datasets=len(ToyStream.datasets),
    )
    gradients = StepGradients(
        model,
        config.losses,
        ranks,
        bf16=bf16,
        objective_grad_norm=config.optimizer.objective_grad_norm,
        reduce_each_chunk=config.parallel.reduce_each_chunk,
        log_temperature=optimizers.log_temperature,
    )
    losses = gradients(batch, seed=3)
    found = {}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        if grad is not None:
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    if optimizers.log_temperature is not None:
        grad = optimizers.log_temperature.grad
        assert grad is not None
        if ranks.group is not None:  # as the optimisers do before they use it
            dist.all_reduce(grad, group=ranks.group)
            grad /= ranks.world
        found["log_temperature"] = grad
    return losses, found


def assert_same(
    found: tuple[StepLosses, dict[str, torch.Tensor]], expected: tuple[StepLosses, dict[str, torch.Tensor]]
) -> None:
    for (name, mine), theirs in zip(asdict(found[0]).items(), asdict(expected[0]).values(), strict=True):
        pairs = zip(mine, theirs, strict=True) if isinstance(mine, list) else [(mine, theirs)]
        for one, other in pairs:
            assert (one is None) == (other is None), name
            assert one is None or one == pytest.approx(other, rel=1e-5 if "norm" in name else 1e-6), name
    assert found[1].keys() == expected[1].keys()
    scale = max(float(g.norm()) for g in expected[1].values())
    for name, grad in expected[1].items():
        assert float((found[1][name] - grad).norm()) <= 1e-6 * max(float(grad.norm()), 0.1 * scale), name


# lower than either objective's norm, so that both limits act
LIMITED = {"objective_grad_norm": 0.2}
CHUNKED = [
    {"chunk_tokens": LENGTH},
    {"chunk_tokens": 3 * LENGTH},
    {"chunking": "triplet"},
    {"chunk_tokens": 2 * LENGTH, "learn_temperature": True, "symmetric": True},
    {"chunk_tokens": 2 * LENGTH, "generative_loss": "token", "generative_weight": 0.1},
    {"chunk_tokens": 2 * LENGTH, "generative_loss": "sample", "contrastive_weight": 0.5},
    {"chunk_tokens": 2 * LENGTH, "generative_loss": "mixed", "generative_group": 1},
    {"chunk_tokens": 2 * LENGTH, "projection": 16, "in_batch_negatives": False},
    {"chunk_tokens": 2 * LENGTH, "mode": "embedding"},
    {"chunk_tokens": LENGTH, "mode": "generative"},
    {"chunk_tokens": 2 * LENGTH, "attn": "cbcc", "mask_duplicates": False},
    {"chunk_tokens": 2 * LENGTH, "attn": "cccc", "pooling_method": "weightedmean"},
    {"chunk_tokens": 2 * LENGTH, "gradient_checkpointing": True},
    {"chunk_tokens": 2 * LENGTH, "gradient_checkpointing": "selective"},
    {"chunk_tokens": 2 * LENGTH, "matryoshka_dims": [16, 32]},
    {"chunk_tokens": 2 * LENGTH, "distillation_weight": 0.7, "teacher_temperature": 2.0, "matryoshka_dims": [16]},
    {"chunk_tokens": 2 * LENGTH, **LIMITED},
    {"chunking": "triplet", "projection": 16, "learn_temperature": True, **LIMITED},
    {"chunk_tokens": 2 * LENGTH, "lora_rank": 4, "lora_dropout": 0.0, **LIMITED},
]


@pytest.mark.parametrize("changes", CHUNKED, ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()))
def test_chunks_give_the_gradients_of_one_pass(checkpoint: Path, tokenizer: Any, changes: dict[str, Any]) -> None:
    samples = ToyStream(tokenizer, QUERIES, CONVERSATIONS)[0]
    whole = config_of(**{**changes, "chunk_tokens": 0, "chunking": "tokens", "gradient_checkpointing": False})
    chunked = gradients_of(checkpoint, config_of(**changes), samples)
    assert_same(chunked, gradients_of(checkpoint, whole, samples))


@pytest.mark.parametrize("budget", [0, 10, 13, 40])
def test_a_plan_places_every_sample_once_within_the_budget(budget: int) -> None:
    lengths = [3, 9, 1, 7, 10, 2, 2, 5, 6, 10, 4]
    plan = first_fit(lengths, budget)
    assert sorted(i for chosen in plan for i in chosen) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in chosen) for chosen in plan]
    assert not budget or max(sizes) <= budget
    # first fit leaves at most one chunk half empty
    assert not budget or sum(2 * size <= budget for size in sizes) <= 1
    assert first_fit([], budget) == []


def test_the_papers_split_keeps_positives_negatives_and_queries_apart() -> None:
    assert plan_texts(2, [1] * 2 + [5] * 6, chunking="triplet", group_size=3) == [[2, 5], [3, 4, 6, 7], [0, 1]]


def test_a_step_plans_with_the_passages_of_its_queries(tokenizer: Any) -> None:
    samples = ToyStream(tokenizer, 4, 0)[0]
    queries, passages = samples.queries[:2], (samples.passages * 3)[:6]
    batch = BatchConfig(chunking="triplet")
    planned = plan_step(queries, passages, [], None, batch, LossConfig(), Ranks(0, 1, torch.device("cpu")))
    assert [chunk.embedded.tolist() for chunk in planned.text_chunks] == [[2, 5], [3, 4, 6, 7], [0, 1]]


def test_shards_in_bfloat16_are_computed_with_and_sent_so(
    checkpoint: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that layers see are bfloat16, their gradients and what is kept of them float32."""
    samples = ToyStream(tokenizer, QUERIES, CONVERSATIONS)[0]
    exact, alone = (gradients_of(checkpoint, config_of(bf16=bf16), samples)[1] for bf16 in (False, True))
    seen = set()
    project = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, weight, *bias: seen.add(weight.dtype) or project(x, weight, *bias)
    )
    with process_group(0, 1, tmp_path / "store") as group:
        here = Ranks(0, 1, torch.device("cpu"), group)
        sharded = gradients_of(checkpoint, config_of(bf16=True, parallel="fsdp"), samples, here)[1]
    assert seen == {torch.bfloat16} and {grad.dtype for grad in sharded.values()} == {torch.float32}
    scale = max(float(grad.norm()) for grad in exact.values())
    for name, truth in exact.items():
        error, of_autocast = (float((grads[name] - truth).norm()) / scale for grads in (sharded, alone))
        assert error <= 2 * of_autocast + 1e-3, name


RANKED = [
    {"parallel": "ddp"},
    {"parallel": "fsdp", "chunk_tokens": LENGTH},
    {"parallel": "ddp", "chunk_tokens": 2 * LENGTH, "learn_temperature": True, "projection": 16},
    {"parallel": "fsdp", "chunking": "triplet", "reduce_each_chunk": True, "generative_loss": "sample"},
    {"parallel": "fsdp", "chunk_tokens": 2 * LENGTH, **LIMITED},
    {"parallel": "ddp", **LIMITED},
    {"parallel": "ddp", "distillation_weight": 0.7, "learn_temperature": True},
    {"parallel": "fsdp", "lora_rank": 4, "lora_dropout": 0.0, "chunk_tokens": LENGTH, **LIMITED},
]
COMPILED = [{"parallel": "fsdp", "compile": True, "chunk_tokens": LENGTH, "gradient_checkpointing": True}]
HYBRID = [
    {"parallel": "fsdp", "shard_size": 2, "chunk_tokens": 2 * LENGTH, "gradient_checkpointing": True},
    {"parallel": "fsdp", "cpu_offload": True, "mode": "embedding"},
    {"parallel": "fsdp", "shard_size": 2, **LIMITED},
]


def _rank(rank: int, world: int, store: str, checkpoint: str, cases: list[dict[str, Any]], folder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with process_group(rank, world, store) as group:
        here = Ranks(rank, world, torch.device("cpu"), group)
        for index, changes in enumerate(cases):
            samples = ToyStream(tokenizer, QUERIES, CONVERSATIONS, here)[0]
            losses, grads = gradients_of(Path(checkpoint), config_of(**changes), samples, here)
            if rank == 0:
                torch.save({"losses": asdict(losses), "grads": grads}, Path(folder) / f"{index}.pt")


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        pytest.param(2, RANKED, id="2 ranks"),
        pytest.param(4, HYBRID, id="4 ranks", marks=pytest.mark.slow),
        pytest.param(2, COMPILED, id="2 ranks, compiled", marks=pytest.mark.slow),
    ],
)
def test_ranks_give_the_gradients_of_one_process(
    checkpoint: Path, tokenizer: Any, tmp_path: Path, world: int, cases: list[dict[str, Any]]
) -> None:
    """4 ranks share 3 conversations and 6 queries: one rank has no conversation, and ranks differ in their chunks."""
    mp.spawn(_rank, (world, str(tmp_path / "store"), str(checkpoint), cases, str(tmp_path)), nprocs=world)
    samples = ToyStream(tokenizer, QUERIES, CONVERSATIONS)[0]
    for index, changes in enumerate(cases):
        plain = {"chunk_tokens": 0, "chunking": "tokens", "gradient_checkpointing": False, "compile": False}
        expected = gradients_of(checkpoint, config_of(**{**changes, **plain}), samples)
        saved = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert_same((StepLosses(**saved["losses"]), saved["grads"]), expected)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"contrastive_weight": 2.0, "generative_weight": 0.25},
        {"contrastive_weight": 0.5, "distillation_weight": 0.75},
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [0.0, 0.2, 1e6])
def test_each_objectives_gradient_is_limited_before_they_are_added(
    checkpoint: Path, tokenizer: Any, limit: float, weights: dict[str, float]
) -> None:
    """The sum is made of what the two objectives give alone, each clipped as torch clips, and then weighted: the weights count
    when both limits act as well. A far limit changes nothing."""
    samples = ToyStream(tokenizer, QUERIES, CONVERSATIONS)[0]
    both, sum_of_both = gradients_of(checkpoint, config_of(objective_grad_norm=limit, **weights), samples)
    of_texts = weights.get("contrastive_weight", 1.0) + weights.get("distillation_weight", 0.0)
    of = {"contrastive": of_texts, "generative": weights.get("generative_weight", 1.0)}
    without = {
        "contrastive": {"generative_weight": 0.0},
        "generative": {"contrastive_weight": 0.0, "distillation_weight": 0.0},
    }
    alone = {}
    for mode, weight in of.items():
        _, grads = gradients_of(checkpoint, config_of(**{**weights, **without[mode]}), samples)
        norm = torch.nn.utils.get_total_norm(list(grads.values()))
        assert float(norm) == pytest.approx(getattr(both, f"{mode}_grad_norm"), rel=1e-5)
        assert limit != 0.2 or norm > 2 * limit * weight
        alone[mode] = {name: grad * min(1.0, weight * (limit or 1e6) / float(norm)) for name, grad in grads.items()}
    for name, grad in sum_of_both.items():
        expected = alone["contrastive"].get(name, 0) + alone["generative"].get(name, 0)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    flat = [torch.cat([grads[name].flatten().double() for name in sum_of_both]) for grads in alone.values()]
    assert both.added_norms == pytest.approx([float(gradient.norm()) for gradient in flat], rel=1e-4)
    total = float(torch.nn.utils.get_total_norm(list(sum_of_both.values())))
    between = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    assert cosine(both.added_norms, total) == pytest.approx(between, abs=1e-4)


def test_a_norm_that_is_not_finite_is_not_hidden_by_the_limit() -> None:
    assert limit_factor(float("nan"), 1.0) == limit_factor(float("inf"), 1.0) == 1.0
    assert limit_factor(4.0, 1.0) == pytest.approx(0.25) and limit_factor(0.0, 1.0) == limit_factor(9.0, 0.0) == 1.0


def test_an_objective_without_weight_is_limited_as_at_weight_1() -> None:
    """A router's loss alone is left of it."""
    weight = torch.nn.Parameter(torch.zeros(2))
    gradients = ObjectiveGradients([weight], limit=2.0)
    weight.grad = torch.tensor([3.0, 4.0])
    assert gradients.take(0.0) == 5.0 and weight.grad is None
    gradients.add()
    torch.testing.assert_close(weight.grad, torch.tensor([1.2, 1.6]))


def test_the_cosine_of_two_gradients_follows_from_their_norms_and_that_of_the_sum() -> None:
    first, second = (
        torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64),
        torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64),
    )
    norms = [float(first.norm()), float(second.norm())]
    expected = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
    assert cosine(norms, float((first + second).norm())) == pytest.approx(expected)
    assert cosine([2.0], 2.0) is cosine([0.0, 2.0], 2.0) is cosine([float("nan"), 1.0], 1.0) is None


def test_a_mixtures_router_loss_is_that_of_transformers_and_joins_the_gradient(tokenizer: Any, tmp_path: Path) -> None:
    """Tiny Mixtral, one pass over one conversation without padding: transformers' own loss on the same tokens."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from python_model.train.setup import router_loss_weight

    settings = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.3,
        output_router_logits=True,
    )
    plain = MixtralForCausalLM(settings)
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = config_of(mode="generative")
    model = TrainingModel(load(tmp_path, config), router_loss=True)
    weight = router_loss_weight(model.grit, config.losses)
    assert weight == 0.3
    ranks = Ranks(0, 1, torch.device("cpu"))
    sample = ToyStream(tokenizer, 0, 1)[0].conversations
    batch = plan_step([], [], sample, None, config.batch, config.losses, ranks)
    losses = StepGradients(model, config.losses, ranks, bf16=False, router_loss_weight=weight)(batch, seed=0)
    ids = torch.tensor([sample[0].input_ids])
    labels = torch.tensor([[-100, *(sample[0].labels or [])[:-1]]])
    expected = plain(ids, labels=labels)
    assert losses.router == pytest.approx(float(expected.aux_loss), rel=1e-5)
    assert losses.total == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    expected.loss.backward()
    gates = [name for name, _ in plain.named_parameters() if "gate" in name and "gate_up" not in name]
    assert gates
    mine = dict(model.grit.model.named_parameters())
    for name in gates:
        torch.testing.assert_close(mine[name].grad, dict(plain.named_parameters())[name].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("query_ids", [[0, 1, 2, 3], [0, 1, 0, 3]], ids=["different", "one twice"])
def test_one_packed_pass_equals_three_padded_passes_of_transformers(
    checkpoint: Path, tmp_path: Path, query_ids: list[int]
) -> None:
    """Losses and gradients of the packed pass, against separate padded passes of the unpatched model, as the paper does. A
    passage that is another query's positive as well is no negative for it."""
    from transformers import AutoModelForCausalLM

    config = toy_config(checkpoint, tmp_path)
    model = toy_model(config)
    samples = ToyStream(model.tokenizer, 4, 2)[0]
    ids = (query_ids, [number for positive in query_ids for number in (positive, 1000 + positive)])
    ranks = Ranks(0, 1, torch.device("cpu"))
    batch = plan_step(samples.queries, samples.passages, samples.conversations, ids, config.batch, config.losses, ranks)
    losses = StepGradients(TrainingModel(model), config.losses, ranks, bf16=False)(batch, seed=0)

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def padded(chosen: list[list[int]], value: int = 0) -> torch.Tensor:
        rows = [torch.tensor(row) for row in chosen]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    def embed(chosen: list[Any]) -> torch.Tensor:
        mask = padded([[1] * len(s) for s in chosen])
        states = plain.model(padded([s.input_ids for s in chosen]), attention_mask=mask, is_causal=False)
        keep = padded([[0] * s.instruction_len + [1] * (len(s) - s.instruction_len) for s in chosen])
        pooled = (states.last_hidden_state * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
        return torch.nn.functional.normalize(pooled, dim=-1)

    queries, passages = embed(samples.queries), embed(samples.passages)
    targets = torch.arange(4) * 2
    scores = queries @ passages.T / config.losses.temperature
    same = torch.tensor(ids[0])[:, None] == torch.tensor(ids[1])[None]
    same[torch.arange(4), targets] = False
    contrastive = torch.nn.functional.cross_entropy(scores.masked_fill(same, float("-inf")), targets)
    mask = padded([[1] * len(s) for s in samples.conversations])
    logits = plain(padded([s.input_ids for s in samples.conversations]), attention_mask=mask).logits
    labels = padded([s.labels for s in samples.conversations], IGNORE_INDEX)
    generative = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    (contrastive + generative).backward()

    assert losses.contrastive == pytest.approx(float(contrastive.detach()), rel=2e-5)
    assert losses.generative == pytest.approx(float(generative.detach()), rel=2e-5)
    assert losses.total == pytest.approx(float((contrastive + generative).detach()), rel=2e-5)
    for (name, mine), (_, theirs) in zip(model.model.named_parameters(), plain.named_parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        difference = (mine.grad - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-6)
        assert difference < 1e-4, (name, float(difference))


def test_a_chunk_of_both_kinds_gives_what_each_kind_gives_alone(checkpoint: Path, tmp_path: Path) -> None:
    model = TrainingModel(toy_model(toy_config(checkpoint, tmp_path)))
    samples = ToyStream(model.grit.tokenizer, 2, 2)[0]
    with torch.no_grad():
        vectors, sums, _ = model(build_chunk(samples.passages, samples.conversations))
        alone = model(build_chunk(samples.passages, []))[0], model(build_chunk([], samples.conversations))[1]
    torch.testing.assert_close((vectors, sums), alone, rtol=1e-5, atol=1e-5)


def test_a_chunk_moves_with_its_pack(checkpoint: Path, tmp_path: Path) -> None:
    samples = ToyStream(toy_model(toy_config(checkpoint, tmp_path)).tokenizer, 2, 2)[0]
    moved = build_chunk(samples.passages, samples.conversations).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and all(value.is_meta for value in tensors) and moved.pack.device.type == "meta"


def test_a_rank_without_work_gives_every_weight_a_gradient_of_zero(checkpoint: Path, tmp_path: Path) -> None:
    model = TrainingModel(toy_model(toy_config(checkpoint, tmp_path, projection=8)))
    model.touch_all = True
    model(_empty_chunk())[2].backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name


def test_chunked_dropout_draws_the_same_mask_in_both_passes(checkpoint: Path, tmp_path: Path) -> None:
    """With dropout, the loss of the first pass is that of the vectors the second pass differentiates."""
    config = toy_config(checkpoint, tmp_path, lora_rank=4, lora_dropout=0.5, chunk_tokens=2 * LENGTH)
    model = TrainingModel(toy_model(config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ranks = Ranks(0, 1, torch.device("cpu"))
    samples = ToyStream(model.grit.tokenizer, 4, 2)[0]
    share = plan_step(
        samples.queries, samples.passages, samples.conversations, None, config.batch, config.losses, ranks
    )
    gradients = StepGradients(model, config.losses, ranks, bf16=False)
    first = gradients._embed(share, seed=5).detach()
    assert len(share.text_chunks) > 1
    for index, chunk in enumerate(share.text_chunks):
        with gradients._computing(5, index):
            vectors = model(chunk)[0]
        assert torch.equal(vectors, first[chunk.embedded])


def test_upper_bounds_follow_the_runs_of_a_conversation() -> None:
    """Prefix-LM: tokens of the run see to its end, the others only their past."""
    talk = EncodedSample([5, 6, 7, 8, 9], labels=[-100] * 5, bidirectional=[True, True, True, False, False])
    text = EncodedSample([3, 4])
    assert build_chunk([text], [talk], attention=AttentionVariant.parse("bbbc")).pack.hi.tolist() == [
        2,
        2,
        3,
        3,
        3,
        4,
        5,
    ]  # type: ignore[union-attr]
