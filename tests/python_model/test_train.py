"""Training runs: one packed pass equals three padded ones, learns, repeats and resumes exactly, and leaves whole files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.prompts import IGNORE_INDEX
from python_model.train import Interrupted, TrainConfig, Trainer
from python_model.train.__main__ import main, parse
from python_model.train.chunks import build_chunk
from python_model.train.distributed import Ranks
from python_model.train.model import TrainingModel
from python_model.train.setup import load_model
from python_model.train.step import StepGradients, plan_step
from python_model.train.trackers import JsonLines
from tests.python_model.training_samples import LENGTH, ToyStream

SAME = ("loss", "contrastive_loss", "generative_loss", "gradient_norm", "learning_rate", "tokens")


def config_of(checkpoint: Path, folder: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "model": str(checkpoint),
        "train_data": str(checkpoint),
        "output_dir": str(folder / "out"),
        "embedding_batch_size": 4,
        "generative_batch_size": 2,
        "query_max_len": LENGTH,
        "passage_max_len": LENGTH,
        "generative_max_len": LENGTH,
        "bf16": False,
        "temperature": 0.1,
    }
    return TrainConfig(**{**options, **changes})


def trainer_of(config: TrainConfig) -> Trainer:
    model = load_model(config, torch.device("cpu"))
    queries = config.embedding_batch_size if config.embeds else 0
    return Trainer(model, config, ToyStream(model.tokenizer, queries, 2 if config.generates else 0))


def figures(records: list[dict[str, Any]]) -> list[list[Any]]:
    """What must repeat exactly: everything but times and memory."""
    return [[record[name] for name in SAME] for record in records]


def test_one_packed_pass_equals_three_padded_passes_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    """Losses and gradients of the packed pass, against separate padded passes of the unpatched model, as the paper does."""
    from transformers import AutoModelForCausalLM

    config = config_of(checkpoint, tmp_path)
    model = load_model(config, torch.device("cpu"))
    samples = ToyStream(model.tokenizer, 4, 2)[0]
    ids = (samples.query_ids, samples.passage_ids)
    ranks = Ranks(0, 1, torch.device("cpu"))
    share = plan_step(samples.queries, samples.passages, samples.conversations, ids, config, ranks)
    losses = StepGradients(TrainingModel(model), config, ranks)(share, seed=0)

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
    contrastive = torch.nn.functional.cross_entropy(queries @ passages.T / config.temperature, targets)
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


def test_toy_run_learns_both_objectives(checkpoint: Path, tmp_path: Path) -> None:
    config = config_of(checkpoint, tmp_path, steps=30, learning_rate=3e-3)
    records = trainer_of(config).train()
    for kind, share in (("contrastive_loss", 0.85), ("generative_loss", 0.5)):
        first, last = (sum(r[kind] for r in chosen) / 5 for chosen in (records[:5], records[-5:]))
        assert last < share * first, kind
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines == records and [line["step"] for line in lines] == list(range(1, 31))
    assert all(line["tokens_per_second"] > 0 and line["memory_gib"] > 0 for line in lines)


@pytest.mark.parametrize("mode", ["embedding", "generative"])
def test_single_objective_modes_skip_the_other_loss(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    records = trainer_of(config_of(checkpoint, tmp_path, steps=2, mode=mode)).train()
    assert (records[0]["contrastive_loss"] is None) == (mode == "generative")
    assert (records[0]["generative_loss"] is None) == (mode == "embedding")


@pytest.mark.parametrize(
    "changes",
    [
        {"attn": "cccc", "pooling_method": "weightedmean"},
        {"attn": "cccc", "pooling_method": "lasttoken", "embed_eos": "</e>"},
        {"attn": "cbcc"},
        {"attn": "bbbc"},
        {"attn": "bbil"},
        {"projection": 16},
        {"bf16": True},
        {"lora_rank": 4},
    ],
    ids=str,
)
def test_every_variant_trains_exports_and_loads(checkpoint: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also in plain transformers: the weights of the export are those that were trained."""
    from transformers import AutoModelForCausalLM

    config = config_of(checkpoint, tmp_path, steps=3, learning_rate=1e-2, **changes)
    trainer = trainer_of(config)
    before = trainer.grit.encode("a river")
    records = trainer.train()
    assert records[-1]["gradient_norm"] > 0
    trained = trainer.grit.encode("a river")
    folder = trainer.save()
    loaded = GritLM(folder, device="cpu")
    assert loaded.attn == config.attn and loaded.pooling_method == config.pooling_method
    again = loaded.encode("a river")
    assert abs(again - trained).max() < 1e-5 < abs(again - before).max()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    state = loaded.model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in plain.state_dict().items())


