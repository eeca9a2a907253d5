"""``grit export --for vllm|gguf``: a folder gives GritLM's vectors by the server's arithmetic, or is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from python_model import GritLM
from python_model.cli import main
from python_model.model.server_export import commands, export_for_server

TEXTS = ["A river flows.", "Paris is the capital of France.", "def add(first, second):\n    return first + second"]
CONVERTER = os.environ.get("LLAMA_CPP")
VLLM = os.environ.get("VLLM_PYTHON")
needs_converter = pytest.mark.skipif(CONVERTER is None, reason="LLAMA_CPP names no checkout of llama.cpp")
SERVED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"embed_instruction": True}),
    ("mistral", {"embed_instruction": True}),
    ("mistral", {"pooling_method": "lasttoken", "attn": "cccc"}),
    ("mistral", {"pooling_method": "cls", "normalized": False}),
    ("qwen2", {"embed_instruction": True}),
    ("qwen3", {"embed_instruction": True}),
]
"""Type of the model and settings of those that the servers themselves are run with."""


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
    assert "--embd-normalize" not in printed[2]
    main(["export", str(tmp_path / "v"), "--for", "vllm", "--pool-instruction", *where])
    assert "vllm serve" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="packed: expected with --for sentence-transformers"):
        main(["export", str(tmp_path / "x"), "--for", "vllm", "--packed", *where])


def test_llama_cpps_server_is_told_not_to_normalize(checkpoint: Path) -> None:
    model = GritLM(checkpoint, device="cpu", dtype="float32", embed_instruction=True, normalized=False)
    assert commands(model, "out", "gguf", 64)[1].endswith("--ubatch-size 64 --embd-normalize -1")


def test_the_command_exports_to_sentence_transformers(checkpoint: Path, tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    main(["export", str(tmp_path / "st"), "--model", str(checkpoint)])
    model = GritLM(checkpoint, device="cpu", dtype="float32")
    found = st.SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)
    main(["export", str(tmp_path / "st"), "--model", str(checkpoint), "--truncate-dim", "16"])
    found = st.SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS, truncate_dim=16), atol=1e-5)


def to_gguf(folder: Path, file: Path) -> Path:
    """What llama.cpp's converter makes of ``folder``."""
    pytest.importorskip("sentencepiece", reason="the converter imports it")
    script = Path(str(CONVERTER)) / "convert_hf_to_gguf.py"
    # the converter knows vocabularies by a hash; that of the tests is of no known model
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]);"
        "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda *a: 'gpt-2';"
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [str(CONVERTER), str(script), str(folder), "--outfile", str(file), "--outtype", "f32"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    return file


@needs_converter
def test_llama_cpps_converter_writes_what_the_folder_says(checkpoint: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = GritLM(checkpoint, device="cpu", dtype="float32", embed_instruction=True)
    folder = export_for_server(model, tmp_path / "out", "gguf", max_length=64)
    fields = gguf.GGUFReader(to_gguf(folder, tmp_path / "model.gguf")).fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.attention.causal"].contents() is False
    assert "llama.attention.sliding_window" not in fields
    assert "llama.pooling_type" not in fields


def of_type(kind: str, checkpoint: Path, folder: Path) -> Path:
    """The tiny checkpoint, or one of another type with its sizes and tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if kind == "mistral":
        return checkpoint
    wanted = json.loads((checkpoint / "config.json").read_text())
    same = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split()
    # Qwen's tokenizer adds special tokens of its own
    config = AutoConfig.for_model(kind, vocab_size=wanted["vocab_size"] + 8, **{name: wanted[name] for name in same})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def llama_server(words: list[str], log: Path) -> Iterator[str]:
    """The address of a running llama-server."""
    httpx = pytest.importorskip("httpx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*words, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").status_code == 200:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


@needs_converter
@pytest.mark.skipif(shutil.which("llama-server") is None, reason="llama-server is not on the path")
@pytest.mark.parametrize(("kind", "settings"), SERVED, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_llama_cpps_server_answers_with_the_vectors_of_gritlm(
    checkpoint: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    import httpx

    model = GritLM(of_type(kind, checkpoint, tmp_path / "model"), device="cpu", dtype="float32", **settings)
    folder = export_for_server(model, tmp_path / "out", "gguf", max_length=64)
    file = to_gguf(folder, tmp_path / "model.gguf")
    prefix = model.formatter.embed_instruction("Find the text")
    ids = [model.tokenizer(prefix + text)["input_ids"] for text in TEXTS]
    words = shlex.split(commands(model, folder, "gguf", 64)[1])
    words[words.index("model.gguf")] = str(file)
    # without these, it rounds keys and values to float16
    words += ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32", "--threads", "1"]
    want = model.encode(TEXTS, instruction=prefix)
    with llama_server(words, tmp_path / "log") as url:
        answer = httpx.post(url + "/v1/embeddings", json={"input": ids, "model": ""}, timeout=60).json()
        got = np.array([row["embedding"] for row in answer["data"]])
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
        if kind in ("llama", "mistral"):  # the converter was told that their splitting of words is GPT-2's
            for text, expected in zip(TEXTS, ids, strict=True):
                content = {"content": prefix + text, "add_special": True, "parse_special": True}
                assert httpx.post(url + "/tokenize", json=content).json()["tokens"] == expected
        if not model.settings.attention.embedding_causal:  # it must fit into one batch
            too_long = httpx.post(url + "/v1/embeddings", json={"input": ids[0] * 9, "model": ""}, timeout=60)
            assert too_long.status_code == 500 and "too large" in too_long.text
        assert httpx.get(url + "/health").status_code == 200


EMBED = """
import json, sys

from vllm import LLM

if __name__ == "__main__":
    folder, texts, result = sys.argv[1:]
    model = LLM(folder, runner="pooling", max_model_len=64, dtype="float32", enforce_eager=True)
    found = model.embed(json.loads(texts))
    with open(result, "w") as file:
        json.dump([[list(row.prompt_token_ids), list(row.outputs.embedding)] for row in found], file)
"""


@pytest.mark.skipif(VLLM is None, reason="VLLM_PYTHON names no interpreter that has vLLM")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [*SERVED, ("mistral", {"embed_instruction": True, "projection": 16})],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)),
)
def test_vllm_embeds_with_the_vectors_of_gritlm(
    checkpoint: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    model = GritLM(
        of_type(kind, checkpoint, tmp_path / "model"), device="cpu", dtype="float32", is_inference=False, **settings
    )
    folder = export_for_server(model, tmp_path / "out", "vllm", max_length=64)
    prefix = model.formatter.embed_instruction("Find the text")
    texts = [prefix + text for text in TEXTS]
    own = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    # one process, and a gibibyte for a cache that is not used
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1"}
    script, result = tmp_path / "embed.py", tmp_path / "vectors.json"
    script.write_text(EMBED)
    run = [str(VLLM), str(script), str(folder), json.dumps(texts), str(result)]
    subprocess.run(run, cwd=tmp_path, env=environment, check=True)
    found = json.loads(result.read_text())
    assert [ids for ids, _ in found] == [model.tokenizer(text)["input_ids"] for text in texts]
    want = model.encode(TEXTS, instruction=prefix)
    got = np.array([vector for _, vector in found])
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
