"""A patched model inside other libraries: accelerate, PEFT, FSDP2, the Trainer, from_pretrained."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from torch import Tensor, nn

import grit_kernels as gk
from tests.grit_kernels.tiny_mistral import FLAGS, IDS, MASKS, WINDOW, close, tiny_model
from tests.ranks import process_group

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

RIGHT = MASKS["right"]
REAL = RIGHT.bool()


@pytest.fixture(scope="module")
def expected(stock: Any) -> Tensor:
    """Logits of the mixed batch."""
    with torch.no_grad():
        return gk.patch(copy.deepcopy(stock))(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits


# ---- attn_implementation="grit" without patch()


def test_from_pretrained_knows_the_implementation_in_either_order_of_imports(stock: Any, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path)
    load = f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, attn_implementation='grit')"
    code = (
        "import sys, grit_kernels, importlib.util; assert 'transformers' not in sys.modules;"
        "importlib.util.find_spec('transformers.modeling_utils');"  # whoever only looks for the module does not load it
        f"from transformers import AutoModelForCausalLM; print({load}.config._attn_implementation);"
        "print([finder for finder in sys.meta_path if 'grit_kernels' in type(finder).__module__])"
    )
    root = str(Path(gk.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH", "")) if x)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["grit", "[]"], result.stderr  # the finder has removed itself
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="grit")
    with torch.no_grad():
        for flag in (True, False):
            a = loaded(IDS, attention_mask=RIGHT, is_causal=flag).logits
            close(a[REAL], stock(IDS, attention_mask=RIGHT, is_causal=flag).logits[REAL])
        gk.unpatch(gk.patch(loaded))
    assert loaded.config._attn_implementation == "grit"


@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_flattened_input_does_not_leak_across_samples_without_patch(stock: Any, is_causal: bool) -> None:
    plain = copy.deepcopy(stock)
    plain.set_attn_implementation("grit")
    pack = gk.SamplePack.from_mask(RIGHT, is_causal)
    truth = stock(IDS, attention_mask=RIGHT, is_causal=is_causal).logits[REAL]
    ids, position_ids = pack.pack(IDS)[None], pack.position_ids[None]
    close(plain(ids, position_ids=position_ids, is_causal=is_causal, use_cache=False).logits[0], truth)
    table = {"cu_seq_lens_q": pack.cu_seqlens, "max_length_q": pack.max_seqlen}
    close(plain(ids, position_ids=position_ids, is_causal=is_causal, use_cache=False, **table).logits[0], truth)


# ---- hooks


@torch.no_grad()
def test_accelerate_hooks_run_whether_they_come_before_or_after_patch(stock: Any, expected: Tensor) -> None:
    class Count(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    for hook_first in (True, False):
        model, hook = copy.deepcopy(stock), Count()
        steps = [lambda m=model, h=hook: accelerate.hooks.add_hook_to_module(m.model, h), lambda m=model: gk.patch(m)]
        for step in steps if hook_first else reversed(steps):
            step()
        assert torch.equal(model(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits, expected)
        assert hook.calls == 1
        gk.unpatch(model)
        assert torch.equal(model(IDS, attention_mask=RIGHT).logits, stock(IDS, attention_mask=RIGHT).logits)
        assert hook.calls == 2
        accelerate.hooks.remove_hook_from_module(model.model)
        assert torch.equal(model(IDS).logits, stock(IDS).logits)


@torch.no_grad()
def test_a_dispatched_model_keeps_its_device_map_hooks(stock: Any, expected: Tensor) -> None:
    model = copy.deepcopy(stock)
    device_map = {"model": "cpu", "lm_head": "cpu"}
    model = accelerate.dispatch_model(model, device_map, force_hooks=True, main_device="cpu")
    gk.patch(model)
    close(model(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits[REAL], expected[REAL])


@pytest.mark.parametrize("patch_first", [True, False])
@torch.no_grad()
def test_layers_offloaded_by_a_device_map_run_patched(
    stock: Any, expected: Tensor, tmp_path: Path, patch_first: bool
) -> None:
    device_map = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"], "cpu")
    device_map |= {"model.layers.1": "disk", "lm_head": "disk"}
    if patch_first:
        model = gk.patch(copy.deepcopy(stock))
        model = accelerate.dispatch_model(
            model, device_map, offload_dir=str(tmp_path), main_device="cpu", force_hooks=True
        )
    else:
        stock.save_pretrained(tmp_path / "model")
        options = {"device_map": device_map, "offload_folder": str(tmp_path / "offload"), "dtype": torch.float32}
        model = gk.patch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options))
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    close(model(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits[REAL], expected[REAL])


def test_accelerate_prepares_and_trains_a_patched_model(stock: Any, expected: Tensor) -> None:
    accelerate.state.AcceleratorState._reset_state(True)  # a Trainer of another test may have left one
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = gk.patch(copy.deepcopy(stock))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    assert gk.is_patched(model)
    losses = []
    for _ in range(3):
        logits = model(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits[REAL]
        losses.append(logits.square().mean())
        if len(losses) == 1:
            assert (logits - expected[REAL]).abs().max() < 0.05 * expected[REAL].abs().max()  # bf16 inside
        optimizer.zero_grad()
        accelerator.backward(losses[-1])
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    plain = gk.unpatch(accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    assert not gk.is_patched(plain) and plain.config._attn_implementation == stock.config._attn_implementation


def test_the_config_alone_is_pickled_and_copied_as_that_of_the_unpatched_model(stock: Any, model: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(model.config)), copy.deepcopy(model.config)):
        assert twin.to_json_string() == stock.config.to_json_string()
        assert twin._attn_implementation == "grit"
        rebuilt = transformers.MistralForCausalLM(twin).eval()  # the name alone: attention without packing and flags
        rebuilt.load_state_dict(stock.state_dict())
        with torch.no_grad():
            close(rebuilt(IDS, attention_mask=RIGHT).logits[REAL], stock(IDS, attention_mask=RIGHT).logits[REAL])


def test_a_forward_replaced_after_patch_makes_unpatch_an_error(model: Any) -> None:
    ours = model.model.forward
    model.model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match="forward was replaced after patch"):
        gk.unpatch(model)
    model.model.forward = ours
    gk.unpatch(model)


# ---- PEFT


@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_on_every_linear_trains_the_same_before_and_after_patch(stock: Any, patch_first: bool) -> None:
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)

    def with_lora(m: Any) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(m, config)

    model = copy.deepcopy(stock)
    model = with_lora(gk.patch(model)) if patch_first else gk.patch(with_lora(model))
    assert gk.is_patched(model)
    reference = with_lora(copy.deepcopy(stock))
    separate = [reference(IDS, attention_mask=RIGHT, is_causal=f, use_cache=False).logits for f in (True, False)]
    truth = torch.where(FLAGS[:, None, None], *separate)
    found = model(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits
    close(found[REAL], truth[REAL])
    truth[REAL].square().mean().backward()
    found[REAL].square().mean().backward()
    trained = 0
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            trained += 1
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    assert trained == 2 * 2 * 7  # A and B of seven linears in two layers
    gk.unpatch(model)
    assert not gk.is_patched(model)


# ---- Trainer


def test_the_trainer_trains_a_patched_model_like_the_unpatched_one(stock: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": ids[mask.bool()].tolist()} for ids, mask in zip(IDS, RIGHT, strict=True)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    losses: dict[str, list[float]] = {}
    collators = {
        "padded": transformers.DataCollatorForSeq2Seq(_Pad(), padding=True),  # type: ignore[arg-type]
        "flattened": transformers.DataCollatorWithFlattening(),
    }
    for name, collator, wrap in (
        ("stock padded", collators["padded"], lambda m: m),
        ("patched padded", collators["padded"], gk.patch),
        ("patched flattened", collators["flattened"], gk.patch),
    ):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=2,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = transformers.Trainer(
            model=wrap(copy.deepcopy(stock)), args=arguments, train_dataset=rows, data_collator=collator
        )
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["patched padded"] == pytest.approx(losses["stock padded"], rel=1e-3)
    assert losses["patched flattened"] == pytest.approx(losses["stock padded"], rel=1e-3)
    assert losses["stock padded"][-1] < losses["stock padded"][0]


class _Pad:
    """The little of a tokenizer that the padding collator needs."""

    padding_side = "right"
    pad_token_id = 0

    def pad(self, features: list[dict[str, list[int]]], **unused: Any) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in features)
        lists = {
            "input_ids": [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in features],
            "attention_mask": [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in features],
        }
        return {name: torch.tensor(values) for name, values in lists.items()}


# ---- FSDP2


class Wrapper(nn.Module):
    """One root for both modes: FSDP2 wants every call to go through the sharded module."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor, mask: Tensor, causal: Tensor) -> Tensor:
        return self.lm(ids, attention_mask=mask, is_causal=causal).logits


