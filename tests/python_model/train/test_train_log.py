"""Where the figures of a run go: log.jsonl and trackers."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.model.chunks import first_fit
from python_model.model.prompts import IGNORE_INDEX
from python_model.train import flops
from python_model.train.flops import ModelFlops
from python_model.train.memory import GIB, used_gib
from python_model.train.plot import plot_losses
from python_model.train.trackers import StepLog, open_trackers
from tests.python_model.training_samples import LENGTH, toy_config, toy_model, toy_trainer


def test_a_log_keeps_the_steps_of_the_state_and_drops_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in (1, 2, 3)) + '{"step": 4, "lo')
    log = StepLog(path, step=2)
    log.log(3, {"loss": 0.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]


def test_a_new_run_keeps_no_step_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    log = StepLog(path)
    assert log.records == [] and path.read_text() == ""
    log.close()


def test_tensorboard_gets_the_numbers_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch's writer: what is no number (a loss that this step lacks, one per data set) has no curve."""
    seen: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))  # type: ignore[arg-type]
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {})
    tracker.log(3, {"loss": 0.5, "tokens": 7, "generative_loss": None, "by_dataset": {"a": 1.0}})
    tracker.close()
    assert seen == [("loss", 0.5, 3), ("tokens", 7, 3)]


def test_a_log_without_psutil_is_json_all_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=1))
    monkeypatch.setitem(sys.modules, "psutil", None)
    records = trainer.train()
    (line,) = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    refuse = pytest.fail  # NaN is no JSON
    assert json.loads(line, parse_constant=refuse) == records[0] and records[0]["memory_gib"] is None


