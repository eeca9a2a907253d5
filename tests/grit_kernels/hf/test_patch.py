"""patch(model) on a tiny Mistral: equal to unpatched transformers where it can do the same, else to separate runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import grit_kernels as gk
from tests.grit_kernels.tiny_mistral import FLAGS, IDS, MASKS, WINDOW, close, positions, tiny_model

WITHOUT_HOLES = [name for name in MASKS if name != "holes"]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mask_name", WITHOUT_HOLES)
@torch.no_grad()
def test_one_flag_for_all_equals_the_unpatched_model(stock: Any, model: Any, mask_name: str, is_causal: bool) -> None:
    mask = MASKS[mask_name]
    real = mask.bool()
    for arguments in ({"attention_mask": mask}, {"attention_mask": mask, "position_ids": positions(mask)}):
        expected = stock(IDS, **arguments, is_causal=is_causal).logits
        close(model(IDS, **arguments, is_causal=is_causal).logits[real], expected[real])
        # the same with a cache, which keeps the padded layout
        close(model(IDS, **arguments, is_causal=is_causal, use_cache=True).logits[real], expected[real])


@pytest.mark.parametrize("mask_name", WITHOUT_HOLES)
@pytest.mark.parametrize("caching", [False, True])
@torch.no_grad()
def test_flags_per_sample_equal_separate_runs(stock: Any, model: Any, mask_name: str, caching: bool) -> None:
    mask = MASKS[mask_name]
    real = mask.bool()
    causal, bidirectional = (stock(IDS, attention_mask=mask, is_causal=flag).logits for flag in (True, False))
    expected = torch.where(FLAGS[:, None, None], causal, bidirectional)
    mixed = model(IDS, attention_mask=mask, is_causal=FLAGS, use_cache=caching).logits
    close(mixed[real], expected[real])


@pytest.mark.parametrize("caching", [False, True])
@torch.no_grad()
def test_holes_equal_the_unpatched_model_without_a_window(caching: bool) -> None:
    # with a window they differ: transformers counts slots, patch() counts real tokens
    stock = tiny_model(sliding_window=None)
    model, mask = gk.patch(copy.deepcopy(stock)), MASKS["holes"]
    causal, bidirectional = (stock(IDS, attention_mask=mask, is_causal=flag).logits for flag in (True, False))
    expected = torch.where(FLAGS[:, None, None], causal, bidirectional)
    close(
        model(IDS, attention_mask=mask, is_causal=FLAGS, use_cache=caching).logits[mask.bool()], expected[mask.bool()]
    )


@pytest.mark.parametrize("query_hole", [False, True])
@torch.no_grad()
def test_holes_in_a_cache_equal_the_unpatched_model_without_a_window(query_hole: bool) -> None:
    stock = tiny_model(sliding_window=None)
    model, mask = gk.patch(copy.deepcopy(stock)), MASKS["holes"].clone()
    if query_hole:
        mask[2, 11] = 0
    outputs = []
    for m in (stock, model):
        cache = transformers.DynamicCache()
        m(IDS[:, :9], attention_mask=mask[:, :9], is_causal=False, use_cache=True, **gk.hf.cache_keyword(m, cache))
        outputs.append(m(IDS[:, 9:], attention_mask=mask, use_cache=True, **gk.hf.cache_keyword(m, cache)).logits)
    real = mask[:, 9:].bool()
    close(outputs[0][real], outputs[1][real])


@torch.no_grad()
def test_samples_do_not_see_each_other(model: Any) -> None:
    before = model(IDS, is_causal=FLAGS).logits
    other = IDS.clone()
    other[1] = 3
    after = model(other, is_causal=FLAGS).logits
    keep = [0, 2, 3]
    assert torch.equal(before[keep], after[keep]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize("mask_name", list(MASKS))
@torch.no_grad()
def test_packing_equals_padding(stock: Any, model: Any, mask_name: str) -> None:
    mask = MASKS[mask_name]
    real = mask.bool()
    padded = gk.patch(copy.deepcopy(stock), packing=False)
    a = model.model(IDS, attention_mask=mask, is_causal=FLAGS, output_hidden_states=True)
    b = padded.model(IDS, attention_mask=mask, is_causal=FLAGS, output_hidden_states=True)
    close(a.last_hidden_state[real], b.last_hidden_state[real])
    assert len(a.hidden_states) == len(b.hidden_states) == 3
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert x.shape == y.shape
        close(x[real], y[real])
    assert bool((a.last_hidden_state[~real] == 0).all()), "padded places of the output are 0"


@torch.no_grad()
def test_packed_input_equals_padded_input(model: Any) -> None:
    mask = MASKS["right"]
    pack = gk.SamplePack.from_mask(mask, FLAGS)
    expected = model(IDS, attention_mask=mask, is_causal=FLAGS).logits
    packed_ids = pack.pack(IDS)[None]
    by_pack = model(packed_ids, sample_pack=pack).logits
    close(pack.unpack(by_pack[0])[mask.bool()], expected[mask.bool()])
    transformers_style = {
        "cu_seq_lens_q": pack.cu_seqlens,
        "cu_seq_lens_k": pack.cu_seqlens,
        "max_length_q": pack.max_seqlen,
        "max_length_k": pack.max_seqlen,
    }
    assert torch.equal(model(packed_ids, is_causal=FLAGS, **transformers_style).logits, by_pack)
    all_causal = model(packed_ids, **transformers_style).logits
    close(pack.unpack(all_causal[0])[mask.bool()], model(IDS, attention_mask=mask).logits[mask.bool()])


@torch.no_grad()
def test_a_sample_pack_may_carry_upper_bounds(model: Any) -> None:
    cu = torch.tensor([0, 8], dtype=torch.int32)
    whole, none = (gk.prefix_lm_hi(cu, torch.tensor([n]), 8) for n in (8, 0))
    ids = IDS[:1, :8]
    for hi, flag in ((whole, False), (none, True)):
        pack = gk.SamplePack.from_lengths([8], True, hi=hi)
        unlimited = gk.patch(tiny_model(sliding_window=None))
        close(unlimited(ids, sample_pack=pack).logits, unlimited(ids, is_causal=flag).logits)


@torch.no_grad()
def test_upper_bounds_count_from_the_first_token_whatever_its_position(model: Any) -> None:
    hi = torch.full((14,), 14, dtype=torch.int32)
    assert hi.shape[0] > 2 * WINDOW
    packs = [gk.SamplePack.from_lengths([14], True, hi=hi, first_positions=[first]) for first in (0, 5)]
    close(*[model(IDS[:1], sample_pack=pack).logits for pack in packs])  # only distances count


@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_the_full_window_convention_removes_the_window_of_bidirectional_samples_only(packing: bool) -> None:
    stock, unlimited = tiny_model(), tiny_model(sliding_window=None)
    model = gk.patch(copy.deepcopy(stock), bidirectional_window="full", packing=packing)
    mixed = model(IDS, is_causal=FLAGS).logits
    close(mixed[FLAGS], stock(IDS).logits[FLAGS])
    close(mixed[~FLAGS], unlimited(IDS, is_causal=False).logits[~FLAGS])
    assert not torch.allclose(mixed[~FLAGS], stock(IDS, is_causal=False).logits[~FLAGS], atol=1e-3)


@torch.no_grad()
def test_window_conventions_agree_up_to_the_window(stock: Any) -> None:
    ids = IDS[:, :WINDOW]
    outputs = [
        gk.patch(copy.deepcopy(stock), bidirectional_window=convention)(ids, is_causal=FLAGS).logits
        for convention in ("transformers", "full")
    ]
    close(*outputs)


def gradients(model: Any, run: Callable[[Any], Tensor]) -> list[Tensor]:
    model.zero_grad()
    run(model).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", [True, False])
def test_gradients_equal_those_of_separate_runs(stock: Any, checkpointing: bool, packing: bool) -> None:
    mask = MASKS["both"]
    real, flags = mask.bool(), FLAGS
    target = torch.randn(*IDS.shape, 97)

    def separate(m: Any) -> Tensor:
        parts = [
            (m(IDS[rows], attention_mask=mask[rows], is_causal=flag, use_cache=False).logits * target[rows])[real[rows]]
            for flag, rows in ((True, flags), (False, ~flags))
        ]
        return sum(part.sum() for part in parts)  # type: ignore[return-value]

    def mixed(m: Any) -> Tensor:
        return (m(IDS, attention_mask=mask, is_causal=flags, use_cache=False).logits * target)[real].sum()

    model = gk.patch(copy.deepcopy(stock), packing=packing).train()
    if checkpointing:
        gk.hf.checkpoint_activations(model)
    expected = gradients(copy.deepcopy(stock).train(), separate)
    for a, b in zip(gradients(model, mixed), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_labels_and_inputs_embeds_work_as_in_the_unpatched_model(stock: Any, model: Any) -> None:
    mask = MASKS["right"]
    labels = IDS.masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = stock(IDS, attention_mask=mask, labels=labels).loss
        close(model(IDS, attention_mask=mask, labels=labels).loss, expected)
        embeds = stock.get_input_embeddings()(IDS)
        close(model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss, expected)


def test_unpatch_restores_the_exact_model(stock: Any, model: Any) -> None:
    gk.unpatch(model)
    assert not gk.is_patched(model)
    assert model.config._attn_implementation == stock.config._attn_implementation
    assert "forward" not in model.model.__dict__ and "_grit_patch" not in model.model.__dict__
    with torch.no_grad():
        assert torch.equal(
            model(IDS, attention_mask=MASKS["left"]).logits, stock(IDS, attention_mask=MASKS["left"]).logits
        )
    gk.unpatch(model)  # harmless


def test_patching_twice_keeps_the_way_back_and_takes_the_new_options(stock: Any, model: Any) -> None:
    gk.patch(model, bidirectional_window="full", packing=False)
    assert model.model._grit_patch.bidirectional_window == "full"
    gk.unpatch(model)
    assert model.config._attn_implementation == stock.config._attn_implementation


def test_the_context_manager_unpatches_after_an_error(stock: Any) -> None:
    model = copy.deepcopy(stock)
    with pytest.raises(KeyError), gk.patched(model):
        assert gk.is_patched(model)
        raise KeyError("inside")
    assert not gk.is_patched(model)


def test_the_context_manager_gives_a_patched_model_its_options_back(model: Any) -> None:
    gk.patch(model, packing=False, deterministic=False)
    before = gk.hf.patch_options(model)
    with gk.patched(model, bidirectional_window="full"):
        assert gk.hf.patch_options(model) != before
    assert gk.hf.patch_options(model) == before


def test_state_dict_config_and_saved_files_are_unchanged(stock: Any, model: Any, tmp_path: Any) -> None:
    assert list(model.state_dict()) == list(stock.state_dict())
    assert model.config.to_dict() == stock.config.to_dict()
    for name, m in (("stock", stock), ("patched", model)):
        m.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in files:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes(), name


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_patched_and_independent(model: Any, how: str) -> None:
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert gk.is_patched(twin)
    with torch.no_grad():
        expected = model(IDS, is_causal=FLAGS).logits
        assert torch.equal(twin(IDS, is_causal=FLAGS).logits, expected)
        twin.model.embed_tokens.weight.zero_()
        assert torch.equal(model(IDS, is_causal=FLAGS).logits, expected)
        assert not torch.equal(twin(IDS, is_causal=FLAGS).logits, expected)
    gk.unpatch(twin)
    assert gk.is_patched(model)


def test_the_bare_decoder_can_be_patched(stock: Any, model: Any) -> None:
    decoder = gk.patch(copy.deepcopy(stock.model))
    with torch.no_grad():
        expected = model.model(IDS, is_causal=FLAGS).last_hidden_state
        assert torch.equal(decoder(IDS, is_causal=FLAGS).last_hidden_state, expected)


def test_autocast_runs_the_kernels_in_bf16(model: Any) -> None:
    with torch.no_grad():
        exact = model(IDS, is_causal=FLAGS).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(IDS, is_causal=FLAGS).logits
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_forward_hooks_see_padded_outputs_and_packed_layers(model: Any) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    mask = MASKS["right"]
    model.model.register_forward_hook(lambda m, i, out: seen.update(decoder=tuple(out.last_hidden_state.shape)))
    model.model.layers[0].register_forward_hook(lambda m, i, out: seen.update(layer=tuple(out.shape)))
    with torch.no_grad():
        model(IDS, attention_mask=mask)
    assert seen == {"decoder": (4, 14, 64), "layer": (1, int(mask.sum()), 64)}


def test_a_fully_padded_sample_gives_zeros_and_finite_neighbours(model: Any) -> None:
    mask = MASKS["right"].clone()
    mask[2] = 0
    with torch.no_grad():
        for caching in (False, True):
            out = model.model(IDS, attention_mask=mask, is_causal=FLAGS, use_cache=caching).last_hidden_state
            assert bool(out[mask.bool()].isfinite().all())
        assert bool((model.model(IDS, attention_mask=mask).last_hidden_state[2] == 0).all())


# ---- refused


def test_an_unsupported_class_is_refused_with_the_list() -> None:
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
    )
    with pytest.raises(TypeError, match=r"model: expected .*, got BertModel \(model type 'bert'\)"):
        gk.patch(bert)
    with pytest.raises(TypeError, match="model: expected .*got str"):
        gk.patch("mistral")
    with pytest.raises(TypeError, match="model: expected .*got Linear"):
        gk.patch(torch.nn.Linear(2, 2))


def test_attention_dropout_is_refused_and_leaves_the_model_alone() -> None:
    model = tiny_model(attention_dropout=0.1)
    with pytest.raises(ValueError, match="attention_dropout: expected 0, .*got 0.1"):
        gk.patch(model)
    assert not gk.is_patched(model) and model.config._attn_implementation != "grit"


def test_a_config_that_asks_for_attention_weights_is_refused() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="^output_attentions: expected False, .*got True in the model's config"):
        gk.patch(model)
    assert not gk.is_patched(model)


def test_bad_arguments_are_refused_by_name(stock: Any, model: Any) -> None:
    with pytest.raises(ValueError, match="bidirectional_window: expected one of 'transformers', 'full', got 'none'"):
        gk.patch(copy.deepcopy(stock), bidirectional_window="none")
    pack = gk.SamplePack.from_lengths([14], True)
    for arguments, message in (
        ({"is_causal": torch.tensor([True])}, r"is_causal: expected .*got torch.bool \(1,\)"),
        ({"is_causal": torch.tensor([1, 0, 1, 0])}, "is_causal: expected .*got torch.int64"),
        ({"is_causal": "yes"}, "is_causal: expected .*got 'yes'"),
        (
            {"attention_mask": torch.ones(4, 1, 14, 14, dtype=torch.bool)},
            r"attention_mask: expected .*got torch.bool \(4, 1, 14, 14\)",
        ),
        ({"attention_mask": torch.zeros(4, 1, 14, 14)}, r"attention_mask: expected .*got torch.float32"),
        ({"sample_pack": pack}, r"input_ids: expected \(1, 14\) .*got shape \(4, 14\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(IDS, **arguments)
    for arguments, message in (
        ({"is_causal": True}, "is_causal: expected none with a sample_pack"),
        ({"use_cache": True}, "cache, use_cache: expected none or a PackedCache: packed input"),
        (
            {"sample_pack": pack.to("meta")},
            r"sample_pack: expected one on cpu as input_ids, got one on meta; use .*\('cpu'\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(IDS[:1], **{"sample_pack": pack, **arguments})
    with pytest.raises(ValueError, match="input_ids, inputs_embeds"):
        model.model()
