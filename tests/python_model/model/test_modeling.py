"""GritLM equals what transformers computes by hand, whatever the batch around a text."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grit_kernels as gk
from python_model import GritLM
from python_model.model import modeling
from python_model.model.prompts import EMBED, embed_instruction, encode_text
from python_model.settings import GritSettings

TEXTS = ["A river flows.", "def add(first, second):", "x", "The capital of France is a city with a river in it. " * 4]
INSTRUCTION = embed_instruction("Find the text")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, device="cpu", dtype="float32")


def _by_hand(checkpoint: Path, texts: list[str], prefix: str, method: str, causal: bool, normalize: bool) -> np.ndarray:
    """One text at a time through unpatched transformers."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    decoder = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rows = []
    for text in texts:
        sample = encode_text(tokenizer, prefix, text, 512)
        with torch.no_grad():
            states = decoder(torch.tensor([sample.input_ids]), is_causal=causal).last_hidden_state[0].double()
        pooled = states[sample.instruction_len :]
        weights = torch.arange(1, len(pooled) + 1, dtype=torch.float64)
        row = {
            "mean": pooled.mean(dim=0),
            "weightedmean": (weights[:, None] * pooled).sum(dim=0) / weights.sum(),
            "lasttoken": pooled[-1],
            "cls": states[0],
        }[method]
        rows.append(row / row.norm() if normalize else row)
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("method", ["mean", "weightedmean", "lasttoken", "cls"])
@pytest.mark.parametrize("attn", ["bbcc", "cccc"])
def test_encode_equals_transformers_text_by_text(checkpoint: Path, method: str, attn: str) -> None:
    model = GritLM(checkpoint, pooling_method=method, attn=attn, normalized=False, device="cpu", dtype="float32")
    for prefix in (EMBED, INSTRUCTION):
        got = model.encode(TEXTS, instruction=prefix)
        want = _by_hand(checkpoint, TEXTS, prefix, method, attn == "cccc", False)
        assert got.dtype == np.float32 and got.shape == want.shape
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_the_batch_around_a_text_does_not_change_its_embedding(model: GritLM) -> None:
    together = model.encode(TEXTS, instruction=INSTRUCTION)
    for batch_size in (1, 2):
        np.testing.assert_allclose(
            model.encode(TEXTS, batch_size=batch_size, instruction=INSTRUCTION), together, atol=2e-6
        )
    alone = model.encode(TEXTS[1], instruction=INSTRUCTION)
    assert alone.shape == together[1].shape
    np.testing.assert_allclose(alone, together[1], atol=2e-6)
    np.testing.assert_allclose(model.encode(TEXTS[::-1], instruction=INSTRUCTION)[::-1], together, atol=2e-6)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 5))
