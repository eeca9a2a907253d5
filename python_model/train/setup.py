"""Builds the objects of a run from its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

import grit_kernels as gk
from python_model.corpora.small_model import resolve_model
from python_model.data.config import BatchConfig
from python_model.evaluation.held_out import held_out_digest
from python_model.model.identity import states_config, tokenizer_digest, weights_digest
from python_model.model.modeling import GritLM
from python_model.train.adapters import add_adapters, quantization_arguments
from python_model.train.config import LossConfig, Mode, ModelConfig, OptimizerKind, ParallelConfig
from python_model.train.distributed import Ranks
from python_model.train.memory import GIB, MemoryPlan, StepTokens, plan_memory

GRAPHS = 64
"""Graphs that torch.compile may make of the layers."""


def load_model(
    config: ModelConfig,
    device: torch.device,
    *,
    mode: Mode = "unified",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    weights: bool = True,
) -> GritLM:
    """The model that a run starts from, with adapters if requested.

    ``settings`` override those of the checkpoint. ``weights=False`` leaves the model on the meta device.
    """
    arguments: dict[str, Any] = quantization_arguments(config)
    if not weights:
        arguments["device_map"] = "meta"
    torch.manual_seed(seed)  # a new embedding head and new adapters are initialised at random
    grit = GritLM(
        resolve_model(config.name),
        mode=mode,
        device=device,
        is_inference=False,
        dtype="float32",
        **(settings or {}),
        **arguments,
    )
    add_adapters(grit, config, mode)
    return grit


def recompute_activations(grit: GritLM, config: ModelConfig) -> None:
    """Enable gradient checkpointing if the settings say so."""
    if config.gradient_checkpointing:
        gk.hf.checkpoint_activations(grit.model, keep_attention=config.gradient_checkpointing == "selective")


def compile_layers(grit: GritLM, config: ModelConfig, backend: Any = "inductor") -> None:
    """Compile the forward of each of the decoder's layers if the settings say so, into graphs without breaks, for any lengths."""
    if not config.compile:
        return
    grit.check_patch()
    # the compiler fuses by itself, and the forwards that fused ops put into each module would keep layers from sharing graphs
    gk.patch(grit.model, **{**(gk.hf.patch_options(grit.model) or {}), "fuse": False})
    # one for each kind of layer, with and without gradients, for one sample and for several; more than torch's limit of 8 would
    # be an error in the middle of a run
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for layer in gk.hf.layers_of(grit.decoder[0]):
        # not layer.compile(): hooks, such as those by which FSDP gathers weights, stay outside
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend=backend)


def check_batch_size(batch: BatchConfig, world: int, mode: Mode) -> None:
    """ValueError if a rank would have no query in a run that embeds."""
    if mode != "generative" and batch.embedding_batch_size < world:
        raise ValueError(
            f"batch.embedding_batch_size: expected at least one query for each of the {world} ranks, got "
            f"{batch.embedding_batch_size}"
        )


def check_matryoshka_dims(model: GritLM, config: LossConfig) -> None:
    """Check that each Matryoshka size cuts something off the embeddings.

    Raises:
        ValueError: one does not.
    """
    size = model.settings.projection or int(model.model.config.hidden_size)
    if wrong := [dim for dim in config.matryoshka_dims if dim >= size]:
        raise ValueError(f"losses.matryoshka_dims: expected sizes below the embedding's {size}, got {wrong[0]}")


def router_loss_weight(model: GritLM, config: LossConfig) -> float:
    """Weight of the load-balancing loss; 0 for a model without experts."""
    settings = model.model.config
    if not getattr(settings, "num_local_experts", 0):
        if config.router_loss_weight:
            raise ValueError(
                f"losses.router_loss_weight: expected none for a model without experts, got {config.router_loss_weight}"
            )
        return 0.0
    if config.router_loss_weight is not None:
        return config.router_loss_weight
    return float(getattr(settings, "router_aux_loss_coef", 0.0))


def plan_dry_run(
    config: ModelConfig,
    parallel: ParallelConfig,
    tokens: StepTokens,
    world: int,
    *,
    mode: Mode = "unified",
    projection: int | None = None,
    optimizer: OptimizerKind = "adamw",
) -> tuple[MemoryPlan, float]:
    """The memory plan of a run on ``world`` ranks, from the architecture alone, and the memory of a device in bytes."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    source = config.architecture or str(resolve_model(config.name))
    if not (Path(source) / "config.json").exists():
        raise FileNotFoundError(f"model.architecture: there is no {source}/config.json")
    architecture = AutoConfig.from_pretrained(source)
    kind = AutoModel if mode == "embedding" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(architecture, dtype=torch.float32)
        if projection is not None:
            model.embedding_head = torch.nn.Linear(architecture.hidden_size, projection)
    if config.lora_rank:
        holder = _Holder(model)
        add_adapters(cast(GritLM, holder), config, mode)
        model = holder.model
    limit = parallel.device_memory * GIB
    if torch.cuda.is_available():
        limit = float(torch.cuda.get_device_properties(0).total_memory)
    return plan_memory(model, architecture, tokens, config, parallel, mode, world, optimizer), limit


def run_identity(
    model: GritLM,
    data_digest: str,
    ranks: Ranks,
    *,
    evaluation_data: str,
    optimizer: OptimizerKind,
    parallel: ParallelConfig,
    own_negatives: bool,
) -> dict[str, str]:
    """What a state must have been written with to be resumed from (``identity`` of a Checkpointer), the same on all ranks.

    ``own_negatives``: whether queries are contrasted with the passages of their own rank alone.
    """
    # rank 0 has the weights; float64 holds 48 bits exactly
    values = [model_digest(model.model), former_model_digest(model.model)]
    weights, former = map(int, ranks.all_values(values)[0].tolist())
    identity = {
        "data.train_data": data_digest,
        "model.name": f"{former:012x}",  # of states that earlier versions wrote
        "model.name (weights)": f"{weights:012x}",
        "model.name (config)": config_digest(model.model.config),
        "model.name (tokenizer)": tokenizer_digest(model.tokenizer),
    }
    if evaluation_data:
        identity["evaluation.data"] = held_out_digest(evaluation_data)
    if optimizer == "adamw_8bit":
        # a scale belongs to 256 weights of one shard, so shards of another size have other scales
        whole = ranks.group is None or parallel.strategy == "ddp"
        shards = 1 if whole else parallel.shard_size or ranks.world
        identity["shards of the weights (optimizer.kind adamw_8bit)"] = str(shards)
    if own_negatives:
        identity["ranks (losses.cross_device_negatives false)"] = str(ranks.world)
    return identity


def model_digest(model: torch.nn.Module) -> int:
    """48 bits that identify a model by every element of its weights. 0 on the meta device."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return 0
    return int(weights_digest(model, torch.float32)[:12], 16)


def former_model_digest(model: torch.nn.Module) -> int:
    """What earlier versions recorded instead: up to 1,024 evenly spaced elements of each weight."""
    digest = hashlib.blake2b(digest_size=6)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return 0
        flat = parameter.detach().reshape(-1)
        digest.update(name.encode())
        digest.update(flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "big")


def config_digest(config: Any) -> str:
    """Hex digest of the fields of a model's config that a step depends on."""
    fields = json.dumps(states_config(config, training=True), sort_keys=True, default=repr)
    return hashlib.blake2b(fields.encode(), digest_size=6).hexdigest()


class _Holder:
    """The part of a GritLM that add_adapters changes, without tokenizer and weights."""

    def __init__(self, model: Any) -> None:
        self.model = model
