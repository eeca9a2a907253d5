"""What a call may pass to a patched model, and that nothing it passes is silently dropped."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers

import grit_kernels as gk
from grit_kernels.hf import compat
from tests.grit_kernels.tiny_mistral import FLAGS, IDS, MASKS, close, output_cache, tiny_config, tiny_model

peft = pytest.importorskip("peft")


# ---- the cache under either name


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
@pytest.mark.parametrize("part", ["model", "decoder"])
@torch.no_grad()
def test_a_cache_is_understood_under_either_name(stock: Any, model: Any, name: str, part: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, of the head
        outputs = []
        for m in (stock, model):
            called, cache = m if part == "model" else m.model, gk.hf.new_cache()
            called(IDS[:, :9], **{name: cache if m is model else None} if m is model else gk.hf.cache_keyword(m, cache))
            assert cache.get_seq_length() == 9
            out = called(IDS[:, 9:], **({name: cache} if m is model else gk.hf.cache_keyword(m, cache)))
            outputs.append(out[0])
    close(outputs[1], outputs[0])


def test_a_cache_under_both_names_is_an_error(model: Any) -> None:
    both = dict.fromkeys(compat.CACHE_NAMES, gk.hf.new_cache())
    with pytest.raises(ValueError, match="cache, past_key_values: expected one of these names"):
        model.model(IDS, **both)


def test_an_argument_given_twice_and_too_many_are_errors(model: Any) -> None:
    with pytest.raises(TypeError, match="^input_ids: expected once, got it both by position and by name"):
        model.model(IDS, input_ids=IDS)
    with pytest.raises(TypeError, match="^forward: expected at most .* arguments without names, got 40"):
        model.model(*[None] * 40)


def test_a_pack_with_a_cache_under_either_name_is_an_error(model: Any) -> None:
    pack = gk.SamplePack.from_lengths([14], True)
    for name in compat.CACHE_NAMES:
        with pytest.raises(ValueError, match="cache, use_cache: expected none"):
            model.model(IDS[:1], sample_pack=pack, **{name: gk.hf.new_cache()})


@torch.no_grad()
def test_our_own_calls_draw_no_warning(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = gk.hf.new_cache()
        model(IDS, **gk.hf.cache_keyword(model, cache))
        for name in compat.CACHE_NAMES:
            model.model(IDS[:, :1], **{name: cache})
        model(IDS, is_causal=FLAGS)
        gk.hf.checkpoint_activations(model)
        assert gk.hf.checkpoints_activations(model)


@pytest.mark.parametrize("mask_name", ["none", "left"])
@torch.no_grad()
def test_prefix_tuning_equals_the_unpatched_model(mask_name: str) -> None:
    # without a window: between prefix and prompt there is padding, which transformers' windows count
    stock, mask, logits = tiny_model(sliding_window=None), MASKS[mask_name], []
    for wrap in (lambda m: m, gk.patch):
        torch.manual_seed(1)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        tuned = wrap(peft.get_peft_model(copy.deepcopy(stock), config).eval())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's own calls
            logits.append(tuned(IDS, attention_mask=mask).logits[mask.bool()])
    close(logits[1], logits[0])


@torch.no_grad()
def test_cached_states_make_a_cache_that_continues_like_the_text(model: Any) -> None:
    cache = gk.hf.new_cache()
    model.model(IDS[:, :9], cache=cache)
    twin = gk.hf.new_cache(gk.hf.cached_states(cache))
    close(model.model(IDS[:, 9:], cache=twin)[0], model.model(IDS)[0][:, 9:])
    with pytest.raises(ValueError, match="cache: expected keys and values in every layer"):
        gk.hf.cached_states(output_cache({"cache": transformers.StaticCache(model.config, max_cache_len=4)}))


@torch.no_grad()
def test_a_mask_that_leaves_out_the_cache_is_refused(model: Any) -> None:
    cache = gk.hf.new_cache()
    model(IDS[:, :6], **gk.hf.cache_keyword(model, cache))
    for new in (1, 8):
        more = {**gk.hf.cache_keyword(model, cache), "attention_mask": torch.ones(4, new)}
        message = (
            rf"^attention_mask: expected \(B, {6 + new}\), 6 slots of the cache and {new} new ones, got \(4, {new}\)"
        )
        with pytest.raises(ValueError, match=message):
            model(IDS[:, 6 : 6 + new], **more)


# ---- what is not understood


def test_unknown_keywords_are_errors_and_none_is_not(model: Any) -> None:
    model(IDS, token_type_ids=None, output_hidden_states=True, num_items_in_batch=torch.tensor(3))
    for name, value in (("token_type_ids", torch.zeros_like(IDS)), ("cache_params", gk.hf.new_cache()), ("typo", 1)):
        with pytest.raises(TypeError, match=f"^{name}: expected one of the keywords"):
            model(IDS, **{name: value})
    with pytest.raises(ValueError, match="^output_attentions: expected False"):
        model(IDS, output_attentions=True)


def test_masks_of_other_shapes_are_an_error_and_not_ignored() -> None:
    from transformers.masking_utils import create_causal_mask

    config = tiny_config()
    config._attn_implementation = "grit"
    options = {"config": config, "inputs_embeds": torch.zeros(1, 4, 8), "attention_mask": None}
    options |= {"position_ids": None, compat.cache_argument(create_causal_mask): None}
    assert create_causal_mask(**options) is None
    with pytest.raises(ValueError, match="^mask_function: expected causality"):
        create_causal_mask(**options, or_mask_function=lambda b, h, q, k: q == k)
    with pytest.raises(ValueError, match="^mask_function: expected a mask made of .*got or_masks"):
        create_causal_mask(**options, block_sequence_ids=torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("mask", [{"full_attention": torch.ones(IDS.shape)}, torch.ones(IDS.shape).tolist(), "causal"])
def test_a_mask_that_is_no_tensor_is_named(model: Any, mask: Any) -> None:
    with pytest.raises(TypeError, match=r"^attention_mask: expected a tensor \(\d+, \d+\), got (dict|list|str)$"):
        model(IDS, attention_mask=mask)


def test_layers_that_attend_by_themselves_are_an_error(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(RuntimeError, match="no layer of this MistralModel called the attention"):
        model(IDS)


# ---- what the config says


@torch.no_grad()
def test_generation_is_causal_whatever_the_config_says(stock: Any) -> None:
    embedder = copy.deepcopy(stock)
    embedder.config.is_causal = False
    bidirectional = embedder.model(IDS).last_hidden_state
    gk.patch(embedder)
    for caching in (True, False):
        options = {"max_new_tokens": 5, "do_sample": False, "use_cache": caching}
        assert torch.equal(embedder.generate(IDS, **options), stock.generate(IDS, **options))
    close(embedder(IDS).logits, stock(IDS).logits)
    # a bare decoder generates nothing: it follows its config, as it does unpatched
    bare = gk.patch(gk.unpatch(embedder).model)
    close(bare(IDS).last_hidden_state, bidirectional)
    close(bare(IDS, is_causal=True).last_hidden_state, stock.model(IDS).last_hidden_state)


# ---- shared objects


@torch.no_grad()
def test_models_that_share_a_config_object_are_independent() -> None:
    config = tiny_config()
    a, b, plain = (transformers.MistralForCausalLM(config).eval() for _ in range(3))
    before = b(IDS).logits
    gk.patch(a), gk.patch(b)
    assert plain.config._attn_implementation != "grit"
    mixed = b(IDS, is_causal=FLAGS).logits
    gk.unpatch(a)
    assert torch.equal(b(IDS, is_causal=FLAGS).logits, mixed)
    b.config.pad_token_id = 5  # what is set while patched stays
    gk.unpatch(b)
    assert b.config.pad_token_id == 5 and b.config._attn_implementation == plain.config._attn_implementation
    assert b.config is b.model.config is b.model.layers[0].self_attn.config
    close(b(IDS).logits, before)


@torch.no_grad()
def test_patching_and_unpatching_while_another_thread_calls_gives_right_results(stock: Any) -> None:
    model, expected = copy.deepcopy(stock), stock(IDS).logits
    gk.patch(model)
    failures: list[BaseException] = []
    done = threading.Event()

    def call() -> None:
        try:
            while not done.is_set():
                with torch.no_grad():
                    close(model(IDS).logits, expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for round in range(12):
        gk.patch(model, packing=bool(round % 2))
    gk.unpatch(model)
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_calls_that_begin_while_attention_is_exchanged_wait(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else masks would be made for one implementation and used by another: eager attention would add our distances to scores."""
    model, expected = copy.deepcopy(stock), stock(IDS).logits
    found: list[torch.Tensor] = []
    threads: list[threading.Thread] = []
    exchange: Any = transformers.PretrainedConfig._attn_implementation

    def call() -> None:
        with torch.no_grad():
            found.append(model(IDS).logits)

    def set_and_call(config: Any, value: str) -> None:
        exchange.fset(config, value)
        if config is model.model.config:
            threads.append(threading.Thread(target=call))
            threads[-1].start()
            threads[-1].join(0.3)
            assert threads[-1].is_alive()

    monkeypatch.setattr(transformers.PretrainedConfig, "_attn_implementation", property(exchange.fget, set_and_call))
    gk.patch(model)
    gk.unpatch(model)
    for thread in threads:
        thread.join()
    assert len(found) == len(threads) >= 2
    for logits in found:
        close(logits, expected)