def test_a_pass_holds_as_many_texts_as_its_limits_allow_longest_first(lengths: list[int], batch_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "TOKENS_PER_PACK", 50)
        batches = modeling.token_batches(lengths, batch_size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    sizes = [sum(lengths[index] for index in batch) for batch in batches]
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert all(size <= 50 or len(batch) == 1 for batch, size in zip(batches, sizes, strict=True))
    for batch, size, following in zip(batches, sizes, batches[1:], strict=False):
        assert len(batch) == batch_size or size + lengths[following[0]] > 50, "the next text would have fitted"


def test_a_text_is_read_up_to_512_tokens_and_counted_when_cut(checkpoint: Path) -> None:
    model = GritLM(checkpoint, mode="embedding", device="cpu", dtype="float32")
    text = "A river flows. " * 150
    want = _by_hand(checkpoint, [text], EMBED, "mean", False, True)
    np.testing.assert_allclose(model.encode([text], instruction=EMBED), want, atol=2e-6)
    assert model.max_length == 512 and model.texts_cut == 1


def test_an_embedding_may_be_rounded_to_the_dtype_of_the_model(checkpoint: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="bfloat16")
    fine, rounded = (model.encode(TEXTS, convert_to_tensor=True, **options) for options in ({}, {"recast": True}))
    assert fine.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert torch.equal(fine.bfloat16(), rounded) and not torch.equal(rounded.float(), fine)
    assert model.encode(TEXTS, recast=True).dtype == np.float32


def test_a_bar_is_shown_for_several_passes_unless_told_otherwise(
    model: GritLM, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, shown in (
        ({}, False),
        ({"batch_size": 1}, True),
        ({"batch_size": 1, "show_progress_bar": False}, False),
        ({"show_progress_bar": True}, True),
    ):
        model.encode(TEXTS, **options)  # type: ignore[arg-type]
        assert ("text" in capsys.readouterr().err) == shown, options


def test_normalized_embeddings_have_unit_norm(model: GritLM) -> None:
    norms = np.linalg.norm(model.encode(TEXTS), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)


def test_embed_instruction_pools_the_whole_text(model: GritLM) -> None:
    skipped = model.encode(TEXTS, instruction=INSTRUCTION)
    pooled = model.encode(TEXTS, instruction=INSTRUCTION, embed_instruction=True)
    assert np.abs(skipped - pooled).max() > 1e-3


def test_causal_instruction_attention_equals_a_dense_mask(checkpoint: Path) -> None:
    from transformers import AutoModel

    model = GritLM(checkpoint, attn="cbcc", normalized=False, device="cpu", dtype="float32")
    sample = encode_text(model.tokenizer, INSTRUCTION, TEXTS[0], 512)
    length, skip = len(sample), sample.instruction_len
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = (column <= row) | (row >= skip)
    decoder = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        states = decoder(torch.tensor([sample.input_ids]), attention_mask=visible[None, None]).last_hidden_state[0]
    want = states[skip:].double().mean(dim=0).numpy()
    got = model.encode(TEXTS[0], instruction=INSTRUCTION)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_generate_equals_transformers(checkpoint: Path, model: GritLM) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_cache_of_encode_continues_like_one_forward(checkpoint: Path, model: GritLM) -> None:
    from transformers import AutoModelForCausalLM

    texts = TEXTS[:3]
    vectors, cache = model.encode(texts, instruction=EMBED, get_cache=True)
    np.testing.assert_allclose(vectors, model.encode(texts, instruction=EMBED), atol=2e-6)
    samples = [encode_text(model.tokenizer, EMBED, t, 512) for t in texts]
    assert cache.seqlens.tolist() == [len(s) for s in samples]
    # a causal continuation of the bidirectional states, against one dense mask in unpatched transformers
    vector, cache = model.encode(texts[1], instruction=EMBED, get_cache=True)
    document, tail = samples[1].input_ids, [7, 8, 9, 10]
    with torch.no_grad():
        got = model.model(torch.tensor([tail]), use_cache=True, **gk.hf.cache_keyword(model.model, cache)).logits[0]
    length = len(document) + len(tail)
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = (column <= row) | ((row < len(document)) & (column < len(document)))
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        want = plain(torch.tensor([document + tail]), attention_mask=visible[None, None]).logits[0, -len(tail) :]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:projection")
def test_save_and_load_keep_weights_settings_and_projection(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = GritLM(
        checkpoint,
        pooling_method="weightedmean",
        normalized=False,
        attn="cccc",
        projection=16,
        device="cpu",
        dtype="float32",
    )
    model.save_pretrained(tmp_path / "saved")
    again = GritLM(tmp_path / "saved", device="cpu", dtype="float32")
    assert (again.pooling_method, again.normalized, again.attn) == ("weightedmean", False, "cccc")
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    assert again.encode(TEXTS).shape == (len(TEXTS), 16)
    settings = json.loads((tmp_path / "saved" / "grit.json").read_text())
    assert settings["projection"] == 16


def test_a_window_convention_survives_saving(model: GritLM, tmp_path: Path) -> None:
    """A checkpoint that asks for full attention beyond the window, as the published models' sdpa path, goes on asking for it."""
    model.save_pretrained(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "grit.json").read_text())
    (tmp_path / "a" / "grit.json").write_text(json.dumps({**settings, "bidirectional_window": "full"}))
    full = GritLM(tmp_path / "a", device="cpu", dtype="float32")
    full.save_pretrained(tmp_path / "b")
    again = GritLM(tmp_path / "b", device="cpu", dtype="float32")
    longer = TEXTS[3]  # than the window
    np.testing.assert_array_equal(again.encode(longer), full.encode(longer))
    assert np.abs(again.encode(longer) - model.encode(longer)).max() > 1e-4


def test_saved_checkpoint_loads_in_plain_transformers(model: GritLM, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.model.state_dict()[name]), name


def test_tokenizer_and_settings_come_from_where_the_weights_do(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="projection: there is no .*so the embedding head is initialised at random"):
        model = GritLM(checkpoint, attn="cccc", projection=8, device="cpu", dtype="float32")
    model.save_pretrained(tmp_path / "step-2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = GritLM(tmp_path, subfolder="step-2", device="cpu", dtype="float32")
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))


def test_a_checkpoint_of_before_settings_had_a_version_embeds_as_it_was_trained(
    checkpoint_without_bos: Path, tmp_path: Path
) -> None:
    """Every text began with BOS then, whatever the tokenizer says; saved again, it stays so and says so."""
    folder = tmp_path / "old"
    shutil.copytree(checkpoint_without_bos, folder)
    written = {
        "pooling_method": "mean",
        "normalized": True,
        "attn": "bbcc",
        "embed_eos": "",
        "instruction_count": "offsets",
        "bidirectional_window": "transformers",
        "projection": None,
    }
    (folder / "grit.json").write_text(json.dumps(written, indent=2) + "\n")
    old = GritLM(folder, device="cpu", dtype="float32")
    bos = old.tokenizer.bos_token_id
    assert old.formatter.text(EMBED, "x", 64).input_ids[0] == old.formatter.prompt("x")[0] == bos
    new = GritLM(checkpoint_without_bos, device="cpu", dtype="float32")
    assert new.formatter.text(EMBED, "x", 64).input_ids == old.formatter.text(EMBED, "x", 64).input_ids[1:]
    assert np.abs(old.encode(TEXTS) - new.encode(TEXTS)).max() > 1e-3
    old.save_pretrained(tmp_path / "again")
    again = GritLM(tmp_path / "again", device="cpu", dtype="float32")
    np.testing.assert_array_equal(again.encode(TEXTS), old.encode(TEXTS))
    assert json.loads((tmp_path / "again" / "grit.json").read_text())["special_tokens"] == "bos"


def hub_cache(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """A cache of the hub that holds the checkpoint as someone/model, and the arguments that load from it alone."""
    snapshot = folder / "models--someone--model" / "snapshots" / "0123456789abcdef"
    shutil.copytree(checkpoint, snapshot)
    (folder / "models--someone--model" / "refs").mkdir()
    (folder / "models--someone--model" / "refs" / "main").write_text(snapshot.name)
    return {"cache_dir": str(folder), "local_files_only": True, "device": "cpu", "dtype": "float32"}


@pytest.mark.filterwarnings("ignore:projection")
def test_settings_and_head_of_a_hub_checkpoint_are_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers looks for an adapter's config on the hub whatever local_files_only says, for half a minute without network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.manual_seed(1)
    model = GritLM(checkpoint, pooling_method="lasttoken", attn="cccc", projection=8, device="cpu", dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    hub = GritLM("someone/model", **hub_cache(tmp_path / "saved", tmp_path / "hub"))
    assert hub.settings == model.settings
    np.testing.assert_array_equal(hub.encode(TEXTS), model.encode(TEXTS))
    bare = GritLM("someone/model", **hub_cache(checkpoint, tmp_path / "other"))
    assert bare.settings == GritSettings()


def test_a_head_that_the_settings_do_not_name_is_no_silent_loss(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with_head = GritLM(checkpoint, device="cpu", projection=8, is_inference=False)
    with_head.save_pretrained(folder)
    vector = GritLM(folder, device="cpu").encode("river")
    (folder / "grit.json").unlink()
    with pytest.raises(ValueError, match=r"^projection: expected the size of the head in embedding_head.safetensors"):
        GritLM(folder, device="cpu")
    np.testing.assert_array_equal(GritLM(folder, device="cpu", projection=8).encode("river"), vector)
    # a model without one replaces it
    GritLM(checkpoint, device="cpu").save_pretrained(folder)
    assert GritLM(folder, device="cpu").encode("river").shape == (64,)


@pytest.mark.filterwarnings("ignore:projection")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_wraps_the_embedding_head_counts(checkpoint: Path, dtype: torch.dtype) -> None:
    """A low-rank adapter and a hook change the vector as they change the layer, and both get gradients."""
    torch.manual_seed(1)
    model = GritLM(checkpoint, projection=8, normalized=False, is_inference=False, device="cpu", dtype=dtype)
    head: Any = model.projection
    text = [TEXTS[3]]
    before = model.encode(text, convert_to_tensor=True).detach()

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.low = head, torch.nn.Linear(64, 8, bias=False, dtype=dtype)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.base(rows) + self.low(rows)

    model.projection = Adapted()
    pooled = []
    model.projection.register_forward_hook(lambda module, rows, out: pooled.append(rows[0]) or out + 1)
    got = model.encode(text, convert_to_tensor=True)
    weight = model.projection.low.weight
    torch.testing.assert_close(got, before + pooled[0] @ weight.float().T + 1, atol=1e-5, rtol=1e-5)
    got.square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model.projection.parameters())  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="projection: expected an nn.Linear to save, got Adapted"):
        model.save_pretrained(checkpoint.parent / "never")
    assert not (checkpoint.parent / "never").exists()


def test_embedding_mode_has_no_head(checkpoint: Path) -> None:
    model = GritLM(checkpoint, mode="embedding", device="cpu", dtype="float32")
    assert model.encode("text").shape == (64,)
    with pytest.raises(ValueError, match="mode: expected 'unified' or 'generative' to generate, got 'embedding'"):
        model.generate(torch.ones(1, 1, dtype=torch.int64))


def test_errors_name_the_argument(checkpoint: Path, model: GritLM) -> None:
    with pytest.raises(ValueError, match="sentences: entry 1: text: expected .* got ''"):
        model.encode(["fine", ""])
    with pytest.raises(ValueError, match="sentences: expected .* got an empty list"):
        model.encode([])
    with pytest.raises(TypeError, match="sentences: entry 0: expected a str, got int"):
        model.encode([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="max_length: expected .* got 8"):
        model.encode("text", instruction=INSTRUCTION, max_length=8)
    with pytest.raises(ValueError, match="batch_size: expected .* got 0"):
        model.encode("text", batch_size=0)
    with pytest.raises(ValueError, match="get_cache: expected one batch, got 4 texts in 2 batches"):
        model.encode(TEXTS, batch_size=2, get_cache=True)
    split = GritLM(checkpoint, attn="cbcc", device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="embed_instruction: expected False with attn 'cbcc'.*got True"):
        split.encode("text", embed_instruction=True)
    with pytest.raises(ValueError, match="get_cache: expected attn 'bb' or 'cc', got 'cb'"):
        split.encode("text", instruction=INSTRUCTION, get_cache=True)
    with pytest.raises(ValueError, match="attn: expected .* got 'bxcc'"):
        GritLM(checkpoint, attn="bxcc")
    with pytest.raises(ValueError, match="pooling_method: expected .* got 'max'"):
        GritLM(checkpoint, pooling_method="max")
    with pytest.raises(FileNotFoundError, match="no folder"):
        GritLM("./no/such/folder")


def test_corpus_without_a_title_has_no_leading_space(model: GritLM) -> None:
    got = model.encode_corpus([{"title": "", "text": "A river flows."}, {"title": "A", "text": "river flows."}])
    np.testing.assert_allclose(got[0], got[1], atol=2e-6)
    np.testing.assert_allclose(model.encode_corpus("A river flows."), got[0], atol=2e-6)  # one text, not its letters


def test_several_devices_give_the_same_embeddings(model: GritLM) -> None:
    alone = model.encode(TEXTS, batch_size=1, instruction=INSTRUCTION)
    shared = model.encode(TEXTS, batch_size=1, instruction=INSTRUCTION, devices=["cpu", "cpu", "cpu"])
    np.testing.assert_array_equal(shared, alone)
    with pytest.raises(ValueError, match="devices: expected .* got an empty list"):
        model.encode(TEXTS, devices=[])


def test_an_error_on_one_device_reaches_the_caller(model: GritLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(GritLM, "hidden_states", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.encode(TEXTS, batch_size=1, devices=["cpu", "cpu"])


def test_the_reference_count_skips_as_many_tokens_as_the_instruction_has_alone(checkpoint: Path) -> None:
    model = GritLM(checkpoint, instruction_count="reference", normalized=False, device="cpu", dtype="float32")
    default = GritLM(checkpoint, normalized=False, device="cpu", dtype="float32")
    text = "  Leading spaces"  # they merge with the newline that ends the instruction
    ours, theirs = (
        encode_text(model.tokenizer, INSTRUCTION, text, 512, instruction_count=count)
        for count in ("offsets", "reference")
    )
    assert (ours.instruction_len != theirs.instruction_len) == bool(
        np.abs(default.encode(text, instruction=INSTRUCTION) - model.encode(text, instruction=INSTRUCTION)).max() > 1e-6
    )
    with pytest.raises(ValueError, match="instruction_count: expected .* got 'guess'"):
        GritLM(checkpoint, instruction_count="guess")  # type: ignore[arg-type]


@pytest.mark.parametrize("normalized", [True, False])
def test_a_call_may_cut_embeddings(checkpoint: Path, normalized: bool) -> None:
    """It gives what a model with that setting gives; neither may ask for more numbers than there are."""
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "normalized": normalized}
    model, cut = GritLM(checkpoint, **options), GritLM(checkpoint, truncate_dim=24, **options)
    texts = ["a river", "flows through the city"]
    whole = model.encode(texts)[:, :24]
    whole = whole / np.linalg.norm(whole, axis=1, keepdims=True) if normalized else whole
    for found in (model.encode(texts, truncate_dim=24), cut.encode(texts), cut.encode(texts, truncate_dim=24)):
        np.testing.assert_allclose(found, whole, atol=1e-6)
    assert (model.embedding_size, cut.embedding_size) == (64, 24)
    np.testing.assert_allclose(model.encode(texts[0], truncate_dim=24), whole[0], atol=1e-6)
    for wrong in (0, 25):
        with pytest.raises(ValueError, match=f"truncate_dim: expected 1 to 24, got {wrong}"):
            cut.encode(texts, truncate_dim=wrong)
    with pytest.raises(ValueError, match="truncate_dim: expected at most the embedding's 64, got 65"):
        GritLM(checkpoint, truncate_dim=65, **options)


def test_a_caller_that_wants_no_gradients_gets_none(checkpoint: Path) -> None:
    """Also of a model in training: with a graph each, the embeddings of a corpus would keep every activation."""
    model = GritLM(checkpoint, is_inference=False, device="cpu", dtype="float32")
    assert model.encode(TEXTS, convert_to_tensor=True).requires_grad
    states = []
    model.decoder[0].register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    with torch.no_grad():
        assert not model.encode(TEXTS, convert_to_tensor=True).requires_grad
        model.encode(TEXTS, get_cache=True)
    assert len(states) == 2 and not any(hidden.requires_grad for hidden in states)  # no graph behind the result either
