"""LoRA: adapters on the linear layers of a patched model, and merging them for the export."""

from __future__ import annotations

from typing import Any

import torch

from python_model.model.modeling import GritLM
from python_model.support.optional import require
from python_model.train.config import Mode, ModelConfig


def quantization_arguments(config: ModelConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load the frozen weights as in QLoRA (nf4, double quantisation)."""
    if not config.quantization:
        return {}
    require("bitsandbytes")
    if not torch.cuda.is_available():
        raise ValueError("quantization: expected '' without a CUDA device, got 'nf4'")
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    }


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
    """Merge the adapters into the weights, leaving a plain model (in place)."""
    if hasattr(grit.model, "merge_and_unload"):
        grit.model = grit.model.merge_and_unload()
