"""Cached states: moved keys equal computed ones, joined caches hold what they should, recomputing is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import grit_kernels as gk
from python_model import GritLM
from python_model.generate.states import TextStates, concatenate, to_cache
from python_model.model.identity import fingerprint
from python_model.rag import rope
from python_model.rag.fingerprint import embedding_settings, former_fingerprint, made_by
from python_model.rag.reading import read, recompute_first
from python_model.rag.selective import recompute_selected

A, B, C = [1, 20, 30, 40, 50], [1, 60, 70, 80, 90, 100, 110], [1, 7, 8, 9]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GritLM:
    return GritLM(checkpoint, device="cpu", dtype="float32")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("causal", [True, False])
def test_texts_read_together_have_the_states_they_have_alone(model: GritLM, causal: bool) -> None:
    together = read(model, [A, B, C], causal=causal)
    for ids, states in zip((A, B, C), together, strict=True):
        (alone,) = read(model, [ids], causal=causal)
        assert states.input_ids.tolist() == ids and states.positions.tolist() == list(range(len(ids)))
        assert relative(states.keys_values, alone.keys_values) < 1e-6 and states.causal is causal
    bidirectional = read(model, [A], causal=not causal)[0]
    assert relative(together[0].keys_values, bidirectional.keys_values) > 1e-2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("start", [1, 64, 4000])
def test_moved_keys_equal_keys_computed_there(model: GritLM, causal: bool, start: int) -> None:
    (near,) = read(model, [B], causal=causal)
    (far,) = read(model, [B], causal=causal, start=start)
    moved = rope.move(near, far.positions, model)
    assert relative(moved.keys_values, far.keys_values) < 3e-5
    assert relative(near.keys_values[:, 0], far.keys_values[:, 0]) > 1e-2
    back = rope.move(moved, near.positions, model)
    assert relative(back.keys_values, near.keys_values) < 1e-6
    assert rope.move(near, near.positions, model) is near


def test_bfloat16_keys_are_rounded_once_whatever_the_distance(model: GritLM) -> None:
    keys = torch.randn(3, 50, 32).bfloat16()
    radians = rope.frequencies(model)
    for distance in (1, 1000, 100000):
        steps = torch.full((50,), distance)
        exact = rope.rotate(keys.float(), steps, radians)
        got = rope.rotate(keys, steps, radians)
        assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())


def test_rotation_leaves_channels_beyond_the_rotary_part_alone() -> None:
    keys = torch.randn(2, 5, 16)
    got = rope.rotate(keys, torch.arange(5), torch.tensor([1.0, 0.1], dtype=torch.float64))
    assert torch.equal(got[..., 4:], keys[..., 4:]) and torch.equal(got[:, 0], keys[:, 0])
    assert (got[..., :4] - keys[..., :4])[:, 1:].abs().min() > 0


def test_a_join_places_texts_one_behind_the_other_with_one_bos(model: GritLM) -> None:
    parts = read(model, [A, B, C], causal=False)
    joined, starts = rope.join(parts, model)
    assert joined.input_ids.tolist() == A + B[1:] + C[1:] and starts == [0, len(A), len(A) + len(B) - 1]
    assert joined.positions.tolist() == list(range(len(joined)))
    # positions count BOS as the text's first token, so the text behind it is moved by one less
    (far,) = read(model, [B], causal=False, start=len(A) - 1)
    assert relative(joined.slice(len(A), len(A) + len(B) - 1).keys_values, far.slice(1).keys_values) < 1e-5


def test_recomputing_whole_causal_texts_equals_reading_them_in_one_go(model: GritLM) -> None:
    parts = read(model, [A, B, C], causal=True)
    joined, starts = rope.join(parts, model)
    (whole,) = read(model, [joined.input_ids.tolist()], causal=True)
    assert relative(joined.keys_values, whole.keys_values) > 1e-2
    assert relative(recompute_first(model, joined, starts, 100).keys_values, whole.keys_values) < 1e-5
    some = recompute_first(model, joined, starts, 2)
    assert torch.equal(some.input_ids, joined.input_ids) and torch.equal(some.positions, joined.positions)
    changed = (some.keys_values != joined.keys_values).flatten(0, 2).any(dim=2).any(dim=0).nonzero()[:, 0]
    assert changed.tolist() == [starts[1], starts[1] + 1, starts[2], starts[2] + 1]
    first = some.slice(starts[1], starts[1] + 2)
    assert relative(first.keys_values, whole.slice(starts[1], starts[1] + 2).keys_values) < 1e-5
    assert recompute_first(model, joined, starts, 0) is joined


def test_recomputing_every_token_by_deviation_equals_reading_the_texts_in_one_go(model: GritLM) -> None:
    joined, starts = rope.join(read(model, [A, B, C], causal=True), model)
    (whole,) = read(model, [joined.input_ids.tolist()], causal=True)
    before = joined.keys_values.clone()
    redone = recompute_selected(model, joined, starts, 1.0)
    assert relative(redone.keys_values, whole.keys_values) < 1e-5 < relative(joined.keys_values, whole.keys_values)
    assert torch.equal(joined.keys_values, before)  # the store's states may be shared
    assert recompute_selected(model, joined, starts, 0.0) is joined
    assert recompute_selected(model, joined, starts[:1], 1.0) is joined  # nothing stands before a single text


def test_recomputed_states_are_read_by_the_layers_behind(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint)
    config.num_hidden_layers = 4
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "deep")
    deep = GritLM(tmp_path / "deep", device="cpu", dtype="float32")
    joined, starts = rope.join(read(deep, [A, B, C], causal=True), deep)
    (whole,) = read(deep, [joined.input_ids.tolist()], causal=True)
    redone = recompute_selected(deep, joined, starts, 1.0)
    for layer in range(4):
        assert relative(redone.keys_values[layer], whole.keys_values[layer]) < 1e-5
    assert relative(joined.keys_values[3], whole.keys_values[3]) > 1e-3


@pytest.mark.parametrize("damaged", [6, 11])
def test_the_tokens_that_deviate_most_are_the_ones_recomputed(model: GritLM, damaged: int) -> None:
    ids = A + B[1:] + C[1:]
    (whole,) = read(model, [ids], causal=True)
    starts = [0, len(A), len(A) + len(B) - 1]
    others = len(ids) - starts[1]
    keys_values = whole.keys_values.clone()
    keys_values[1:, :, :, damaged] += 1.0
    keys_values[1:, :, :, damaged - 1] += 0.1
    broken = TextStates(keys_values, whole.input_ids, whole.positions, True)
    one = recompute_selected(model, broken, starts, 1 / others)
    changed = (one.keys_values != keys_values).flatten(0, 2).any(dim=2).any(dim=0).nonzero()[:, 0]
    assert changed.tolist() == [damaged]
    two = recompute_selected(model, broken, starts, 2 / others)
    assert relative(two.keys_values, whole.keys_values) < 1e-5 < relative(one.keys_values, whole.keys_values)


def test_a_share_and_models_that_cannot_be_recomputed_are_refused(model: GritLM) -> None:
    joined, starts = rope.join(read(model, [A, B], causal=True), model)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="recompute_share: expected 0 to 1, got"):
            recompute_selected(model, joined, starts, share)
    long, starts = rope.join(read(model, [A, B * 10], causal=True), model)
    with pytest.raises(ValueError, match="at most the model's window, 64 tokens, got 7"):
        recompute_selected(model, long, starts, 0.5)


def test_a_cache_made_of_states_continues_like_the_text(model: GritLM) -> None:
    (states,) = read(model, [A], causal=True)
    with torch.no_grad():
        got = model.model(torch.tensor([B]), **gk.hf.cache_keyword(model.model, to_cache(states))).logits
        want = model.model(torch.tensor([A + B])).logits[:, len(A) :]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_gate_measures_rounding_and_refuses_a_wrong_rotation(
    model: GritLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rope.check(model) < 1e-5
    half = GritLM(checkpoint, device="cpu", dtype="bfloat16")
    assert 0 < rope.check(half) < 0.0625
    fresh = GritLM(checkpoint, device="cpu", dtype="float32")
    right = rope.frequencies
    monkeypatch.setattr(rope, "frequencies", lambda model: right(model) * 1.01)
    (states,) = read(fresh, [A], causal=True)
    with pytest.raises(ValueError, match="moved keys differ from computed ones by"):
        rope.move(states, states.positions + 3, fresh)


def test_rotary_embeddings_that_change_with_the_length_are_refused(
    model: GritLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.decoder[0].rotary_emb, "rope_type", "dynamic")
    with pytest.raises(ValueError, match="expected rotary embeddings of type 'default'.*got 'dynamic'"):
        rope.frequencies(model)


def test_states_refuse_other_shapes(model: GritLM) -> None:
    (states,) = read(model, [A], causal=True)
    with pytest.raises(ValueError, match="keys_values: expected"):
        TextStates(states.keys_values[0], states.input_ids, states.positions, True)
    with pytest.raises(ValueError, match=r"positions: expected \(5,\).*got \(4,\)"):
        TextStates(states.keys_values, states.input_ids, states.positions[1:], True)
    with pytest.raises(ValueError, match="parts: expected .*got none"):
        concatenate([])
    with pytest.raises(ValueError, match="texts: expected .*got none or an empty one"):
        read(model, [[]], causal=True)


def test_a_fingerprint_tells_models_apart_but_not_dtypes(model: GritLM, checkpoint: Path) -> None:
    half = GritLM(checkpoint, device="cpu", dtype="bfloat16", pooling_method="cls")
    assert fingerprint(half) == fingerprint(model) == fingerprint(GritLM(checkpoint, mode="embedding", device="cpu"))
    assert embedding_settings(half) != embedding_settings(model)
    other: Any = GritLM(checkpoint, device="cpu", dtype="float32")
    with torch.no_grad():
        other.decoder[0].layers[1].mlp.up_proj.weight.mul_(1.01)
    assert fingerprint(other) != fingerprint(model)


def test_a_fingerprint_knows_every_element_and_saved_buffer(checkpoint: Path) -> None:
    """A change that a sample of each weight misses, such as one row of the token embeddings, is another model."""
    other: Any = GritLM(checkpoint, device="cpu", dtype="float32")
    before, sampled = fingerprint(other), former_fingerprint(other)
    with torch.no_grad():
        other.decoder[0].embed_tokens.weight[7, 1] += 0.1
    assert former_fingerprint(other) == sampled
    assert made_by(sampled, other) and not made_by(before, other) and made_by(fingerprint(other), other)
    seen = {changed := fingerprint(other)}
    other.decoder[0].register_buffer("correction", torch.zeros(3), persistent=False)
    assert fingerprint(other) == changed
    for values in (torch.zeros(3), torch.ones(3), torch.tensor([1 << 20]), torch.tensor([(1 << 20) + 1])):
        other.decoder[0].register_buffer("correction", values)
        assert (changed := fingerprint(other)) not in seen  # also packed integers that bfloat16 would round to the same
        seen.add(changed)


def test_a_fingerprint_knows_the_whole_vocabulary(checkpoint: Path) -> None:
    other = GritLM(checkpoint, device="cpu", dtype="float32")
    before, sampled = fingerprint(other), former_fingerprint(other)
    state = json.loads(other.tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    first, second = (token for token in list(vocabulary)[-2:])
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    other.tokenizer._tokenizer = type(other.tokenizer.backend_tokenizer).from_str(json.dumps(state))
    assert former_fingerprint(other) == sampled and fingerprint(other) != before
