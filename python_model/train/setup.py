"""From settings to the objects of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from python_model.corpora.small_model import resolve_model
from python_model.model.modeling import GritLM
from python_model.train.adapters import add_adapters, quantization_arguments
from python_model.train.config import TrainConfig
from python_model.train.memory import GIB, MemoryPlan, plan_memory


def load_model(config: TrainConfig, device: torch.device, *, weights: bool = True) -> GritLM:
    """The model a run starts from, with adapters where asked for; ``weights=False`` leaves it on the meta device."""
    arguments: dict[str, Any] = quantization_arguments(config)
    if not weights:
        arguments["device_map"] = "meta"
    torch.manual_seed(config.seed)  # a new embedding head and new adapters start at random
    grit = GritLM(
        resolve_model(config.model),
        mode=config.mode,
        device=device,
        is_inference=False,
        dtype="float32",
        **config.settings_given,
        **arguments,
    )
    add_adapters(grit, config)
    return grit


def plan_dry_run(config: TrainConfig, world: int) -> tuple[MemoryPlan, float]:
    """The memory plan of a run on ``world`` ranks, from the architecture alone; and the bytes a device has."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    source = config.architecture or str(resolve_model(config.model))
    if not (Path(source) / "config.json").exists():
        raise FileNotFoundError(f"architecture: there is no {source}/config.json")
    settings = AutoConfig.from_pretrained(source)
    kind = AutoModel if config.mode == "embedding" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(settings, dtype=torch.float32)
        if config.projection is not None:
            model.embedding_head = torch.nn.Linear(settings.hidden_size, config.projection)
    if config.lora_rank:
        holder = _Holder(model)
        add_adapters(cast(GritLM, holder), config)
        model = holder.model
    limit = config.device_memory * GIB
    if torch.cuda.is_available():
        limit = float(torch.cuda.get_device_properties(0).total_memory)
    return plan_memory(model, settings, config, world), limit


class _Holder:
    """What add_adapters changes of a GritLM, without tokenizer and weights."""

    def __init__(self, model: Any) -> None:
        self.model = model
