"""The embedding side of a GRIT model as a sentence-transformers folder.

:func:`export_sentence_transformers` writes a folder that ``SentenceTransformer(folder)`` loads without any code of this
package, with the same embeddings. With ``packed=True`` its first module is :class:`GritTransformer`, which patches the decoder
when it is loaded, so that a batch of unequal lengths costs no padding; loading it needs this package and
``trust_remote_code=True``.

Source of the module layout: sentence-transformers >= 6.2. Its prompts are plain text in front of each text; the number of
prompt tokens it leaves out of the pooling is that of the prompt tokenised alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grit_kernels as gk
from python_model.model.modeling import GritLM
from python_model.model.prompts import embed_instruction
from python_model.support.files import new_folder

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
except ImportError as error:
    raise ImportError(
        "sentence-transformers >= 6.2 is needed: pip install 'grit-kernels[sentence-transformers]'"
    ) from error

# plain text in, hidden states out: a tokenizer with a chat template would otherwise wrap every text in a chat message
_TEXT_ONLY: dict[str, Any] = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class GritTransformer(Transformer):
    """sentence-transformers' Transformer over a patched decoder: padded batches are packed inside the forward pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        gk.patch(self.auto_model)


def export_sentence_transformers(
    model: GritLM,
    folder: str | os.PathLike[str],
    *,
    instructions: Mapping[str, str] | None = None,
    max_length: int = 512,
    packed: bool = False,
) -> Path:
    """Write the embedding side of ``model`` to ``folder``, whole or not at all; returns the folder.

    Args:
        model: any GritLM whose embedding attention is ``bb`` or ``cc``.
        folder: replaced if it exists.
        instructions: prompt name to instruction text; default ``{"query": "", "document": ""}``. Each becomes the prompt
            ``<|user|>\\n{instruction}\\n<|embed|>\\n`` (or the bare embed marker), left out of the pooling.
        max_length: longer texts lose their end.
        packed: load through :class:`GritTransformer`.

    Raises:
        ValueError: the model's attention variant, pooling or text suffix has no counterpart in sentence-transformers.
    """
    letters = model.attn[:2]
    if letters not in ("bb", "cc"):
        raise ValueError(f"model: got attn {model.attn!r}, accepted for an export are 'bb' and 'cc' embeddings")
    if model.pooling_method == "weightedmean":
        raise ValueError(
            "model: got pooling_method 'weightedmean', whose weights start at the first pooled token; sentence-transformers' "
            "start at the prompt. Accepted for an export are 'mean', 'lasttoken' and 'cls'"
        )
    if model.embed_eos:
        raise ValueError(f"model: got embed_eos {model.embed_eos!r}, accepted for an export is none")
    target = Path(folder)
    with tempfile.TemporaryDirectory() as decoder_folder:
        model.decoder[0].save_pretrained(decoder_folder)
        model.tokenizer.save_pretrained(decoder_folder)
        kind = GritTransformer if packed else Transformer
        transformer = kind(
            decoder_folder,
            model_kwargs={"dtype": model.model.dtype},
            modality_config=_TEXT_ONLY,
            module_output_name="token_embeddings",
            max_seq_length=max_length,
        )
        # set after loading: given as an argument it would be dropped; saved, it is what a later load reads
        transformer.auto_model.config.is_causal = letters == "cc"
        modules: list[Any] = [
            transformer,
            # "cls" is the first token of all, prompt included
            Pooling(
                transformer.get_embedding_dimension(),
                model.pooling_method,
                include_prompt=model.pooling_method == "cls",
            ),
        ]
        if model.projection is not None:
            import torch

            dense = Dense(
                model.projection.in_features, model.projection.out_features, activation_function=torch.nn.Identity()
            )
            dense.linear.load_state_dict(model.projection.state_dict())
            modules.append(dense)
        if model.normalized:
            modules.append(Normalize())
        names = {"query": "", "document": ""} if instructions is None else instructions
        prompts = {name: _bos_text(model.tokenizer) + embed_instruction(text) for name, text in names.items()}
        with new_folder(target) as finished:
            SentenceTransformer(modules=modules, prompts=prompts).save(str(finished))
    return target


def _bos_text(tokenizer: Any) -> str:
    """The BOS token as text where the tokenizer does not put it in front by itself."""
    if tokenizer.bos_token_id is None or tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return ""
    return str(tokenizer.bos_token)
