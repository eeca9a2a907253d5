"""A pass reads values back from the device a fixed number of times, however many layers it has.

Every read goes through ``aten::_local_scalar_dense`` or an operator whose output's shape is data; a dispatch mode counts them.
(test_families.py runs every family on the meta device, where there is nothing to read.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grit_kernels as gk
from grit_kernels.hf import padded_attention
from tests.grit_kernels.tiny_mistral import FLAGS, IDS, MASKS, output_cache, tiny_model

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique_dim"}
PACK = gk.SamplePack.from_mask(MASKS["right"], FLAGS)


class CountReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name() in READS:
            self.reads[function.name()] += 1
        return function(*args, **(kwargs or {}))


def forward(mask: str, **options: Any) -> Callable[[Any], Any]:
    return lambda model: model(IDS, attention_mask=MASKS[mask], is_causal=FLAGS, **options)


def generate(model: Any) -> None:
    model.generate(IDS, attention_mask=MASKS["left"], max_new_tokens=4, do_sample=False)


def train(use_reentrant: bool) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        gk.hf.checkpoint_activations(model.train(), {"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model(IDS, attention_mask=MASKS["left"], is_causal=FLAGS).logits.sum().backward()

    return run


PASSES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "packed": (forward("right"), {}),
    "packed already": (lambda model: model(PACK.pack(IDS)[None], sample_pack=PACK), {}),
    "padded": (forward("both"), {"packing": False}),
    "holes, filling a cache": (forward("holes", use_cache=True), {}),
    "generate": (generate, {}),
    "packed, checkpointing": (train(False), {}),
    "padded, reentrant checkpointing": (train(True), {"packing": False}),
}


@pytest.mark.parametrize("run, options", PASSES.values(), ids=PASSES.keys())
def test_the_number_of_reads_does_not_grow_with_the_layers(run: Callable[[Any], Any], options: dict[str, Any]) -> None:
    reads = []
    for layers in (1, 3):
        model = gk.patch(tiny_model(num_hidden_layers=layers), **options)
        with CountReads() as counted:
            run(model)
        reads.append(counted.reads)
    assert reads[0] == reads[1]


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_the_number_of_reads_does_not_grow_without_patch_either(grad_mode: Callable[[], Any]) -> None:
    reads = []
    for layers in (1, 3):
        model = tiny_model(num_hidden_layers=layers)
        model.set_attn_implementation("grit")
        with grad_mode(), CountReads() as counted:
            model(IDS, position_ids=torch.arange(IDS.shape[1])[None].clone(), use_cache=False)
        reads.append(counted.reads)
    assert reads[0] == reads[1] and reads[0]


@pytest.mark.parametrize("mask", ["left", "holes"])
def test_a_step_that_decodes_reads_nothing_while_a_cuda_graph_is_recorded(
    mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gk.patch(tiny_model())
    step = {"attention_mask": torch.cat([MASKS[mask], torch.ones_like(MASKS[mask][:, :1])], dim=1), "use_cache": True}
    logits = []
    for recorded in (False, True):
        cache = output_cache(model(IDS, attention_mask=MASKS[mask], use_cache=True))
        if recorded:
            monkeypatch.setattr(padded_attention, "may_read_back", lambda x: False)
        with CountReads() as counted:
            logits.append(model(IDS[:, :1], **gk.hf.cache_keyword(model, cache), **step).logits)
        assert bool(counted.reads) != recorded
    assert torch.equal(*logits)


def test_the_counter_counts() -> None:
    with CountReads() as counted:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
    assert sum(counted.reads.values()) == 2
