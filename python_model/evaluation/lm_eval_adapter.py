"""lm-eval on a GritLM.

    import lm_eval
    from python_model.evaluation.lm_eval_adapter import lm_eval_model

    lm_eval.simple_evaluate(model=lm_eval_model(model), tasks=["gsm8k"])

lm-eval (the extra ``eval``) is imported when the function is called.
"""

from __future__ import annotations

from typing import Any

from python_model.model.modeling import GritLM
from python_model.support.optional import require


def lm_eval_model(model: GritLM, *, batch_size: int = 8, **options: Any) -> Any:
    """lm-eval's ``HFLM`` around the patched model; ``options`` go to it (``add_bos_token``, ``max_length``, ...).

    Texts begin with the special tokens of the model's settings. Otherwise they are lm-eval's own: neither the text format nor
    the settings of embeddings apply.

    Raises:
        ValueError: the model has no language-model head, or reads prompts in both directions.
    """
    arguments = lm_eval_arguments(model)
    require("lm_eval", "eval")
    from lm_eval.models.huggingface import HFLM

    return HFLM(**arguments, batch_size=batch_size, **options)


def lm_eval_arguments(model: GritLM) -> dict[str, Any]:
    """What ``HFLM`` is given of a model: the patched model, and the tokenizer that it uses on its own; errors as
    :func:`lm_eval_model`."""
    model.check_head("evaluate generation")
    if not model.attention.generates_causally:
        raise ValueError(f"attn: expected a model that generates causally for lm-eval, got {model.attn!r}")
    formatter = model.formatter
    # texts are continued, so only leading special tokens are added
    tokenizer = formatter.tokenizer_that_adds(formatter.special_tokens.start, ())
    return {"pretrained": model.model, "tokenizer": tokenizer, "device": str(model.device)}
