"""Settings of a training run, in groups. Every field is an option of ``grit train`` (``--batch.chunk_tokens 4096``)
and a key of its YAML file. Functions take the group they need; only the trainer sees all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from python_model.data.config import BatchConfig, DataConfig
from python_model.model.hub import check_hub_name
from python_model.settings import GritSettings
from python_model.support.checked import Checked, Count, CountOrNone, Location, NotNegative, Positive, Share

Mode = Literal["unified", "embedding", "generative"]
OptimizerKind = Literal["adamw", "adamw_8bit", "muon"]


GritChanges = make_dataclass(
    "GritChanges",
    [(name, hint | None, None) for name, hint in get_type_hints(GritSettings).items()],
    bases=(Checked,),
)
"""The settings of :class:`GritSettings` given by a run; None: as in the checkpoint it starts from."""
GritChanges.__doc__ = GritSettings.__doc__
GritChanges.__module__ = __name__


@dataclass
class ModelConfig(Checked):
    """The model to train, and how it is computed.

    Attributes:
        name: checkpoint to start from (folder or name), or ``smollm2-135m`` for the small model of ``grit fetch-model``.
        architecture: folder with a ``config.json`` from which ``dry_run`` builds the model if the checkpoint is unavailable.
        bf16: compute in bfloat16 with FP32 weights; default: unless the CPU emulates its products, which takes longer.
        gradient_checkpointing: recompute activations in the backward pass; with ``selective`` all of them but attention, which is
            kept.
        compile: run each of the decoder's layers through torch.compile.
        lora_rank: rank of the adapters trained on every linear layer instead of all weights; 0: train all weights.
        lora_alpha: the adapters' output is multiplied by ``lora_alpha / lora_rank``.
        lora_dropout: dropout probability of the adapters' inputs.
        lora_targets: comma-separated names of the linear layers with an adapter, or ``all-linear``.
        quantization: ``nf4`` loads the frozen weights in 4 bits (QLoRA; needs bitsandbytes and a GPU); empty: as they are.
    """

    name: Location = "smollm2-135m"
    architecture: str = ""
    bf16: bool | None = None
    gradient_checkpointing: bool | Literal["selective"] = False
    compile: bool = False
    lora_rank: CountOrNone = 0
    lora_alpha: Count = 64
    lora_dropout: Share = 0.1
    lora_targets: str = "all-linear"
    quantization: Literal["", "nf4"] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantization and not self.lora_rank:
            raise ValueError(f"quantization: expected '' without adapters (lora_rank 0), got {self.quantization!r}")


@dataclass
class OptimizerConfig(Checked):
    """The optimiser, its schedule, and gradient clipping.

    Attributes:
        kind: ``adamw``; ``adamw_8bit``, the same with its two moments in 8 bits and a scale per 256 weights (torchao; a quarter
            of the memory); or ``muon`` for the matrices of the decoder's layers (orthogonalised momentum; half of AdamW's memory)
            and AdamW for everything else: embeddings, heads, routers, experts, norms and biases. Muon's steps are scaled to the
            size of AdamW's, so the same learning rate suits both.
        lr: peak learning rate, reached at the end of the warm-up.
        warmup_ratio: share of the steps used for the warm-up.
        schedule: the learning rate after the warm-up: ``linear`` or ``cosine`` decay to 0, ``constant``, or
            ``warmup_stable_decay``, which is constant until a linear decay over the last steps.
        decay_ratio: share of the steps in which ``warmup_stable_decay`` decays.
        weight_decay: weight decay of matrices; norms and biases have none.
        objective_grad_norm: clip the gradient of each objective to this norm, times the weight of its losses, before the two are
            added, so that neither dominates; 0: no limit. Both norms are measured and logged anyway.
        max_grad_norm: clip the sum of both gradients to this norm.
    """

    kind: OptimizerKind = "adamw"
    lr: Positive = 2e-5
    warmup_ratio: Share = 0.03
    schedule: Literal["linear", "cosine", "warmup_stable_decay", "constant"] = "linear"
    decay_ratio: Share = 0.2
    weight_decay: NotNegative = 0.0
    objective_grad_norm: NotNegative = 0.0
    max_grad_norm: Positive = 1.0


@dataclass
class LossConfig(Checked):
    """The two losses.

    Attributes:
        temperature: temperature of the contrastive loss.
        learn_temperature: train the temperature as well (its logarithm, with the same learning rate).
        matryoshka_dims: average the contrastive loss over embeddings of full size and truncated to each of these sizes, so that
            truncated embeddings work as well as possible (Matryoshka, arXiv 2205.13147); ``[]``: full size only.
        contrastive_weight: weight of the contrastive loss.
        distillation_weight: weight of the divergence (KL) between a teacher's scores of a query's passages (``pos_scores`` and
            ``neg_scores`` of the rows) and the model's own, both after a softmax; 0: scores are not used.
        teacher_temperature: divides the teacher's scores before the softmax; 1 suits logits, cosines need about ``temperature``.
        generative_weight: weight of the next-token loss.
        router_loss_weight: weight of a mixture-of-experts model's load-balancing loss; default: the model config's
            ``router_aux_loss_coef``.
        in_batch_negatives: every passage is a negative of every other query; False: only the query's own hard negatives.
        cross_device_negatives: contrast queries with the passages of all ranks, not only of their own.
        symmetric: also contrast each positive with all queries.
        mask_duplicates: do not use a passage with the same text as a query's positive as a negative of that query.
        generative_loss: ``mixed``: mean over the tokens; ``sample``: mean over the conversations of each one's token mean;
            ``token``: sum over the tokens, divided by the number of conversations.
        generative_group: with ``mixed``, conversations per token mean (the paper's "mix 32 -> 8" has 32 in each of 8 means); 0:
            one mean over all conversations of the step.
    """

    temperature: Positive = 0.02
    learn_temperature: bool = False
    matryoshka_dims: list[Count] = field(default_factory=list)
    contrastive_weight: NotNegative = 1.0
    distillation_weight: NotNegative = 0.0
    teacher_temperature: Positive = 1.0
    generative_weight: NotNegative = 1.0
    router_loss_weight: NotNegative | None = None
    in_batch_negatives: bool = True
    cross_device_negatives: bool = True
    symmetric: bool = False
    mask_duplicates: bool = True
    generative_loss: Literal["mixed", "token", "sample"] = "mixed"
    generative_group: CountOrNone = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generative_group and self.generative_loss != "mixed":
            raise ValueError(
                f"generative_group: expected 0 with generative_loss {self.generative_loss!r}, got {self.generative_group}"
            )


@dataclass
class ParallelConfig(Checked):
    """Several ranks (torchrun).

    Attributes:
        strategy: ``fsdp`` shards weights, gradients and optimiser, ``ddp`` replicates them.
        shard_size: ranks that share one copy of the weights (hybrid sharding: each such group holds a replica); 0: all ranks.
        reduce_each_chunk: sum gradients over the ranks after each chunk instead of once per objective: more traffic, but FSDP
            then holds no unsharded gradient.
        cpu_offload: keep sharded weights and optimiser in host memory.
        device_memory: GiB per rank that ``dry_run`` assumes if there is no GPU.
    """

    strategy: Literal["fsdp", "ddp"] = "fsdp"
    shard_size: CountOrNone = 0
    reduce_each_chunk: bool = False
    cpu_offload: bool = False
    device_memory: Positive = 80.0


@dataclass
class EvaluationConfig(Checked):
    """Evaluation on held-out rows during the run.

    Attributes:
        data: folder with ``corpus.jsonl`` and ``test/`` (``grit data`` builds one, also from your own rows); empty: no
            evaluation.
        every: steps between evaluations; the last step is always evaluated.
        metric: decides which state is best; ``checkpoint/`` is that state.
        patience: stop after this many evaluations without improvement; 0: never.
        max_length: maximum tokens of a text.
    """

    data: str = ""
    every: Count = 100
    metric: Literal["ndcg_at_10", "mrr_at_10", "recall_at_10", "next_token_loss"] = "ndcg_at_10"
    patience: CountOrNone = 0
    max_length: Count = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data and not Path(self.data).is_dir():
            raise FileNotFoundError(f"data: there is no folder {self.data}")


@dataclass
class LoggingConfig(Checked):
    """What is saved and logged of a run.

    Attributes:
        save_steps: steps between saved states; 0: save only when interrupted.
        save_total: number of states kept.
        async_save: write states while training continues; they are copied to host memory first.
        resume: continue from the newest state in ``output_dir``.
        trackers: any of ``tensorboard``, ``wandb``, ``trackio``, in addition to ``log.jsonl``.
        exploding_loss: stop if the loss exceeds its mean over the last 50 steps by this much; 0: only if it is not finite.
        peak_tflops: peak TFLOP/s of a device in the precision of the run, of which ``mfu`` in the log is the share used; 0: the
            rate of a large matrix product, measured at the start.
        profile_steps: number of steps recorded with torch's profiler in ``profile/``, starting with the third; 0: none.
    """

    save_steps: CountOrNone = 0
    save_total: Count = 2
    async_save: bool = False
    resume: bool = True
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    exploding_loss: NotNegative = 20.0
    peak_tflops: NotNegative = 0.0
    profile_steps: CountOrNone = 0


@dataclass
class TrainConfig(Checked):
    """One GRIT training run.

    Attributes:
        mode: ``unified``, or one of the two objectives alone.
        steps: optimiser steps.
        output_dir: receives ``checkpoint/``, ``states/``, ``log.jsonl`` and ``loss.png``.
        seed: determines the data order, the choice of positives and negatives, dropout and new weights.
        deterministic: make torch use deterministic algorithms.
        push_to_hub: ``owner/name`` on the Hugging Face hub that ``checkpoint/`` is uploaded to at the end, as a private model if
            it is new; needs ``hf auth login`` or ``HF_TOKEN``. Empty: nowhere.
        dry_run: print memory per rank and tokens per step, then exit; no weights are loaded.
        model: the model to train, and how it is computed.
        grit: what affects an embedding or a reply; settings not given are those of the checkpoint that the run starts from.
        data: which rows are used, and how they become samples.
        batch: the samples of a step, and the chunks in which they are computed.
        optimizer: the optimiser, its schedule, and gradient clipping.
        losses: the two losses.
        parallel: several ranks.
        evaluation: evaluation on held-out rows during the run.
        logging: what is saved and logged.
    """

    mode: Mode = "unified"
    steps: Count = 40
    output_dir: Location = "grit_output"
    seed: CountOrNone = 0
    deterministic: bool = False
    push_to_hub: str = ""
    dry_run: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    grit: GritChanges = field(default_factory=GritChanges)  # type: ignore[valid-type]
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            GritSettings().changed(**self.settings_given)  # checks how they go together
        except (ValueError, TypeError) as error:
            raise ValueError(f"grit.{error}") from error
        group, data, batch = self.losses.generative_group, self.data, self.batch
        if group and self.generates and batch.generative_batch_size % group:
            raise ValueError(
                f"losses.generative_group: expected a divisor of batch.generative_batch_size "
                f"({batch.generative_batch_size}), got {group}"
            )
        longest = max(
            max(data.query_max_len, data.passage_max_len) if self.embeds else 0,
            data.generative_max_len if self.generates else 0,
        )
        if batch.chunk_tokens and batch.chunk_tokens < longest:
            raise ValueError(
                f"batch.chunk_tokens: expected 0 or at least the longest sample ({longest} tokens), got {batch.chunk_tokens}"
            )
        if not self.losses.in_batch_negatives and self.embeds and data.train_group_size < 2:
            raise ValueError(
                f"data.train_group_size: expected hard negatives (>= 2) without losses.in_batch_negatives, "
                f"got {data.train_group_size}"
            )
        if self.losses.distillation_weight and self.embeds and data.train_group_size < 2:
            raise ValueError(
                f"data.train_group_size: expected at least 2 passages to compare with losses.distillation_weight, "
                f"got {data.train_group_size}"
            )
        if self.logging.async_save and self.optimizer.kind == "adamw_8bit":
            raise ValueError(
                "logging.async_save: expected false with optimizer.kind adamw_8bit, whose moments torch cannot copy for that, "
                "got true"
            )
        if self.push_to_hub:
            check_hub_name("push_to_hub", self.push_to_hub)
        if self.dry_run:
            return
        if not data.train_data:
            raise ValueError("data.train_data: expected a jsonl file or a folder of them, got nothing")
        if "://" not in data.train_data and not Path(data.train_data).exists():
            raise FileNotFoundError(f"data.train_data: there is no file or folder {data.train_data}")

    @property
    def embeds(self) -> bool:
        """Whether the run trains embeddings."""
        return self.mode != "generative"

    @property
    def generates(self) -> bool:
        """Whether the run trains next-token prediction."""
        return self.mode != "embedding"

    @property
    def settings_given(self) -> dict[str, Any]:
        """The model's settings that override those of the checkpoint."""
        return {name: value for name, value in asdict(self.grit).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The run of nested values, ``{"batch": {"chunk_tokens": 0}}``, or of dotted keys, ``{"batch.chunk_tokens": 0}``.

        Raises:
            ValueError: an unknown field, one of version 0.1 (the message gives its new name), or an invalid value.
            FileNotFoundError: there is no such file or folder of data.
        """
        nested: dict[str, Any] = {}
        for key, value in flatten(values).items():
            group, _, name = key.rpartition(".")
            (nested.setdefault(group, {}) if group else nested)[name] = value
        for group in GROUPS:
            if group in nested:
                try:
                    nested[group] = _TOP[group](**nested[group])
                except ValueError as error:
                    raise ValueError(f"{group}.{error}") from error
                except FileNotFoundError as error:
                    raise FileNotFoundError(f"{group}.{error}") from error
        return cls(**nested)

    def card_settings(self) -> dict[str, Any]:
        """The settings of a model card, by dotted name: those that differ from their defaults, without paths and without those in
        ``grit.json``, which the card lists anyway."""
        defaults = dotted(asdict(type(self)(dry_run=True)))
        return {
            name: value
            for name, value in dotted(asdict(self)).items()
            if value != defaults[name]
            and name not in _NOT_IN_CARD
            and name.partition(".")[0] not in ("grit", "logging")
        }

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as :meth:`from_dict` accepts them."""
        return asdict(self)


_TOP = get_type_hints(TrainConfig, include_extras=True)
GROUPS = tuple(name for name, hint in _TOP.items() if is_dataclass(hint))
TYPES: dict[str, Any] = {name: hint for name, hint in _TOP.items() if name not in GROUPS}
TYPES |= {
    f"{group}.{name}": hint
    for group in GROUPS
    for name, hint in get_type_hints(_TOP[group], include_extras=True).items()
}
"""The type of every setting, by its dotted name."""
_NOT_IN_CARD = frozenset(
    (
        *("output_dir", "dry_run", "push_to_hub", "model.name", "model.architecture", "data.train_data"),
        *("data.token_cache", "data.data_workers", "evaluation.data"),
    )
)
"""Paths, and settings without effect on the result, which do not belong in a model card."""
_RENAMED = {"model": "model.name", "learning_rate": "optimizer.lr", "parallel": "parallel.strategy"}
MOVED = {name.partition(".")[2]: name for name in TYPES if "." in name} | _RENAMED
"""New names of the flat settings of version 0.1, and full names of settings given without their group."""
REMOVED = ("plain_text", "reference_masking", "gradient_scale")
"""Settings of version 0.1 that reproduced bugs of the public implementation."""


def dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with dotted keys: ``{"batch": {"chunk_tokens": 0}}`` as ``{"batch.chunk_tokens": 0}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in GROUPS and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`dotted`, with each key checked.

    Raises:
        ValueError: an unknown field, or one of version 0.1 (the message gives its new name); a group that is not a mapping.
    """
    flat = dotted(values)
    for key, value in flat.items():
        if key in GROUPS and (value is None or key not in MOVED):
            raise ValueError(f"{key}: expected a mapping of settings, got {value!r}")
        if key not in TYPES:
            raise ValueError(unknown(key))
    return flat


def unknown(key: str) -> str:
    """The message about a key that is not a setting."""
    if key in MOVED:
        return f"{key}: expected its new name {MOVED[key]} (settings are grouped since version 0.2)"
    if key in REMOVED:
        return f"{key}: this setting of version 0.1 was removed; it reproduced a bug of the public implementation"
    import difflib

    near = difflib.get_close_matches(key, TYPES, n=1)
    return f"{key}: unknown setting" + (f"; did you mean {near[0]}?" if near else "")
