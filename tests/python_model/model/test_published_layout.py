"""Folders laid out as GritLM/GritLM-7B and GritLM/GritLM-8x7B on the hub, small and with random weights, load with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from python_model import GritLM
from python_model.generate import reply
from python_model.model.prompts import embed_instruction

# config.json as published by transformers 4.37, but for the sizes
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "id2label": {"0": "LABEL_0"},
    "initializer_range": 0.1,
    "intermediate_size": 96,
    "label2id": {"LABEL_0": 0},
    "max_position_embeddings": 32768,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "use_cache": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "GritLM-7B": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "GritLM-8x7B": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    },
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEXTS = ["A river flows through the city.", "x", "Is it?\n  Yes - it is, in 1987."]


def write_tokenizer(folder: Path) -> int:
    """Llama's kind of tokenizer: BPE over characters, bytes for the rest, "▁" for a space and before the text, BOS in front;
    returns the size of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *map(chr, range(33, 127)),
        "▁t",
        "▁i",
    ]
    core = Tokenizer(
        models.BPE(
            vocab={token: n for n, token in enumerate(tokens)},
            merges=[("▁", "t"), ("▁", "i")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    core.save(str(folder / "tokenizer.json"))
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(n): {"content": token, **added} for n, token in enumerate(tokens[:3])},
        "bos_token": "<s>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 10**30,
        "pad_token": "<s>",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(tokens)


@pytest.fixture(params=PUBLISHED, ids=str)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Weights in shards, an edited modelling file that must not run, and no grit.json."""
    import transformers

    folder = tmp_path / request.param
    folder.mkdir()
    vocabulary = write_tokenizer(folder)
    config = {**COMMON, **PUBLISHED[request.param], "vocab_size": vocabulary}
    kind = config["architectures"][0].removesuffix("ForCausalLM")
    torch.manual_seed(0)
    values = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "torch_dtype")}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    edited = f"modeling_{request.param.lower().replace('-', '')}"
    config["auto_map"] = {"AutoModel": f"{edited}.{kind}Model", "AutoModelForCausalLM": f"{edited}.{kind}ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / f"{edited}.py").write_text("raise RuntimeError('the edited modelling file ran')\n", encoding="utf-8")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").exists()
    return folder


def stock_vectors(folder: Path, prefix: str) -> torch.Tensor:
    """The paper's embedding, text by text: bidirectional, the mean of the last states after the instruction."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype="float32", attn_implementation="eager", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    skipped = len(tokenizer(prefix)["input_ids"])
    rows = []
    for text in TEXTS:
        ids = tokenizer(prefix + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model(ids, is_causal=False).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(states[skipped:].mean(dim=0), dim=0))
    return torch.stack(rows)


def test_a_folder_laid_out_as_published_embeds_and_generates(published: Path) -> None:
    model = GritLM(published, device="cpu", dtype="float32")
    assert model.settings.attn == "bbcc" and model.settings.pooling_method == "mean" and model.settings.normalized
    for instruction in ("", "Find the text"):
        prefix = embed_instruction(instruction)
        found = torch.from_numpy(model.encode(TEXTS, instruction=prefix))
        assert (found - stock_vectors(published, prefix)).abs().max() <= 1e-5

    from transformers import AutoModelForCausalLM

    turns = ["What is a river?", "Water that flows.", "Where does it end?"]
    messages = [{"role": "assistant" if n % 2 else "user", "content": turn} for n, turn in enumerate(turns)]
    tokenizer = model.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert model.formatter.prompt(model.formatter.chat_prompt(turns)) == ids[0].tolist()
    stock = AutoModelForCausalLM.from_pretrained(published, dtype="float32", attn_implementation="eager")
    continued = stock.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert reply(model, turns, max_new_tokens=8) == tokenizer.decode(continued, skip_special_tokens=True).strip()


def test_a_folder_laid_out_as_published_loads_its_embedding_side_alone(published: Path) -> None:
    whole, alone = (GritLM(published, mode=mode, device="cpu", dtype="float32") for mode in ("unified", "embedding"))
    assert torch.equal(*(torch.from_numpy(model.encode(TEXTS)) for model in (whole, alone)))