def _loss(module: nn.Module, rows: slice) -> Tensor:
    return module(IDS[rows], RIGHT[rows], FLAGS[rows])[REAL[rows]].square().mean()


def _fsdp_rank(rank: int, file: str, results: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with process_group(rank, 2, file):
        mesh = init_device_mesh("cpu", (2,))
        module = Wrapper(gk.patch(tiny_model()))
        gk.hf.checkpoint_activations(module.lm)
        module.train()
        for layer in module.lm.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        _loss(module, slice(2 * rank, 2 * rank + 2)).backward()
        full = {name: p.grad.full_tensor() for name, p in module.named_parameters()}  # type: ignore[union-attr, operator]
        if rank == 0:
            results.update({name: grad.tolist() for name, grad in full.items()})
        del module


def test_fsdp2_on_two_ranks_equals_one_process(tmp_path: Path) -> None:
    module = Wrapper(gk.patch(tiny_model())).train()
    ((_loss(module, slice(0, 2)) + _loss(module, slice(2, 4))) / 2).backward()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_fsdp_rank, (str(tmp_path / "store"), results), nprocs=2)
        found = dict(results)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(torch.tensor(found[name]), parameter.grad, rtol=1e-3, atol=1e-5)


def test_the_window_of_these_models_is_shorter_than_their_samples() -> None:
    assert WINDOW < int(RIGHT.sum(1).max())


# ---- torch.nn.DataParallel


def test_a_replica_of_dataparallel_is_refused_as_it_would_run_the_original(stock: Any) -> None:
    """A replica gets all attributes of a module, and so a forward that is bound to the original."""
    model = gk.patch(copy.deepcopy(stock))
    for part in (model.model, copy.deepcopy(model).model, pickle.loads(pickle.dumps(model)).model):
        with pytest.raises(
            RuntimeError, match=r"expected DistributedDataParallel or FSDP2 .* got torch.nn.DataParallel"
        ):
            part._replicate_for_data_parallel()
    assert (
        nn.DataParallel(model)(IDS, attention_mask=RIGHT, is_causal=FLAGS).logits is not None
    )  # without a GPU: itself
    plain = gk.unpatch(model)
    replica = plain.model._replicate_for_data_parallel()
    assert replica is not plain.model and "_grit_patch" not in replica.__dict__