def test_adapters_train_only_themselves_on_every_linear_layer(checkpoint: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(checkpoint, tmp_path, steps=1, lora_rank=4))
    trained = [name for name, p in trainer.grit.model.named_parameters() if p.requires_grad]
    layers = {name.split(".lora_")[0].split(".")[-1] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in name for name in trained)


def test_chunked_dropout_draws_the_same_mask_in_both_passes(checkpoint: Path, tmp_path: Path) -> None:
    """With dropout, the loss of the first pass is that of the vectors the second pass differentiates."""
    config = config_of(checkpoint, tmp_path, lora_rank=4, lora_dropout=0.5, chunk_tokens=2 * LENGTH)
    model = TrainingModel(load_model(config, torch.device("cpu")))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ranks = Ranks(0, 1, torch.device("cpu"))
    samples = ToyStream(model.grit.tokenizer, 4, 2)[0]
    share = plan_step(samples.queries, samples.passages, samples.conversations, None, config, ranks)
    gradients = StepGradients(model, config, ranks)
    first = gradients._embed(share, seed=5).detach()
    for index, chunk in enumerate(share.chunks[: share.embedding_rounds]):
        with gradients._computing(5, index):
            vectors = model(chunk)[0]
        assert torch.equal(vectors, first[chunk.embedded])


def test_memory_depends_on_the_chunk_not_on_the_batch(checkpoint: Path, tmp_path: Path) -> None:
    """The bytes that autograd keeps at once, at 4 and at 32 queries: the same but for the embeddings."""
    kept = {}
    for queries in (4, 32):
        config = config_of(checkpoint, tmp_path, embedding_batch_size=queries, chunk_tokens=4 * LENGTH)
        model = TrainingModel(load_model(config, torch.device("cpu")))
        ranks = Ranks(0, 1, torch.device("cpu"))
        samples = ToyStream(model.grit.tokenizer, queries, 2)[0]
        share = plan_step(samples.queries, samples.passages, samples.conversations, None, config, ranks)
        peak = size = 0

        def pack(x: torch.Tensor) -> tuple[torch.Tensor, int]:
            nonlocal peak, size
            size += x.numel() * x.element_size()
            peak = max(peak, size)
            return x, size

        def count(chunk: Any, model: TrainingModel = model) -> Any:
            nonlocal size
            size = 0  # the graph of the chunk before is gone
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
                return model(chunk)

        runner = StepGradients(model, config, ranks)
        runner.model = count  # type: ignore[assignment]
        runner(share, seed=0)
        kept[queries] = peak
    assert kept[32] < 1.2 * kept[4]


