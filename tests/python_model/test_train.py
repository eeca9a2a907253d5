"""Training: one packed pass equals three padded ones, learns, repeats exactly, and leaves whole files behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.data.jsonl import EmbeddingRow, GenerativeRow, InstructedText
from python_model.prompts import IGNORE_INDEX
from python_model.train import TrainConfig, Trainer, build_batch, compute_losses
from python_model.train.__main__ import main, parse
from python_model.train.batch import shuffled_epochs


def _rows(count: int = 12) -> tuple[list[EmbeddingRow], list[GenerativeRow]]:
    words = ["river", "city", "code", "word", "capital", "France", "space", "line"]
    embedding = [
        EmbeddingRow(
            InstructedText("Find the text", f"where is {words[i % 8]} {i}"),
            (InstructedText("", f"the {words[i % 8]} number {i} is here"),),
            (InstructedText("", f"no {words[(i + 3) % 8]} to be seen"), InstructedText("", "nothing")),
        )
        for i in range(count)
    ]
    generative = [GenerativeRow((f"say {words[i % 8]}", f"{words[i % 8]} it is", "and?", "done")) for i in range(count)]
    return embedding, generative


def _data_folder(folder: Path) -> Path:
    embedding, generative = _rows()
    folder.mkdir()
    (folder / "emb.jsonl").write_text(
        "".join(
            json.dumps({"query": list(r.query), "pos": [list(p) for p in r.pos], "neg": [list(n) for n in r.neg]})
            + "\n"
            for r in embedding
        )
    )
    (folder / "gen.jsonl").write_text("".join(json.dumps({"text": list(r.turns)}) + "\n" for r in generative))
    return folder


def _config(tmp_path: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "train_data": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "embedding_batch_size": 4,
        "generative_batch_size": 2,
        "bf16": False,
        "temperature": 0.1,
    }
    return TrainConfig(**{**options, **changes})


@pytest.fixture
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, is_inference=False, device="cpu", dtype="float32")


def test_one_packed_pass_equals_three_padded_passes_of_transformers(
    checkpoint: Path, model: GritLM, tmp_path: Path
) -> None:
    """Losses and gradients of the packed pass, against separate padded passes of the unpatched model, as the paper does."""
    from transformers import AutoModelForCausalLM

    embedding, generative = _rows(4)
    config = _config(tmp_path)
    batch = build_batch(model.tokenizer, embedding, generative, config, random.Random(0))
    losses = compute_losses(model, batch, config)
    losses.total.backward()

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    samples = [batch.input_ids[a:b] for a, b in zip(batch.pack.cu_seqlens[:-1], batch.pack.cu_seqlens[1:], strict=True)]

    def padded(chosen: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in chosen], batch_first=True)
        return ids, mask

    def embed(start: int, end: int) -> torch.Tensor:
        ids, mask = padded(samples[start:end])
        states = plain.model(ids, attention_mask=mask, is_causal=False).last_hidden_state
        keep = mask.clone()
        for row, skip in enumerate(batch.pack.instruction_lens[start:end].tolist()):
            keep[row, :skip] = 0
        pooled = (states * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
        return torch.nn.functional.normalize(pooled, dim=-1)

    queries = embed(0, batch.queries)
    passages = embed(batch.queries, batch.queries + batch.passages)
    targets = torch.arange(len(queries)) * config.train_group_size
    assert batch.mask_ids is not None
    same = (batch.mask_ids[0][:, None] == batch.mask_ids[1][None]) & (
        torch.arange(len(passages))[None] != targets[:, None]
    )
    scores = (queries @ passages.T / config.temperature).masked_fill(same, float("-inf"))
    contrastive = torch.nn.functional.cross_entropy(scores, targets)
    ids, mask = padded(samples[batch.queries + batch.passages :])
    logits = plain(ids, attention_mask=mask).logits
    labels = torch.nn.utils.rnn.pad_sequence(
        list(batch.labels.split(batch.generative_cu_seqlens.diff().tolist())),
        batch_first=True,
        padding_value=IGNORE_INDEX,
    )
    generative_loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX
    )
    (contrastive + generative_loss).backward()

    torch.testing.assert_close(losses.contrastive, contrastive, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(losses.generative, generative_loss, rtol=2e-5, atol=1e-5)
    for (name, mine), (_, theirs) in zip(model.model.named_parameters(), plain.named_parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        difference = (mine.grad - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-6)
        assert difference < 1e-4, (name, float(difference))


def test_toy_run_learns_both_objectives(model: GritLM, tmp_path: Path) -> None:
    config = _config(tmp_path, steps=30, learning_rate=3e-3)
    records = Trainer(model, config, *_rows()).train()
    first, last = records[0], [sum(r[k] for r in records[-5:]) / 5 for k in ("contrastive_loss", "generative_loss")]
    assert last[0] < 0.7 * first["contrastive_loss"]
    assert last[1] < 0.5 * first["generative_loss"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines == records and [line["step"] for line in lines] == list(range(1, 31))


@pytest.mark.parametrize("mode", ["embedding", "generative"])
def test_single_objective_modes_skip_the_other_loss(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    model = GritLM(checkpoint, mode=mode, is_inference=False, device="cpu", dtype="float32")
    records = Trainer(model, _config(tmp_path, steps=2, mode=mode), *_rows()).train()
    assert (records[0]["contrastive_loss"] is None) == (mode == "generative")
    assert (records[0]["generative_loss"] is None) == (mode == "embedding")


def test_same_seed_same_run(checkpoint: Path, tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        model = GritLM(checkpoint, is_inference=False, device="cpu", dtype="float32")
        records = Trainer(model, _config(tmp_path, steps=3), *_rows()).train()
        runs.append([(r["loss"], r["gradient_norm"]) for r in records])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("attn", ["cccc", "cbcc"])
def test_attention_variants_train(checkpoint: Path, tmp_path: Path, attn: str) -> None:
    model = GritLM(checkpoint, attn=attn, is_inference=False, device="cpu", dtype="float32")
    records = Trainer(model, _config(tmp_path, steps=2, attn=attn), *_rows()).train()
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in records)


def test_gradient_checkpointing_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    losses = []
    for recompute in (False, True):
        model = GritLM(checkpoint, is_inference=False, device="cpu", dtype="float32")
        trainer = Trainer(model, _config(tmp_path, steps=2, gradient_checkpointing=recompute), *_rows())
        losses.append([r["loss"] for r in trainer.train()])
    assert losses[0] == losses[1]


def test_a_non_finite_loss_stops_and_saves_the_batch(model: GritLM, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.get_input_embeddings().weight.fill_(float("nan"))
    trainer = Trainer(model, _config(tmp_path, steps=2), *_rows())
    with pytest.raises(FloatingPointError, match="bad_batch.json"):
        trainer.train()
    saved = json.loads((tmp_path / "out" / "bad_batch.json").read_text())
    assert sum(saved["lengths"]) == len(saved["input_ids"])


def test_an_epoch_shows_every_row_once() -> None:
    stream = shuffled_epochs(list(range(10)), 4, random.Random(0))
    seen = [row for _ in range(5) for row in next(stream)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_passages_that_repeat_the_positive_are_no_negatives(model: GritLM, tmp_path: Path) -> None:
    row = _rows(1)[0][0]
    batch = build_batch(model.tokenizer, [row, row], [], _config(tmp_path), random.Random(0))
    assert batch.mask_ids is not None
    query_ids, passage_ids = batch.mask_ids
    assert query_ids.tolist() == [0, 0] and passage_ids[::2].tolist() == [0, 0]


def test_rows_without_negatives_are_refused_by_name(model: GritLM, tmp_path: Path) -> None:
    row = EmbeddingRow(InstructedText("", "question"), (InstructedText("", "answer"),))
    with pytest.raises(ValueError, match="train_group_size: got 2"):
        build_batch(model.tokenizer, [row], [], _config(tmp_path), random.Random(0))
    assert (
        build_batch(model.tokenizer, [row], [], _config(tmp_path, train_group_size=1), random.Random(0)).passages == 1
    )


def test_command_line_trains_and_the_checkpoint_loads(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    data = _data_folder(tmp_path / "data")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {checkpoint}\ntrain_data: {data}\nsteps: 5\nembedding_batch_size: 4\nbf16: false\n")
    main(["--config", str(config), "--steps", "2", "--output_dir", str(tmp_path / "out")])
    folder = tmp_path / "out" / "checkpoint"
    assert f"saved {folder}" in capsys.readouterr().out
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert GritLM(folder, device="cpu").encode("a text").shape == (64,)


def test_command_line_errors_name_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="no file or folder nowhere"):
        main(["--train_data", "nowhere"])
    data = _data_folder(tmp_path / "data")
    (data / "broken.jsonl").write_text('{"query": "a", "pos": ["b"], "neg": []}\n{"query": \n')
    with pytest.raises(SystemExit, match=r"broken\.jsonl:2"):
        main(["--train_data", str(data), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="mode: got 'both'"):
        main(["--train_data", str(data), "--mode", "both"])
    with pytest.raises(SystemExit):
        parse(["--train_data", str(data), "--no_such_option", "1"])
    assert "no_such_option" in capsys.readouterr().err
