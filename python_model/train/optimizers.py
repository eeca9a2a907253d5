"""What a step updates: the trained weights and the temperature, each with its own optimiser."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from grit_kernels.hf.compat import decoder_of, layers_of
from python_model.support.optional import require
from python_model.train.balance import limit_factor, total_norm
from python_model.train.config import LossConfig, OptimizerConfig
from python_model.train.distributed import Ranks
from python_model.train.model import TrainingModel

BETAS = (0.9, 0.999)
# frozen weights (of a model with adapters) come from the checkpoint that the run started from
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class Weights:
    """What an evaluation measures: a state with the trained weights and the temperature alone, a third of that of ``optimizers``,
    and readable from one."""

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        """As nested dicts of tensors; sharded ones stay sharded."""
        mine = self._optimizers
        found: dict[str, Any] = {"model": get_model_state_dict(mine.model, options=_OPTIONS)}
        if mine.log_temperature is not None:
            found["temperature"] = {"log_temperature": mine.log_temperature.detach()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        set_model_state_dict(self._optimizers.model, state_dict["model"], options=_OPTIONS)
        if self._optimizers.log_temperature is not None:
            with torch.no_grad():
                self._optimizers.log_temperature.copy_(state_dict["temperature"]["log_temperature"])


class Optimizers:
    """AdamW, with moments in 32 or 8 bits, or Muon over the trainable weights of ``model`` (plain or wrapped for the ranks),
    with a warm-up and a schedule.

    Raises:
        ImportError: ``adamw_8bit`` without torchao.
        ValueError: the model has no trainable weight.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, losses: LossConfig, ranks: Ranks, *, steps: int, embeds: bool
    ) -> None:
        self.model, self.config, self.losses, self.ranks, self.steps = model, config, losses, ranks, steps
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("model: expected at least one trainable weight, got none")
        matrices = hidden_matrices(model) if config.kind == "muon" else []
        by_muon = {id(p) for p in matrices}
        others = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in by_muon]
        # decaying norms and biases regularises nothing
        groups = [
            {"params": [p for name, p in others if _is_matrix(name, p)], "weight_decay": config.weight_decay},
            {"params": [p for name, p in others if not _is_matrix(name, p)], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizers: list[torch.optim.Optimizer] = []
        if groups and config.kind == "adamw_8bit":
            self.optimizers.append(require_8_bits().AdamW8bit(groups, lr=config.lr, betas=BETAS))
        elif groups:
            self.optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, fused=True))
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        self.log_temperature: nn.Parameter | None = None
        self.temperature_optimizer: torch.optim.Optimizer | None = None
        if losses.learn_temperature and embeds:
            start = torch.tensor([math.log(losses.temperature)], device=ranks.device)
            self.log_temperature = nn.Parameter(start)
            self.temperature_optimizer = torch.optim.AdamW(
                [self.log_temperature], lr=config.lr, weight_decay=0.0, betas=BETAS
            )

    def lr(self, step: int) -> float:
        """Learning rate of the step with this index: rising during the warm-up, then following ``schedule``.

        A function of the step alone, so resuming needs no state. It is transformers' schedule of the same name shifted by one
        step, so that no step has rate 0.
        """
        config = self.config
        warmup = max(1, round(self.steps * config.warmup_ratio))
        if step < warmup:
            return config.lr * (step + 1) / warmup
        left = (self.steps - step) / max(1, self.steps - warmup + 1)
        if config.schedule == "constant":
            return config.lr
        if config.schedule == "cosine":
            return config.lr * 0.5 * (1 - math.cos(math.pi * left))
        if config.schedule == "warmup_stable_decay":
            return config.lr * min(1.0, (self.steps - step) / max(1, round(self.steps * config.decay_ratio)))
        return config.lr * left

    def clip(self) -> float:
        """Clip the gradients; returns their norm before clipping, the same on all ranks."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = total_norm([p.grad for p in trained if p.grad is not None])
        factor = limit_factor(norm, self.config.max_grad_norm)
        for p in trained:
            if p.grad is not None and factor != 1.0:
                p.grad.mul_(factor)
        return norm

    def update(self, step: int) -> None:
        """Take an optimiser step and clear the gradients."""
        optimizers = list(self.optimizers)
        if self.log_temperature is not None and self.temperature_optimizer is not None:
            optimizers.append(self.temperature_optimizer)
            if self.ranks.group is not None and self.log_temperature.grad is not None:
                dist.all_reduce(self.log_temperature.grad, group=self.ranks.group)
                self.log_temperature.grad /= self.ranks.world
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's, an input of its compiled step
                    group["lr"].fill_(self.lr(step))
                else:
                    group["lr"] = self.lr(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @property
    def weights(self) -> Weights:
        """The part of the state that an evaluation measures."""
        return Weights(self)

    @property
    def temperature(self) -> float:
        """The current temperature of the contrastive loss."""
        if self.log_temperature is None:
            return self.losses.temperature
        return float(self.log_temperature.detach().exp())

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as nested dicts of tensors; sharded ones stay sharded."""
        found: dict[str, Any] = {
            "model": get_model_state_dict(self.model, options=_OPTIONS),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers, options=_OPTIONS)["state"],
        }
        if self.log_temperature is not None and self.temperature_optimizer is not None:
            state = self.temperature_optimizer.state[self.log_temperature]
            zero = torch.zeros_like(self.log_temperature)
            found["temperature"] = {
                "log_temperature": self.log_temperature.detach(),
                "step": state.get("step", torch.zeros(())),
                "exp_avg": state.get("exp_avg", zero),
                "exp_avg_sq": state.get("exp_avg_sq", zero.clone()),
            }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything that changes."""
        set_model_state_dict(self.model, state_dict["model"], options=_OPTIONS)
        groups = get_optimizer_state_dict(self.model, self.optimizers, options=_OPTIONS)["param_groups"]
        state: Any = {"state": state_dict["optimizer"], "param_groups": groups}
        set_optimizer_state_dict(self.model, self.optimizers, state, options=_OPTIONS)
        if self.log_temperature is not None and self.temperature_optimizer is not None:
            saved: dict[str, Tensor] = dict(state_dict["temperature"])
            with torch.no_grad():
                self.log_temperature.copy_(saved.pop("log_temperature"))
            self.temperature_optimizer.state[self.log_temperature] = saved


def require_8_bits() -> Any:
    """torchao's optimisers; an ImportError says how to install them."""
    return require("torchao.optim", "8bit")


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices of the decoder's layers, except a mixture's router, whose rows are classes like those of a head.

    ``model`` is a TrainingModel, plain or wrapped for the ranks, or one of transformers.
    """
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    decoder = inner.grit.decoder[0] if isinstance(inner, TrainingModel) else decoder_of(inner)
    return [
        p
        for layer in layers_of(decoder)
        for name, p in layer.named_parameters()
        if p.requires_grad
        and p.ndim == 2
        and _is_matrix(name, p)
        and not name.endswith((".gate.weight", ".router.weight"))
    ]


def _is_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether a weight is a matrix, or one for each expert; biases of experts and norms of heads have two dimensions, too."""
    module, _, own = name.rpartition(".")
    return p.ndim >= 2 and not own.endswith("bias") and "norm" not in module.rpartition(".")[2]