def test_same_seed_same_run(checkpoint: Path, tmp_path: Path) -> None:
    runs = [
        figures(trainer_of(config_of(checkpoint, tmp_path, steps=3, resume=False, deterministic=True)).train())
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4, "learn_temperature": True, "chunk_tokens": 2 * LENGTH}])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """SIGTERM in step 3: the state is saved, and the resumed run's log and weights equal those of a whole run."""
    whole = trainer_of(config_of(checkpoint, tmp_path / "whole", steps=6, **changes))
    expected = whole.train()

    config = config_of(checkpoint, tmp_path / "cut", steps=6, **changes)
    cut = trainer_of(config)
    stream = cut.stream

    class Interrupting:
        def steps(self, start: int, stop: int) -> Any:
            for step in range(start, stop):
                if step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield stream[step]  # type: ignore[index]

    cut.stream = Interrupting()
    with pytest.raises(Interrupted, match="stopped after step 3"):
        cut.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    resumed = trainer_of(config)
    assert figures(resumed.train()) == figures(expected)
    for (name, mine), (_, theirs) in zip(resumed.grit.named_parameters(), whole.grit.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert resumed.learner.temperature == whole.learner.temperature


KILLED = """
import sys
from pathlib import Path
from tests.python_model.test_train import config_of, trainer_of
import torch
torch.set_num_threads(1)
trainer_of(config_of(Path(sys.argv[1]), Path(sys.argv[2]), steps=500, save_steps=2, save_total=2)).train()
"""


def test_a_killed_run_resumes_exactly(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL at whatever point the run has reached, perhaps in the middle of saving."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path / "cut")], stderr=subprocess.DEVNULL
    )
    log = tmp_path / "cut" / "out" / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = json.loads(log.read_bytes().splitlines()[-2])["step"]

    config = config_of(checkpoint, tmp_path / "cut", steps=500, save_steps=2)
    resumed = trainer_of(config)
    stream, stop = resumed.stream, done + 3

    class Short:
        def steps(self, start: int, _: int) -> Any:
            assert 0 < start <= done + 1, "nothing or too much was kept"
            return stream.steps(start, stop)

    resumed.stream = Short()
    records = resumed.train()
    assert len(records) == stop
    assert len(list((tmp_path / "cut" / "out" / "states").glob("step-*"))) <= 2

    whole = trainer_of(config_of(checkpoint, tmp_path / "whole", steps=500))
    start = whole.stream
    whole.stream = type("Stream", (), {"steps": lambda self, a, b: start.steps(a, stop)})()
    assert figures(whole.train()) == figures(records)


def test_a_state_of_another_run_is_refused_by_the_setting_that_differs(checkpoint: Path, tmp_path: Path) -> None:
    trainer_of(config_of(checkpoint, tmp_path, steps=2, save_steps=1)).train()
    with pytest.raises(ValueError, match="learning_rate: got 0.5"):
        trainer_of(config_of(checkpoint, tmp_path, steps=2, save_steps=1, learning_rate=0.5)).train()
    # what only changes speed and memory may change
    trainer_of(config_of(checkpoint, tmp_path, steps=2, save_steps=1, chunk_tokens=LENGTH)).train()


def test_states_rotate_and_a_half_written_one_is_ignored(checkpoint: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(checkpoint, tmp_path, steps=4, save_steps=1, save_total=2))
    trainer.train()
    states = tmp_path / "out" / "states"
    assert sorted(p.name for p in states.iterdir()) == ["step-00000003", "step-00000004"]
    (states / "step-00000009").mkdir()
    newest = trainer.states.newest()
    assert newest is not None and newest.name == "step-00000004"


def test_a_log_keeps_the_steps_of_the_state_and_drops_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in (1, 2, 3)) + '{"step": 4, "lo')
    log = JsonLines(path, step=2)
    log.log(3, {"loss": 0.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]


def test_a_non_finite_loss_stops_and_saves_the_batch(checkpoint: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(checkpoint, tmp_path, steps=2))
    with torch.no_grad():
        trainer.grit.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss: got nan .*bad_batch\.json"):
        trainer.train()
    saved = json.loads((tmp_path / "out" / "bad_batch.json").read_text())
    assert len(saved["queries"]) == 4 and len(saved["passages"]) == 8 and len(saved["conversations"]) == 2
    assert saved["query_origins"][0] == "toy:0"


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(checkpoint, tmp_path, steps=1))
    trainer.grit.decoder[0].norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = [weight.clone() for weight in trainer.grit.parameters()]
    with pytest.raises(FloatingPointError, match=r"its gradient has norm nan.*bad_batch\.json"):
        trainer.train()
    assert all(map(torch.equal, before, trainer.grit.parameters()))


def test_an_exploding_loss_stops_and_saves_the_batch(checkpoint: Path, tmp_path: Path) -> None:
    config = config_of(checkpoint, tmp_path, steps=40, learning_rate=50.0, warmup_ratio=0.5, exploding_loss=3.0)
    with pytest.raises(FloatingPointError, match=r"exploding_loss=3\.0|loss: got (nan|inf)"):
        trainer_of(config).train()
    assert (tmp_path / "out" / "bad_batch.json").exists()


def test_a_log_without_psutil_is_json_all_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(config_of(checkpoint, tmp_path, steps=1))
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
    records = trainer_of(config_of(checkpoint, tmp_path, steps=2, trackers=["trackio"])).train()
    assert [step for step, _ in seen] == [1, 2, -1]
    assert seen[0][1]["contrastive_loss"] == records[0]["contrastive_loss"]


def test_a_tracker_whose_package_is_missing_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="trackers: 'wandb' needs the package wandb"):
        trainer_of(config_of(checkpoint, tmp_path, trackers=["wandb"])).train()


def test_staircases_follow_the_runs_of_a_conversation() -> None:
    """Prefix-LM: tokens of the run see to its end (at most ``right`` ahead), the others only their past."""
    from python_model.prompts import EncodedSample

    talk = EncodedSample([5, 6, 7, 8, 9], labels=[-100] * 5, bidirectional=[True, True, True, False, False])
    text = EncodedSample([3, 4])
    assert build_chunk([text], [talk], attn="bbbc").pack.hi.tolist() == [2, 2, 3, 3, 3, 4, 5]  # type: ignore[union-attr]
    near = build_chunk([text], [talk], attn="bbbc", right=1).pack.hi
    assert near is not None and near.tolist() == [2, 2, 2, 3, 3, 4, 5]


