"""LoRA: adapters on the linear layers of a patched model, and merging them for the export."""

from __future__ import annotations

from typing import Any

import torch

from python_model.model.modeling import GritLM
from python_model.support.optional import require
from python_model.train.config import Mode, ModelConfig


def quantization_arguments(config: ModelConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load the frozen weights as the settings say."""
    if not config.quantization:
        return {}
    require("bitsandbytes")
    if not torch.cuda.is_available():
        raise ValueError("quantization: expected '' without a CUDA device, got 'nf4'")
    return {"quantization_config": nf4(torch.bfloat16)}


def nf4(compute_dtype: torch.dtype) -> Any:
    """Weights of 4 bits as in QLoRA (nf4, double quantisation)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def add_adapters(grit: GritLM, config: ModelConfig, mode: Mode) -> None:
    """Freeze ``grit``'s weights and add an adapter to each linear layer (in place); an embedding head remains trainable."""
    if not config.lora_rank:
        return
    peft = require("peft", "lora")
    targets: Any = config.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    if config.quantization:
        grit.model = peft.prepare_model_for_kbit_training(
            grit.model, use_gradient_checkpointing=config.gradient_checkpointing
        )
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="FEATURE_EXTRACTION" if mode == "embedding" else "CAUSAL_LM",
    )
    grit.model = peft.get_peft_model(grit.model, settings)


def merge_adapters(grit: GritLM) -> None:
    """Merge the adapters into the weights, leaving a plain model (in place).

    Weights of 4 bits are dequantised before: rounded to 4 bits again, the sum would lose most of what the adapters learned. On a
    GPU that is to bfloat16, so that it fits where the training did.
    """
    if not hasattr(grit.model, "merge_and_unload"):
        return
    if getattr(grit.model.get_base_model(), "hf_quantizer", None) is not None:
        peft = require("peft", "lora")
        learned, settings = peft.get_peft_model_state_dict(grit.model), grit.model.peft_config["default"]
        dtype = torch.bfloat16 if grit.device.type == "cuda" else torch.float32
        grit.model = peft.get_peft_model(grit.model.unload().dequantize(dtype), settings)
        peft.set_peft_model_state_dict(grit.model, learned)
    grit.model = grit.model.merge_and_unload()
