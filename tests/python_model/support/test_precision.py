"""Where a CPU emulates products in 16 bits, defaults compute in float32; what is asked for is computed as asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.commands.doctor import report
from python_model.evaluation.held_out import HeldOut, evaluate
from python_model.support import precision
from python_model.support.precision import computes_in_bfloat16, computing, is_emulated
from python_model.train.memory import plan_tokens
from python_model.train.setup import plan_dry_run
from tests.python_model.small_sample import write_small_sample
from tests.python_model.training_samples import toy_config, toy_trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITHOUT, WITH = frozenset({"avx2", "avx512_f"}), frozenset({"avx512_bf16", "avx512_fp16"})
TEXTS = ["A river flows.", "Paris is the capital of France."]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without products in 16 bits."""
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: WITHOUT)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with them."""
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: WITH)


@pytest.fixture
def in_bfloat16(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose weights are in bfloat16."""
    GritLM(checkpoint, device="cpu", dtype="bfloat16").save_pretrained(tmp_path / "bfloat16")
    return tmp_path / "bfloat16"


@pytest.mark.usefixtures("emulated")
def test_only_16_bits_on_a_cpu_are_emulated() -> None:
    assert is_emulated(torch.bfloat16, CPU) and is_emulated(torch.float16, CPU)
    assert not is_emulated(torch.float32, CPU) and not is_emulated(torch.bfloat16, CUDA)


@pytest.mark.parametrize(
    ("names", "emulated"),
    [
        ({"avx2", "avx512_f"}, (True, True)),
        ({"avx512_f", "avx512_bf16"}, (False, True)),
        ({"amx_bf16", "amx_fp16"}, (False, False)),
        ({"neon", "fp16_arith"}, (True, False)),
        (set(), (False, False)),  # nothing is known
    ],
)
def test_instructions_decide(names: set[str], emulated: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: frozenset(names))
    assert (is_emulated(torch.bfloat16, CPU), is_emulated(torch.float16, CPU)) == emulated


@pytest.mark.skipif(not precision.CPUINFO.exists(), reason="this system has no /proc/cpuinfo")
def test_an_older_torch_leaves_the_question_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = []
    for name in ("get_capabilities", "nothing"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
        precision.cpu_capabilities.cache_clear()
        ways.append({dtype: is_emulated(dtype, CPU) for dtype in precision.INSTRUCTIONS})
        monkeypatch.undo()
        precision.cpu_capabilities.cache_clear()
    assert ways[0] == ways[1]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.usefixtures("emulated")
def test_what_is_asked_for_is_computed(wanted: bool, in_bfloat16: Path) -> None:
    assert computes_in_bfloat16(wanted, CPU) is wanted
    with computing(CPU, wanted):
        assert torch.is_autocast_enabled("cpu") is wanted
    dtype = torch.bfloat16 if wanted else torch.float32
    assert GritLM(in_bfloat16, device="cpu", dtype=dtype).model.dtype == dtype


@pytest.mark.usefixtures("emulated")
def test_a_model_computes_in_float32_where_its_dtype_is_emulated(in_bfloat16: Path) -> None:
    model, wide = GritLM(in_bfloat16, device="cpu"), GritLM(in_bfloat16, device="cpu", dtype="float32")
    assert model.model.dtype == torch.float32
    torch.testing.assert_close(model.encode(TEXTS), wide.encode(TEXTS), rtol=0, atol=0)


@pytest.mark.usefixtures("native")
def test_a_model_keeps_the_dtype_that_the_cpu_multiplies(in_bfloat16: Path) -> None:
    assert GritLM(in_bfloat16, device="cpu").model.dtype == torch.bfloat16


@pytest.mark.usefixtures("emulated")
def test_weights_stay_where_float32_would_not_fit(in_bfloat16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(precision, "find", lambda name: memory)
    with pytest.warns(
        UserWarning, match="dtype: this CPU emulates products in bfloat16, which takes several times as long"
    ):
        model = GritLM(in_bfloat16, device="cpu")
    assert model.model.dtype == torch.bfloat16


def test_training_decides_once_and_resumes_with_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: WITHOUT)
    config = toy_config(checkpoint, tmp_path, bf16=None, steps=2, save_steps=1)
    trainer = toy_trainer(config)
    assert trainer.config.model.bf16 is False and trainer.gradients.bf16 is False
    assert "computing in float32" in capsys.readouterr().out
    trainer.train()
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: WITH)
    with pytest.raises(ValueError, match="model.bf16: expected False, with which"):
        toy_trainer(config).train()
    again = toy_config(checkpoint, tmp_path, bf16=False, steps=2, save_steps=1)
    assert len(toy_trainer(again).train()) == 2
    assert toy_trainer(config).config.model.bf16 is True


def test_a_memory_plan_without_a_decision_is_that_of_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    plans = []
    for bf16 in (None, True, False):
        config = toy_config(checkpoint, tmp_path, bf16=bf16)
        tokens = plan_tokens(config.mode, config.data, config.batch, 1)
        plans.append(plan_dry_run(config.model, config.parallel, tokens, 1)[0])
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("slow", [True, False])
def test_an_evaluation_computes_in_bfloat16_where_that_is_fast(
    slow: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: WITHOUT if slow else WITH)
    model = GritLM(checkpoint, device="cpu")
    held_out = HeldOut(write_small_sample(tmp_path, per_kind=1, passages=4))
    found = evaluate(model, held_out)[1]
    same = evaluate(model, held_out, bf16=not slow)[1]
    other = evaluate(model, held_out, bf16=slow)[1]
    assert torch.equal(found, same) and not torch.equal(found, other)


@pytest.mark.usefixtures("emulated")
def test_doctor_names_what_is_emulated() -> None:
    assert report()["emulated_products"] == ["bfloat16", "float16"]