def _data_folder(folder: Path) -> Path:
    folder.mkdir()
    words = ["river", "city", "code", "word", "capital", "France", "space", "line"]
    embedding = [
        {
            "query": ["Find the text", f"where is {word} {n}"],
            "pos": [["", f"the {word} number {n} is here"]],
            "neg": [["", f"no {word} to be seen"], ["", "nothing"]],
        }
        for n, word in enumerate(words)
    ]
    generative = [{"text": [f"say {word}", f"{word} it is", "and?", "done"]} for word in words]
    for name, rows in (("emb", embedding), ("gen", generative)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_command_line_trains_and_the_checkpoint_loads(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    data = _data_folder(tmp_path / "data")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {checkpoint}\ntrain_data: {data}\nsteps: 5\nembedding_batch_size: 4\nbf16: false\n")
    main(["--config", str(config), "--steps", "2", "--output_dir", str(tmp_path / "out")])
    folder = tmp_path / "out" / "checkpoint"
    printed = capsys.readouterr().out
    assert f"saved {folder}" in printed and "memory per rank" in printed
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert GritLM(folder, device="cpu").encode("a text").shape == (64,)


def test_a_plot_that_fails_or_has_nothing_to_show_costs_no_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = _data_folder(tmp_path / "data"), tmp_path / "out"
    arguments = ["--model", str(checkpoint), "--train_data", str(data), "--output_dir", str(out), "--steps", "1"]
    arguments += ["--embedding_batch_size", "2", "--bf16", "false", "--save_steps", "1"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError):
            main(arguments)
    assert GritLM(out / "checkpoint", device="cpu").encode("a text").shape == (64,)
    (out / "log.jsonl").unlink()
    main(arguments)  # resumes a run that has nothing left to do, and no log
    assert not (out / "loss.png").exists()


def test_command_line_errors_name_what_is_wrong(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="no file or folder nowhere"):
        main(["--train_data", "nowhere"])
    data = _data_folder(tmp_path / "data")
    with pytest.raises(SystemExit, match="mode: got 'both'"):
        main(["--train_data", str(data), "--mode", "both"])
    with pytest.raises(SystemExit, match="chunk_tokens: got 10, accepted is 0 or at least"):
        main(["--train_data", str(data), "--chunk_tokens", "10"])
    with pytest.raises(SystemExit):
        parse(["--train_data", str(data), "--no_such_option", "1"])
    assert "no_such_option" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="router_loss_weight: got 1.0, but the model has no experts"):
        main(
            ["--model", str(checkpoint), "--train_data", str(data), "--router_loss_weight", "1.0"]
            + ["--output_dir", str(tmp_path / "out")]
        )


@pytest.mark.parametrize("name", ["gritlm-7b", "gritlm-8x7b", "embedding-7b", "generative-7b"])
def test_shipped_recipes_plan_their_memory_without_weights(
    name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("WORLD_SIZE", "64")
    main(["--config", f"configs/{name}.yaml", "--dry_run", "true"])
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
    import grit_kernels as gk

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


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_torchrun_trains_resumes_and_exports_what_one_process_does(
    checkpoint: Path, tmp_path: Path, parallel: str
) -> None:
    """Two ranks, stopped after two steps and started again, against one process that was never stopped."""
    data = _data_folder(tmp_path / "data")
    common = [
        *("--model", str(checkpoint), "--train_data", str(data), "--embedding_batch_size", "4", "--bf16", "false"),
        *("--generative_batch_size", "3", "--learning_rate", "1e-3", "--passage_max_len", "64"),
        *("--generative_max_len", "64", "--query_max_len", "64", "--chunk_tokens", "128", "--save_steps", "2"),
    ]
    main([*common, "--steps", "4", "--output_dir", str(tmp_path / "one")])

    def ranks(*more: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            + [
                "-m",
                "python_model.train",
                *common,
                "--parallel",
                parallel,
                "--output_dir",
                str(tmp_path / "two"),
                *more,
            ],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout + run.stderr

    ranks("--steps", "4")
    whole = (tmp_path / "two" / "log.jsonl").read_text()
    # as if it had been killed after step 2
    states = tmp_path / "two" / "states"
    shutil.rmtree(states / "step-00000004")
    assert "resuming after step 2" in ranks("--steps", "4")
    logs = [
        [json.loads(line) for line in text.splitlines()]
        for text in (whole, (tmp_path / "two" / "log.jsonl").read_text())
    ]
    assert figures(logs[0]) == figures(logs[1])
    single = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    for mine, theirs in zip(logs[1], single, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    one, two = (GritLM(tmp_path / name / "checkpoint", device="cpu").encode("a river") for name in ("one", "two"))
    assert abs(one - two).max() < 1e-4
