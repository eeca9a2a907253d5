"""Training on replies that follow cached documents: the pass is that of RAG over the joined states, and it is differentiable."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grit_kernels as gk
from python_model import GritLM
from python_model.data.encoding import RowEncoder
from python_model.data.rows import GenerativeRow
from python_model.evaluation.language import conversation_losses
from python_model.generate.decode import Sampling, decode
from python_model.model.chunks import build_chunk
from python_model.model.losses import next_token_losses, sums_per_sample
from python_model.model.prompts import IGNORE_INDEX, EncodedSample, TooLong
from python_model.rag.answer import RAG
from python_model.rag.modes import Document, user_turn
from python_model.settings import GritSettings
from python_model.train.distributed import Ranks
from python_model.train.step import _visible_pairs
from python_model.train.trainer import Trainer
from tests.python_model.data.streams import config_of
from tests.python_model.training_samples import toy_config

DOCUMENTS = [
    "Paris is the capital of France.",
    "A river flows through the city of <|user|> Lyon.",
    "def add(first, second):",
]
QUESTION, REPLY = "What is the capital of France?", "The answer is the city of Paris."


def sample_of(
    model: GritLM, *, documents: int = 3, reply: str = REPLY, length: int = 512, causal: bool = False
) -> EncodedSample:
    turns = [user_turn("document_cache", QUESTION, []), reply]
    return model.formatter.conversation(turns, length, documents=DOCUMENTS[:documents], causal_documents=causal)


class Forced(Sampling):
    """Says what it is told to, and keeps the logits of every step."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        object.__setattr__(self, "tokens", iter(tokens))
        object.__setattr__(self, "seen", [])

    def choose(self, logits: Tensor, generator: Any = None, replies: Any = ()) -> Tensor:
        self.seen.append(logits[0].clone())  # type: ignore[attr-defined]
        return torch.tensor([next(self.tokens)])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("attn", "causal"), [("bbcc", False), ("bbcc", True), ("cccc", False), ("cbcc", True)])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("documents", [1, 3])
@torch.no_grad()
def test_logits_are_those_of_an_answer_from_cached_states(
    checkpoint: Path, checkpoint_without_bos: Path, attn: str, causal: bool, bos: bool, documents: int
) -> None:
    model = GritLM(checkpoint if bos else checkpoint_without_bos, device="cpu", dtype="float32", attn=attn)
    sample = sample_of(model, documents=documents, causal=causal)
    assert sample.documents is not None and sample.documents.hidden == bos
    given = [Document(f"d{n}", text) for n, text in enumerate(DOCUMENTS[:documents])]
    states, prompt, _, read = RAG(model, causal_states=causal).prepare(QUESTION, given, "document_cache")
    before = sum(sample.documents.lengths)
    assert states is not None and read == before and len(states) == before - bos * (documents - 1)
    assert sample.input_ids[before:][: len(prompt)] == prompt
    reply = sample.input_ids[before + len(prompt) :]
    forced = Forced(reply)
    decode(model.model, [prompt], states=[states], max_new_tokens=len(reply), eos_token_ids=[], sampling=forced)
    chunk = build_chunk([], [sample], attention=model.attention)
    head: Any = model.model.get_output_embeddings()
    trained = head(model.hidden_states(chunk.input_ids, chunk.pack))[before + len(prompt) - 1 : -1]
    torch.testing.assert_close(trained, torch.stack(forced.seen), rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]
    assert len(reply) > 4 and chunk.labels.tolist()[before + len(prompt) - 1 : -1] == reply
    assert set(chunk.labels.tolist()[: before + 1]) == {IGNORE_INDEX}