def test_unpatching_inside_a_pass_is_an_error(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: gk.unpatch(model))
    with pytest.raises(RuntimeError, match="model: expected a model at rest"):
        model(IDS)
    assert gk.is_patched(model)


# ---- layers with sinks or small heads


def sinks_model(implementation: str) -> Any:
    """A tiny gpt_oss with windows, and sinks that matter."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0) if name.endswith("sinks") else parameter.mul_(4)
    return model


@pytest.mark.parametrize("side", ["right", "left"])
def test_attention_sinks_are_those_of_transformers(side: str) -> None:
    stock, found = sinks_model("eager"), sinks_model("grit")
    real = MASKS[side].bool()
    expected, logits = (m(IDS, attention_mask=MASKS[side], use_cache=False).logits[real] for m in (stock, found))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    with torch.no_grad():
        without = sinks_model("eager")
        for name, parameter in without.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-1e4)
        assert (without(IDS, attention_mask=MASKS[side]).logits[real] - expected).abs().max() > 1e-2


def test_sinks_are_trained_in_a_packed_batch_of_both_modes() -> None:
    stock, model = sinks_model("eager"), gk.patch(sinks_model("eager"))
    real = MASKS["right"].bool()
    truth = [
        stock(IDS, attention_mask=MASKS["right"], is_causal=flag, use_cache=False).logits for flag in (True, False)
    ]
    torch.where(FLAGS[:, None, None], *truth)[real].logsumexp(dim=-1).sum().backward()
    model(IDS, attention_mask=MASKS["right"], is_causal=FLAGS, use_cache=False).logits[real].logsumexp(
        dim=-1
    ).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("head_dim", [8, 12, 16])
@torch.no_grad()
def test_small_head_dimensions_are_served(head_dim: int) -> None:
    stock = tiny_model(head_dim=head_dim)
    model = gk.patch(copy.deepcopy(stock))
    for mask in (MASKS["right"], MASKS["left"]):
        real = mask.bool()
        truth = [stock(IDS, attention_mask=mask, is_causal=flag).logits for flag in (True, False)]
        mixed = torch.where(FLAGS[:, None, None], *truth)
        for caching in (False, True):
            found = model(IDS, attention_mask=mask, is_causal=FLAGS, use_cache=caching).logits
            close(found[real], mixed[real])
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), stock.generate(IDS, **options))
