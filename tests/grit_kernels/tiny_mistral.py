"""A Mistral of two layers whose samples are longer than its window, and padded batches for it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

WINDOW = 6


def tiny_config(**changes: Any) -> Any:
    return transformers.MistralConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **{"head_dim": 32, "num_hidden_layers": 2, "sliding_window": WINDOW, "max_position_embeddings": 256, **changes},
    )


def tiny_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():  # the default scale of 0.02 would let attention be uniform, and hide wrong masks
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


IDS = torch.randint(3, 97, (4, 14), generator=torch.Generator().manual_seed(0))
FLAGS = torch.tensor([True, False, False, True])


def masks() -> dict[str, Tensor]:
    out = {name: torch.ones_like(IDS) for name in ("none", "right", "left", "both", "holes")}
    out["right"][1, 9:], out["right"][2, 3:] = 0, 0
    out["left"][1, :5], out["left"][3, :2] = 0, 0
    out["both"][0, :3], out["both"][1, 10:], out["both"][2, :1], out["both"][2, 8:] = 0, 0, 0, 0
    out["holes"][0, 4:7], out["holes"][1, 2:4], out["holes"][1, 12:], out["holes"][3, :2] = 0, 0, 0, 0
    return out


MASKS = masks()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def output_cache(output: Any) -> Any:
    """The KV cache in a model's output, under the name this version of transformers gives it."""
    return next((value for name, value in output.items() if name in ("cache", "past_key_values")), None)


def positions(mask: Tensor) -> Tensor:
    """Explicit positions, the same for both models: with holes and left padding the defaults of generate() and forward differ."""
    return (mask.cumsum(1) - 1).clamp(min=0)