def dense_losses(model: Any, sample: EncodedSample) -> Tensor:
    """Summed token losses of one sample by transformers' own attention, with the mask written token by token."""
    read = sample.documents
    assert read is not None
    blocks = [(n, place) for place, length in enumerate(read.lengths) for n in [place] * length]
    block = torch.tensor([place for place, _ in blocks] + [len(read.lengths)] * (len(sample) - len(blocks)))
    first = torch.cat([torch.ones(1, dtype=torch.bool), block[1:] != block[:-1]])
    hidden = first & (block > 0) & (block < len(read.lengths)) if read.hidden else torch.zeros_like(first)
    visible = (~hidden).cumsum(0) - 1  # a hidden token has the position of the token before it
    tokens = torch.arange(len(sample))
    reply = block == len(read.lengths)
    own = (block[:, None] == block[None]) & ((tokens[:, None] >= tokens[None]) | ~reply[:, None])
    near = (visible[:, None] - visible[None]).abs()
    window = model.config.sliding_window
    # within a document a hidden token is one more
    near = torch.where(~reply[:, None] & own, (tokens[:, None] - tokens[None]).abs(), near)
    seen = own | (reply[:, None] & ~reply[None] & ~hidden[None])
    seen &= torch.where(reply[:, None], near < window, near <= window)
    mask = torch.where(seen, 0.0, -1e30).double()[None, None]
    logits = model(torch.tensor([sample.input_ids]), attention_mask=mask, position_ids=visible[None]).logits[0]
    return nn.functional.cross_entropy(logits, torch.tensor(sample.labels), reduction="sum")


def test_gradients_are_those_of_a_dense_mask(checkpoint: Path) -> None:
    """The window of 64 is shorter than documents and reply together, so it cuts both."""
    from transformers import AutoModelForCausalLM

    model = GritLM(checkpoint, device="cpu", dtype="float64", attn="bbcc", is_inference=False)
    gk.patch(model.model, fuse=False)  # norms as in transformers, which computes them in float32
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="sdpa")
    samples = [sample_of(model), sample_of(model, documents=2, reply="Lyon."), sample_of(model, documents=1)]
    assert len(samples[0]) > 100 and samples[0].documents is not None and samples[0].documents.hidden
    chunk = build_chunk([], samples, attention=model.attention)
    head: Any = model.model.get_output_embeddings()
    with gk.backend("reference"):
        logits = head(model.hidden_states(chunk.input_ids, chunk.pack))
    losses = nn.functional.cross_entropy(logits, chunk.labels, reduction="none", ignore_index=IGNORE_INDEX)
    sums = sums_per_sample(losses, chunk.generative_cu_seqlens)
    wanted = torch.stack([dense_losses(stock, sample) for sample in samples])
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses.sum(), wanted.sum(), rtol=1e-10, atol=1e-10)
    with gk.backend("reference"):
        losses.sum().backward()
    wanted.sum().backward()
    for (name, got), want in zip(model.model.named_parameters(), stock.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None and float(want.grad.abs().max()) > 0, name
        scale = float(want.grad.abs().max())
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-8, atol=1e-10 * scale, msg=name)