def test_a_tracker_gets_what_the_log_gets(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package trackio, found by its name like the real one."""
    seen: list[tuple[int, dict[str, Any]]] = []

    class Trackio:
        @staticmethod
        def init(project: str, name: str, config: dict[str, Any]) -> None:
            assert project == "grit_kernels" and config["steps"] == 2

        @staticmethod
        def log(figures: dict[str, Any], step: int) -> None:
            seen.append((step, figures))

        @staticmethod
        def finish() -> None:
            seen.append((-1, {}))

    monkeypatch.setitem(sys.modules, "trackio", Trackio)  # type: ignore[arg-type]
    records = toy_trainer(toy_config(checkpoint, tmp_path, steps=2, trackers=["trackio"])).train()
    assert [step for step, _ in seen] == [1, 2, -1]
    assert seen[0][1]["contrastive_loss"] == records[0]["contrastive_loss"]


@pytest.mark.parametrize(("package", "own"), [("wandb", ""), ("wandb", "/elsewhere"), ("trackio", "")])
def test_wandb_writes_below_the_output_folder_unless_the_user_says_where(
    package: str, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(init=lambda **options: given.append(options)))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    if own:
        monkeypatch.setenv("WANDB_DIR", own)
    open_trackers([package], Path("run"), {"steps": 2})
    folder = {"dir": str(tmp_path / "run")} if package == "wandb" and not own else {}
    assert given == [{"project": "grit_kernels", "name": "run", "config": {"steps": 2}, **folder}]


def test_a_tracker_whose_package_is_missing_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ImportError, match="wandb is missing .*pip install wandb"):
        toy_trainer(toy_config(checkpoint, tmp_path, trackers=["wandb"])).train()
    assert (tmp_path / "out" / "log.jsonl").read_text() == '{"step": 1}\n'  # of an earlier run


def test_the_losses_of_each_data_set_make_up_the_steps(checkpoint: Path, tmp_path: Path) -> None:
    """Queries take turns between two data sets, two each; one chunk or many."""
    for changes in ({}, {"chunk_tokens": 64}):
        trainer = toy_trainer(toy_config(checkpoint, tmp_path, steps=1, resume=False, **changes))
        (record,) = trainer.train()
        halves = record["contrastive_loss/even"], record["contrastive_loss/odd"]
        assert halves[0] != halves[1] and sum(halves) / 2 == pytest.approx(record["contrastive_loss"], rel=1e-6)
        assert record["generative_loss/talks"] == pytest.approx(record["generative_loss"], rel=1e-6)
        assert "generative_loss/even" not in record and "contrastive_loss/talks" not in record


@pytest.mark.parametrize("mode", ["unified", "embedding"])
def test_a_step_of_both_objectives_logs_the_cosine_of_their_gradients(
    checkpoint: Path, tmp_path: Path, mode: str
) -> None:
    """Of those that are added, and before the sum is clipped."""
    changes = {"steps": 2, "mode": mode, "objective_grad_norm": 0.1, "max_grad_norm": 0.05}
    for record in toy_trainer(toy_config(checkpoint, tmp_path, **changes)).train():
        if mode == "embedding":
            assert record["gradient_cosine"] is None
            continue
        assert min(record["contrastive_grad_norm"], record["generative_grad_norm"]) > 0.1
        expected = (record["gradient_norm"] ** 2 - 2 * 0.1**2) / (2 * 0.1**2)
        assert record["gradient_cosine"] == pytest.approx(expected, abs=1e-4) and abs(expected) < 1


def test_operations_are_those_that_torch_counts(checkpoint: Path, tmp_path: Path) -> None:
    """A causal conversation and its backward pass in plain transformers, under torch's counter; labels on every token."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    length = 64
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        plain(ids, labels=ids).loss.backward()
    # the counter has the dense product of all pairs
    mine = ModelFlops.of(GritLM(checkpoint, is_inference=False, device="cpu")).step(length, length, length**2)
    assert mine == pytest.approx(counter.get_total_flops(), rel=0.01)
    frozen = GritLM(checkpoint, is_inference=False, device="cpu", mode="embedding").requires_grad_(False)
    assert ModelFlops.of(frozen).per_token == ModelFlops.of(GritLM(checkpoint, device="cpu")).per_token * 4 / 6
    assert ModelFlops.of(frozen).per_label == 0


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_mixture_counts_the_experts_that_a_token_visits(tokenizer: Any, tmp_path: Path, family: str) -> None:
    """Whatever its config calls their number."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1}
    sizes |= {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "num_experts_per_tok": 2}
    shared = 0
    if family == "mixtral":
        sizes |= {"num_local_experts": 4}
    else:
        sizes |= {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64}
        shared = 3 * 32 * 64 + 32
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    flops = ModelFlops.of(GritLM(tmp_path, device="cpu"))
    assert flops.per_token == 2 * 6 * (4 * 32 * 32 + 32 * 4 + 2 * 3 * 32 * 48 + shared)


def test_mfu_is_over_the_peak_that_is_given(checkpoint: Path, tmp_path: Path) -> None:
    (record,) = toy_trainer(toy_config(checkpoint, tmp_path, steps=1, peak_tflops=0.5)).train()
    assert record["mfu"] == pytest.approx(record["tflops"] / 0.5) and record["tflops"] > 0


def test_figures_of_a_step_follow_from_its_samples_and_its_seconds(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts see each other both ways, conversations only their past."""
    config = toy_config(checkpoint, tmp_path, steps=2, chunk_tokens=2 * LENGTH, peak_tflops=2.0)
    trainer, per = toy_trainer(config), ModelFlops.of(toy_model(config))
    begin = time.perf_counter()
    records = trainer.train()
    whole = time.perf_counter() - begin
    assert 0 < sum(record["seconds"] for record in records) <= whole
    for record, samples in zip(records, trainer.stream.steps(0, 2), strict=True):
        texts = [len(s) for s in (*samples.queries, *samples.passages)]
        talks = [len(s) for s in samples.conversations]
        labels = sum(label != IGNORE_INDEX for s in samples.conversations for label in s.labels or [])
        pairs = sum(n * n for n in texts) + sum(n * (n + 1) // 2 for n in talks)
        assert record["tokens"] == sum(texts) + sum(talks)
        assert record["chunks"] == sum(len(first_fit(lengths, 2 * LENGTH)) for lengths in (texts, talks)) > 2
        assert record["tokens_per_second"] * record["seconds"] == pytest.approx(record["tokens"])
        operations = per.step(record["tokens"], labels, pairs)
        assert record["tflops"] * record["seconds"] == pytest.approx(operations / 1e12)
        assert record["mfu"] == pytest.approx(record["tflops"] / 2.0)
    bar = capsys.readouterr().err
    assert "2/2" in bar and f"rep={records[1]['contrastive_loss']:.3g}" in bar


def test_the_memory_of_a_run_on_a_cpu_is_that_of_its_process() -> None:
    psutil = pytest.importorskip("psutil")
    found = used_gib(torch.device("cpu"))
    assert found == pytest.approx(psutil.Process().memory_info().rss / GIB, rel=0.1)


def test_a_measured_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 8.0, 10.0, 14.0, 20.0, 22.0, 30.0, 33.0])  # 8, 4, 2 and 3 seconds
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(clock))
    measured = flops.measured_peak.__wrapped__(torch.device("cpu"), torch.float32)
    assert measured == 2 * 1024**3 / 2.0
    assert math.isnan(next(clock, math.nan))


