"""``grit export --for vllm|gguf``: a folder gives GritLM's vectors by the server's arithmetic, or is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from python_model import GritLM
from python_model.cli import main
from python_model.model.server_export import export_for_server

TEXTS = ["A river flows.", "Paris is the capital of France.", "def add(first, second):\n    return first + second"]
CONVERTER = os.environ.get("LLAMA_CPP")


def served(folder: Path, texts: list[str]) -> np.ndarray:
    """What vLLM and llama.cpp compute from a folder: the stock decoder under the config's own ``is_causal``, one text at a time,
    with the tokenizer's own special tokens; all tokens pooled in float32; the linear layers; the norm."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    decoder = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    kinds = [
        (m["type"].rsplit(".", 1)[1], folder / m["path"]) for m in json.loads((folder / "modules.json").read_text())
    ]
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = decoder(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        for kind, place in kinds:
            options = json.loads((place / "config.json").read_text()) if kind in ("Pooling", "Dense") else {}
            if kind == "Pooling":
                hidden = {"mean": hidden.mean(0), "lasttoken": hidden[-1], "cls": hidden[0]}[options["pooling_mode"]]
            elif kind == "Dense":
                weights = load_file(place / "model.safetensors")
                hidden = weights["linear.weight"] @ hidden + weights["linear.bias"]
                assert options["activation_function"] == "torch.nn.modules.linear.Identity"
            elif kind == "Normalize":
                hidden = torch.nn.functional.normalize(hidden, dim=0)
        rows.append(hidden.numpy())
    return np.stack(rows)


@pytest.mark.parametrize("server", ["vllm", "gguf"])
@pytest.mark.parametrize(
    "settings",
    [
        {"embed_instruction": True},
        {"pooling_method": "lasttoken", "attn": "cccc"},
        {"pooling_method": "cls", "normalized": False},
        {"embed_instruction": True, "bidirectional_window": "full"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_the_server_computes_the_vectors_of_gritlm(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], server: Any
) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32", **settings)
    folder = export_for_server(model, tmp_path / "out", server, max_length=64)
    prefix = model.formatter.embed_instruction("Find the text")
    want = model.encode(TEXTS, instruction=prefix)
    np.testing.assert_allclose(served(folder, [prefix + text for text in TEXTS]), want, atol=1e-5 * np.abs(want).max())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_vllm_gets_the_embedding_head(checkpoint: Path, tmp_path: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32", projection=16, embed_instruction=True)
    folder = export_for_server(model, tmp_path / "out", "vllm", max_length=64)
    prefix = model.formatter.embed_instruction("")
    want = model.encode(TEXTS, instruction=prefix)
    assert want.shape == (3, 16)
    np.testing.assert_allclose(served(folder, [prefix + text for text in TEXTS]), want, atol=1e-5)


def test_the_config_says_what_the_servers_read(checkpoint: Path, tmp_path: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32", embed_instruction=True)
    folder = export_for_server(model, tmp_path / "out", "vllm", max_length=64)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["is_causal"] is False and config["sliding_window"] is None
    assert set(config.get("layer_types", ["full_attention"])) == {"full_attention"}
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 64
    causal = GritLM(checkpoint, device="cpu", dtype="float32", attn="cccc", pooling_method="lasttoken")
    assert "is_causal" not in json.loads(
        (export_for_server(causal, tmp_path / "c", "vllm", max_length=9) / "config.json").read_text()
    )


def test_gritlm_reads_the_folder_back_as_the_server_does(checkpoint: Path, tmp_path: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    folder = export_for_server(model, tmp_path / "out", "vllm", max_length=64, pool_instruction=True)
    prefix = model.formatter.embed_instruction("Find the text")
    again = GritLM(folder, device="cpu", dtype="float32")
    pooled = again.encode(TEXTS, instruction=prefix)
    np.testing.assert_allclose(pooled, served(folder, [prefix + text for text in TEXTS]), atol=1e-5)
    # this is what pool_instruction accepts: other vectors than the model's own
    own = model.encode(TEXTS, instruction=prefix)
    assert (pooled * own).sum(1).max() < 0.999
    # without an instruction every token is pooled here as well
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("server", "settings", "options", "message"),
    [
        ("vllm", {}, {}, "embed_instruction: expected a model that pools the instruction too"),
        ("gguf", {}, {}, "embed_instruction: expected a model that pools the instruction too"),
        ("vllm", {"pooling_method": "weightedmean"}, {}, "pooling_method: expected one of mean, cls, lasttoken"),
        ("vllm", {"attn": "cbcc"}, {}, "attn: expected 'bb' or 'cc'"),
        ("vllm", {"embed_instruction": True}, {"max_length": 65}, "max_length: expected at most .* 64, got 65"),
        ("gguf", {"embed_instruction": True, "projection": 8}, {}, "projection: expected none"),
        ("gguf", {"embed_instruction": True, "embed_eos": "</e>"}, {}, "embed_eos: expected at most BOS"),
        ("vllm", {"embed_instruction": True, "truncate_dim": 8}, {}, "truncate_dim: expected none, vllm cuts"),
        ("tei", {}, {}, "server: expected one of"),
    ],
)
def test_what_a_server_cannot_do_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, server: Any, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32", is_inference=False, **settings)
    with pytest.raises(ValueError, match=message):
        export_for_server(model, tmp_path / "out", server, **{"max_length": 64, **options})
    assert not list(tmp_path.iterdir())


def test_a_type_that_stays_causal_there_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    config = Gemma2Config(vocab_size=400, num_attention_heads=2, num_key_value_heads=1, **shape)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "gemma")
    model = GritLM(tmp_path / "gemma", device="cpu", dtype="float32", embed_instruction=True)
    with pytest.raises(
        ValueError, match="model_type: expected one whose attention sees both sides in vllm, .*'gemma2'"
    ):
        export_for_server(model, tmp_path / "out", "vllm")


def test_the_command_prints_how_to_serve(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    where = ["--model", str(checkpoint), "--max-length", "64"]
    with pytest.raises(SystemExit, match="--pool-instruction"):
        main(["export", str(tmp_path / "g"), "--for", "gguf", *where])
    main(["export", str(tmp_path / "g"), "--for", "gguf", "--pool-instruction", *where])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(tmp_path / "g") and printed[1].startswith("python convert_hf_to_gguf.py")
    assert "--pooling mean" in printed[2] and "--ubatch-size 64" in printed[2]
    main(["export", str(tmp_path / "v"), "--for", "vllm", "--pool-instruction", *where])
    assert "vllm serve" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="packed: expected with --for sentence-transformers"):
        main(["export", str(tmp_path / "x"), "--for", "vllm", "--packed", *where])


def test_the_command_exports_to_sentence_transformers(checkpoint: Path, tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    main(["export", str(tmp_path / "st"), "--model", str(checkpoint)])
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    found = st.SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)
    main(["export", str(tmp_path / "st"), "--model", str(checkpoint), "--truncate-dim", "16"])
    found = st.SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS, truncate_dim=16), atol=1e-5)


@pytest.mark.skipif(CONVERTER is None, reason="LLAMA_CPP names no checkout of llama.cpp")
def test_llama_cpps_converter_writes_what_the_folder_says(checkpoint: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("sentencepiece", reason="the converter imports it")
    model = GritLM(checkpoint, device="cpu", dtype="float32", embed_instruction=True)
    folder = export_for_server(model, tmp_path / "out", "gguf", max_length=64)
    script = Path(str(CONVERTER)) / "convert_hf_to_gguf.py"
    file = tmp_path / "model.gguf"
    # the converter knows vocabularies by a hash; that of the tests is of no known model
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]);"
        "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda *a: 'gpt-2';"
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [str(CONVERTER), str(script), str(folder), "--outfile", str(file), "--outtype", "f32"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    fields = gguf.GGUFReader(file).fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.attention.causal"].contents() is False
    assert "llama.attention.sliding_window" not in fields