def test_conversations_of_a_chunk_do_not_depend_on_each_other(checkpoint: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32", attn="bbcc")
    plain = model.formatter.conversation([QUESTION, REPLY], 512)
    samples = [sample_of(model), plain, sample_of(model, documents=1, reply="Lyon.")]
    text = model.formatter.text("<|embed|>\n", DOCUMENTS[0], 512)

    def losses(texts: list[EncodedSample], talks: list[EncodedSample]) -> list[float]:
        chunk = build_chunk(texts, talks, attention=model.attention)
        hidden = model.hidden_states(chunk.input_ids, chunk.pack)[chunk.embedding_tokens :]
        return sums_per_sample(next_token_losses(model, hidden, chunk.labels), chunk.generative_cu_seqlens).tolist()

    together = losses([text], samples)
    assert together == pytest.approx([losses([], [sample])[0] for sample in samples], rel=1e-4)
    rows = [GenerativeRow((user_turn("document_cache", QUESTION, []), REPLY), documents=tuple(DOCUMENTS))]
    ((total, count),) = conversation_losses(model, rows, max_length=512)
    assert total == pytest.approx(together[0], rel=1e-4) and count == sum(
        x != IGNORE_INDEX for x in samples[0].labels or []
    )
    read = samples[0].documents
    assert read is not None
    pairs = _visible_pairs(build_chunk([], samples[:1], attention=model.attention).pack)
    reply = len(samples[0]) - sum(read.lengths)
    context = sum(read.lengths) - 2 * read.hidden
    assert pairs == sum(n * n for n in read.lengths) + reply * (reply + 1) // 2 + reply * context


def test_documents_need_one_flag_per_text_and_room(checkpoint: Path) -> None:
    for attn in ("bbbc", "bbil", "cbcc"):
        with pytest.raises(ValueError, match=f"documents: expected a model that reads them .* got {attn}"):
            sample_of(GritLM(checkpoint, device="cpu", attn=attn))
    model = GritLM(checkpoint, device="cpu", attn="bbcc")
    whole = sample_of(model)
    assert whole.documents is not None
    talk = len(whole) - sum(whole.documents.lengths)
    for length in range(1, len(whole)):
        try:
            cut = sample_of(model, length=length)
        except TooLong as error:
            want = f"max_length: expected room for 3 documents, the first user turn and a reply, got {length}"
            assert str(error) == want and length < len(whole) - 4
        else:
            assert len(cut) == length > len(whole) - talk and cut.truncated and cut.documents == whole.documents
    with pytest.raises(ValueError, match="turns: expected an even number"):
        model.formatter.conversation(["a text without roles"], 512, documents=DOCUMENTS)


def test_a_share_of_the_rows_reads_its_documents_causally(checkpoint: Path, tokenizer: Any) -> None:
    rows = [GenerativeRow((f"question {n}", "reply"), documents=("a text",)) for n in range(60)]
    found = {}
    for share in (0.0, 0.5, 1.0):
        encoder = RowEncoder(tokenizer, config_of(causal_documents=share).data, GritSettings(attn="bbcc"))
        samples = [encoder.conversation(row) for row in rows]
        found[share] = [s.documents is not None and s.documents.causal for s in samples]
        assert [encoder.conversation(row) for row in rows] == samples
    assert sum(found[0.0]) == 0 and sum(found[1.0]) == 60 and 18 < sum(found[0.5]) < 42
    model = GritLM(checkpoint, device="cpu", dtype="float32", attn="bbcc")
    both = [sample_of(model), sample_of(model, causal=True)]
    packs = [build_chunk([], part, attention=model.attention).pack for part in (both, both[:1], both[1:])]
    assert packs[0].causal.tolist() == [False] * 3 + [True] * 5
    assert _visible_pairs(packs[0]) == _visible_pairs(packs[1]) + _visible_pairs(packs[2])


def test_a_run_learns_to_reply_after_cached_documents(checkpoint: Path, tmp_path: Path) -> None:
    """The documents alone tell what the answer is: a model that does not see them cannot do better than to guess."""
    folder, start = tmp_path / "data", tmp_path / "start"
    folder.mkdir()
    shutil.copytree(checkpoint, start)
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    turn = user_turn("document_cache", "Where?", [], marked=False)
    places = ["Paris", "Lyon", "city", "river"]
    rows: list[dict[str, Any]]
    rows = [{"documents": [f"It is {place}."], "text": [turn, f"The answer is {place}"]} for place in places]
    (folder / "cached.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"mode": "generative", "train_data": str(folder), "generative_batch_size": 4, "steps": 150, "lr": 5e-3}
    trainer = Trainer.from_config(
        toy_config(start, tmp_path / "run", **changes, generative_max_len=256), Ranks(0, 1, torch.device("cpu"))
    )
    records = trainer.train()
    samples = [trainer.grit.formatter.conversation(row["text"], 256, documents=row["documents"]) for row in rows]
    labels = [sum(label != IGNORE_INDEX for label in sample.labels or []) for sample in samples]
    guessing = math.log(len(places)) / max(labels)  # nats per token of a reply
    assert records[0]["generative_loss"] > 1 and records[-1]["generative_loss"] < guessing / 4
    rag = RAG(trainer.grit, marked=False)
    assert [rag.answer("Where?", [f"It is {place}."], mode="document_cache").text for place in places] == places


def test_what_ends_a_text_to_embed_does_not_end_a_document(checkpoint: Path) -> None:
    plain, ended = (GritLM(checkpoint, device="cpu", attn="bbcc", embed_eos=eos) for eos in ("", "</e>"))
    assert sample_of(ended).input_ids == sample_of(plain).input_ids