@pytest.mark.parametrize("steps", [4, 3])
def test_a_profile_holds_the_steps_asked_for(checkpoint: Path, tmp_path: Path, steps: int) -> None:
    """Two of them behind the second; a run that ends before writes what there is."""
    toy_trainer(toy_config(checkpoint, tmp_path, steps=steps, profile_steps=2)).train()
    trace = json.loads((tmp_path / "out" / "profile" / "rank-0.json").read_text())
    recorded = [event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")]
    # of the shorter run the second is the rest behind its last step
    assert sorted(set(recorded)) == ["ProfilerStep#2", "ProfilerStep#3"]
    assert "grit_kernels::" in (tmp_path / "out" / "profile" / "rank-0.txt").read_text()


def test_a_plot_has_the_losses_and_their_means_and_says_which_is_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    save = figure.savefig

    def remember(self: Any, *arguments: Any, **options: Any) -> None:
        drawn.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(figure, "savefig", remember)
    losses = [3.0, 1.0, 2.0, *[4.0] * 13]  # of every second step: a mean is over the last two
    records: list[dict[str, Any]] = [
        {"step": n, "contrastive_loss": None if n % 2 else losses[n // 2], "generative_loss": 2.0 * n}
        for n in range(32)
    ]
    plot_losses(records, tmp_path / "loss.png")
    image = (tmp_path / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG") and int.from_bytes(image[16:20], "big") == 2 * 600  # the width
    contrastive, generative = drawn[0].axes
    assert [panel.get_title() for panel in drawn[0].axes] == ["contrastive loss", "next-token loss"]
    assert [text.get_text() for text in contrastive.get_legend().get_texts()] == ["step", "mean of 2 steps"]
    each, mean = contrastive.lines
    assert [*each.get_xdata()] == [*range(0, 32, 2)] and [*each.get_ydata()] == losses
    assert [*mean.get_ydata()] == [3.0, 2.0, 1.5, 3.0, *[4.0] * 12]
    assert [*generative.lines[0].get_ydata()] == [2.0 * n for n in range(32)]
    assert [*generative.lines[1].get_ydata()][:5] == [0.0, 1.0, 2.0, 3.0, 5.0]
    plot_losses([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_texts_beyond_the_models_positions_are_trained_on_with_one_warning(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 8}))
    with pytest.warns(UserWarning, match="goes beyond the 8 positions") as told:
        toy_trainer(toy_config(tmp_path / "model", tmp_path, steps=2)).train()
    assert sum("positions" in str(warning.message) for warning in told) == 1
