"""patch() on a tiny random model of every supported family: the same properties for all of them.

The marker ``feature`` names what a test shows of its family; docs/families.md is the table of it (tools/families_table.py).
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import grit_kernels as gk
from grit_kernels.hf import gptj
from grit_kernels.hf.attention_pass import BIDIRECTIONAL_WINDOWS
from grit_kernels.hf.patch import FAMILIES
from tools import families_table

feature = pytest.mark.feature
WINDOW = 5
COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}
GPT_J = {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 128}
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {**ALTERNATING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**ALTERNATING, "query_pre_attn_scalar": 16},
    "gpt_neox": {},
    "gptj": {**GPT_J, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "head_dim": 32},
}


@functools.cache
def stock(family: str) -> Any:
    """The unpatched model; eager attention, the only stock kind that supports softcaps."""
    torch.manual_seed(0)
    common = {k: v for k, v in COMMON.items() if family != "gptj" or k[-3:] == "_id" or k == "vocab_size"}
    config = transformers.AutoConfig.for_model(family, **{**common, **SPECIAL[family]})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # the default scale of 0.02 would let attention be uniform, and hide wrong masks
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


def patched(family: str, **options: Any) -> Any:
    return gk.patch(copy.deepcopy(stock(family)), **options)


def run_stock(family: str, is_causal: bool, model: Any = None, **arguments: Any) -> Any:
    model = stock(family) if model is None else model
    if family != "gptj":
        return model(**arguments, is_causal=is_causal, use_cache=False)
    model.config.is_causal = is_causal  # GPT-J ignores the argument, but its mask follows the config
    try:
        return model(**arguments, use_cache=False)
    finally:
        del model.config.is_causal


IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
FLAGS = torch.tensor([True, False, False])
RIGHT, LEFT = torch.ones_like(IDS), torch.ones_like(IDS)
RIGHT[0, 9:], RIGHT[1, 4:] = 0, 0
LEFT[1, :5], LEFT[2, :2] = 0, 0
PADDING = pytest.mark.parametrize(
    "mask",
    [
        pytest.param(RIGHT, id="right", marks=feature("right padding")),
        pytest.param(LEFT, id="left", marks=feature("left padding")),
    ],
)
FAMILY = pytest.mark.parametrize("family", FAMILIES)
WINDOWED = [family for family in FAMILIES if "sliding_window" in SPECIAL[family]]


def close(a: Tensor, b: Tensor) -> None:
    # FP32 sums in another order; scaled by the largest logit because Gemma's are of order 10
    assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))


def test_every_supported_family_is_tested() -> None:
    assert set(FAMILIES) == set(SPECIAL)


def test_the_committed_table_lists_exactly_what_is_tested_here() -> None:
    pairs = families_table.declared_pairs(sys.modules[__name__])
    assert families_table.committed_pairs() == pairs, "run `python -m tools.families_table` and commit docs/families.md"


@FAMILY
@PADDING
@feature("causal = unpatched", "bidirectional = unpatched", "mixed rows", "packed = padded")
@torch.no_grad()
def test_causal_bidirectional_and_mixed_equal_the_unpatched_model(family: str, mask: Tensor) -> None:
    real = mask.bool()
    causal, bidirectional = (run_stock(family, f, input_ids=IDS, attention_mask=mask).logits for f in (True, False))
    assert not torch.allclose(causal[real], bidirectional[real], atol=1e-2), "the flag must matter"
    mixed = torch.where(FLAGS[:, None, None], causal, bidirectional)
    packing, padding = patched(family), patched(family, packing=False)
    for flag, expected in ((True, causal), (False, bidirectional), (FLAGS, mixed)):
        for model, options in ((packing, {}), (packing, {"use_cache": True}), (padding, {})):
            found = model(IDS, attention_mask=mask, is_causal=flag, **options).logits
            close(found[real], expected[real])


@FAMILY
@PADDING
@torch.no_grad()
def test_a_text_gives_the_same_alone_and_in_any_batch(family: str, mask: Tensor) -> None:
    """Neighbours of other lengths and flags, the order of the rows, and the layout change nothing but rounding."""
    order = torch.tensor([2, 0, 1])
    for model, options in (
        (patched(family), {}),
        (patched(family), {"use_cache": True}),
        (patched(family, packing=False), {}),
    ):
        together = model(IDS, attention_mask=mask, is_causal=FLAGS, **options).logits
        moved = model(IDS[order], attention_mask=mask[order], is_causal=FLAGS[order], **options).logits
        for row, real in enumerate(mask.bool()):
            alone = model(IDS[row : row + 1, real], is_causal=FLAGS[row : row + 1], **options).logits[0]
            close(together[row, real], alone)
            close(moved[int((order == row).nonzero()), real], alone)


@FAMILY
@feature("packed input")
@torch.no_grad()
def test_packed_input_in_every_form_equals_padded_input(family: str) -> None:
    model, real = patched(family), RIGHT.bool()
    pack = gk.SamplePack.from_mask(RIGHT, FLAGS)
    ids = pack.pack(IDS)[None]
    expected = model(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits[real]
    close(model(ids, sample_pack=pack).logits[0], expected)
    table = {"cu_seq_lens_q": pack.cu_seqlens, "max_length_q": pack.max_seqlen}
    close(model(ids, is_causal=FLAGS, **table).logits[0], expected)
    both = model(IDS, attention_mask=RIGHT, is_causal=False).logits[real]
    close(model(ids, is_causal=False, position_ids=pack.position_ids[None]).logits[0], both)


@FAMILY
@pytest.mark.parametrize(
    "cache",
    [
        pytest.param("dynamic", id="dynamic", marks=feature("generate, dynamic cache")),
        pytest.param("static", id="static", marks=feature("generate, static cache")),
    ],
)
def test_generate_equals_the_unpatched_model_beyond_the_window(family: str, cache: str) -> None:
    options = {"max_new_tokens": 7, "do_sample": False, "attention_mask": LEFT, "cache_implementation": cache}
    assert torch.equal(stock(family).generate(IDS, **options), patched(family).generate(IDS, **options))


@FAMILY
@feature("generate, chunked prefill")
def test_chunked_prefill_equals_generation_in_one_piece(family: str) -> None:
    options = {"max_new_tokens": 7, "do_sample": False, "attention_mask": LEFT}
    found = patched(family).generate(IDS, **options, prefill_chunk_size=WINDOW - 1)
    assert torch.equal(found, stock(family).generate(IDS, **options))


@FAMILY
@feature("assisted decoding")
def test_prompt_lookup_decoding_equals_plain_decoding(family: str) -> None:
    ids, options = IDS[:1].repeat(1, 2), {"max_new_tokens": 7, "do_sample": False}
    found = patched(family).generate(ids, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(found, stock(family).generate(ids, **options))


@FAMILY
@feature("bidirectional prefill, then causal")
@torch.no_grad()
def test_a_bidirectional_prefill_is_continued_causally(family: str) -> None:
    outputs = []
    for model in (stock(family), patched(family)):
        cache = transformers.DynamicCache()
        if family == "gptj":
            model.config.is_causal = False
        model(IDS[:, :8], is_causal=False, use_cache=True, **gk.hf.cache_keyword(model, cache))
        if family == "gptj":
            del model.config.is_causal
        outputs.append(model(IDS[:, 8:], use_cache=True, **gk.hf.cache_keyword(model, cache)).logits)
    close(outputs[1], outputs[0])


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("convention", BIDIRECTIONAL_WINDOWS)
@feature("window conventions beyond W")
@torch.no_grad()
def test_each_window_convention_beyond_the_window(family: str, convention: str) -> None:
    unlimited = copy.deepcopy(stock(family))
    unlimited.config.sliding_window = 10**6  # eager attention reads the window off the mask alone
    real, every = RIGHT.bool(), {"input_ids": IDS, "attention_mask": RIGHT}
    assert int(RIGHT.sum(1).max()) > 2 * WINDOW, "beyond the window on both sides"
    windowed, full = (run_stock(family, False, m, **every).logits for m in (stock(family), unlimited))
    assert not torch.allclose(windowed[2], full[2], atol=1e-2), "the convention must matter"
    mixed = torch.where(FLAGS[:, None, None], run_stock(family, True, **every).logits, full)
    if convention == "transformers":
        mixed[1:] = windowed[1:]
    packing, padding = (patched(family, bidirectional_window=convention, packing=p) for p in (True, False))
    for model, options in ((packing, {}), (packing, {"use_cache": True}), (padding, {})):
        close(model(**every, is_causal=FLAGS, **options).logits[real], mixed[real])
    short = {name: x[:, :WINDOW] for name, x in every.items()}
    expected = run_stock(family, False, unlimited, **short).logits  # up to W tokens the conventions agree
    close(packing(**short, is_causal=False).logits[real[:, :WINDOW]], expected[real[:, :WINDOW]])


@FAMILY
@feature("gradients")
def test_gradients_with_and_without_checkpointing_equal_separate_runs(family: str) -> None:
    real, target = RIGHT.bool(), torch.randn(*IDS.shape, 97)

    def gradients(model: Any, loss: Tensor) -> list[Tensor]:
        model.zero_grad()
        loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]

    logits = [run_stock(family, flag, input_ids=IDS, attention_mask=RIGHT).logits for flag in (True, False)]
    mixed = torch.where(FLAGS[:, None, None], *logits)
    expected = gradients(stock(family), (mixed * target)[real].sum())
    stock(family).zero_grad()
    model = patched(family).train()
    for checkpointing in ({}, {"use_reentrant": False}, {"use_reentrant": True}):
        if checkpointing:
            gk.hf.checkpoint_activations(model, checkpointing)
            model.enable_input_require_grads()
        loss = (model(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits * target)[real].sum()
        for a, b in zip(gradients(model, loss), expected, strict=True):
            assert (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


@FAMILY
@feature("nothing read back")
@torch.no_grad()
def test_a_pass_over_a_sample_pack_reads_nothing_back(family: str) -> None:
    # the meta device holds no values; in bfloat16 because transformers' experts support no other dtype there
    model = patched(family).to("meta", torch.bfloat16)
    pack = gk.SamplePack.from_lengths([5, 9], [True, False], device="meta")
    ids = torch.zeros(1, 14, dtype=torch.int64, device="meta")
    assert model(ids, sample_pack=pack).logits.shape == (1, 14, 97)


@FAMILY
@pytest.mark.slow
@feature("one compiled graph")
@torch.no_grad()
def test_padded_and_packed_passes_compile_into_one_graph(family: str) -> None:
    model, pack = patched(family), gk.SamplePack.from_mask(RIGHT, FLAGS)
    for arguments, real in (
        ({"input_ids": IDS, "attention_mask": RIGHT, "is_causal": FLAGS}, RIGHT.bool()),
        ({"input_ids": pack.pack(IDS)[None], "sample_pack": pack}, torch.ones(1, pack.tokens, dtype=torch.bool)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(compiled(**arguments).logits[real], model(**arguments).logits[real])


@FAMILY
@feature("unpatch")
@torch.no_grad()
def test_unpatch_restores_the_model_and_state_dict_never_changes(family: str) -> None:
    model, reference = patched(family), stock(family)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert model.config.to_dict() == reference.config.to_dict()
    twin = copy.deepcopy(model)
    expected = model(IDS, is_causal=FLAGS).logits
    gk.unpatch(model)
    assert not gk.is_patched(model) and gk.is_patched(twin)
    assert torch.equal(model(IDS, attention_mask=LEFT).logits, reference(IDS, attention_mask=LEFT).logits)
    assert torch.equal(twin(IDS, is_causal=FLAGS).logits, expected)


@FAMILY
def test_attention_dropout_is_refused_by_its_config_name(family: str) -> None:
    model, name = copy.deepcopy(stock(family)), "attn_pdrop" if family == "gptj" else "attention_dropout"
    assert hasattr(model.config, name)
    setattr(model.config, name, 0.1)
    with pytest.raises(ValueError, match=f"^{name}: expected 0, .*got 0.1"):
        gk.patch(model)


# ---- single families


@pytest.mark.parametrize("flags", [True, FLAGS], ids=["causal", "mixed"])
@torch.no_grad()
def test_mixtrals_load_balancing_loss_ignores_padding_when_packed(flags: bool | Tensor) -> None:
    labels = IDS.masked_fill(RIGHT == 0, -100)
    arguments = {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels, "output_router_logits": True}
    packed = patched("mixtral")(**arguments, is_causal=flags)
    padded = patched("mixtral", packing=False)(**arguments, is_causal=flags)
    torch.testing.assert_close(packed.aux_loss, padded.aux_loss)
    torch.testing.assert_close(packed.loss, padded.loss)
    if flags is True:
        torch.testing.assert_close(packed.aux_loss, stock("mixtral")(**arguments).aux_loss)
    # a pack counts its tokens, no more and no less
    pack = gk.SamplePack.from_mask(RIGHT, flags)
    by_pack = patched("mixtral")(pack.pack(IDS)[None], sample_pack=pack, output_router_logits=True)
    torch.testing.assert_close(by_pack.aux_loss, packed.aux_loss)


def test_a_mask_that_numbers_samples_is_refused_where_mixtrals_loss_would_weight_them_by_it() -> None:
    model = patched("mixtral")
    arguments = {"input_ids": IDS, "attention_mask": RIGHT * 2, "use_cache": False}
    model(**arguments)
    with pytest.raises(ValueError, match="^attention_mask: expected 0 and 1 with output_router_logits"):
        model(**arguments, output_router_logits=True)


def test_a_config_that_is_bidirectional_by_itself_is_refused() -> None:
    model = copy.deepcopy(stock("gemma3_text"))
    model.config.use_bidirectional_attention = True
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        gk.patch(model)


@torch.no_grad()
def test_the_bare_gptj_decoder_takes_flags_and_its_own_order_of_arguments() -> None:
    model = patched("gptj")
    expected = model.transformer(IDS, attention_mask=RIGHT, is_causal=FLAGS).last_hidden_state
    assert torch.equal(model.lm_head(expected), model(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits)
    assert torch.equal(model.transformer(IDS, None, RIGHT, is_causal=FLAGS).last_hidden_state, expected)
    decoder = gk.patch(copy.deepcopy(stock("gptj").transformer))
    assert torch.equal(decoder(IDS, attention_mask=RIGHT, is_causal=FLAGS).last_hidden_state, expected)
    gk.unpatch(decoder)


@FAMILY
@torch.no_grad()
def test_the_head_passes_on_every_keyword(family: str) -> None:
    model, row = patched(family), IDS[:1]
    truth = torch.cat([model(row[:, part]).logits for part in (slice(5), slice(5, None))], dim=1)
    numbers, positions = torch.tensor([[0] * 5 + [1] * 7]), torch.tensor([[*range(5), *range(7)]])
    close(model(row, seq_idx=numbers, position_ids=positions, num_items_in_batch=torch.tensor(3)).logits, truth)
    with pytest.raises(TypeError, match="^typo: expected one of the keywords"):
        model(row, typo=1)


@pytest.mark.skipif(not gptj.attends_by_itself(stock("gptj").transformer), reason="GPT-J uses the AttentionInterface")
def test_a_gptj_layer_without_its_decoder_is_an_error_not_a_wrong_mask() -> None:
    attention = patched("gptj").transformer.h[0].attn
    with pytest.raises(RuntimeError, match="without its decoder"):
        attention(torch.zeros(1, 3, 64), position_ids=torch.arange(3)[None])


@pytest.mark.parametrize("convention", ["transformers", "full"])
@pytest.mark.parametrize("family", WINDOWED)
@torch.no_grad()
def test_upper_bounds_meet_each_layers_own_window(family: str, convention: str) -> None:
    """Prefix-LM: the layers without a window see the whole prefix, those with one at most the window ahead."""
    model, length, prefix = stock(family), IDS.shape[1], 9
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    by_bounds = (column <= row) | (column < prefix).expand(length, length) & (row < prefix)
    behind = row - column < WINDOW
    near = behind & (column - row <= WINDOW) if convention == "transformers" else behind
    assert (by_bounds & behind).sum() > (by_bounds & near).sum() or convention == "full"
    masks = {
        kind: torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        for kind, visible in (("full_attention", by_bounds), ("sliding_attention", by_bounds & near))
    }
    mixed = len(set(getattr(model.config, "layer_types", None) or ["sliding_attention"])) > 1
    mask: Any = masks if mixed else masks["sliding_attention"]
    expected = model(IDS[:1], attention_mask=mask, use_cache=False).logits
    hi = gk.prefix_lm_hi(torch.tensor([0, length], dtype=torch.int32), torch.tensor([prefix]), length)
    pack = gk.SamplePack.from_lengths([length], True, hi=hi)
    close(patched(family, bidirectional_window=convention)(IDS[:1], sample_pack=pack).logits, expected)
