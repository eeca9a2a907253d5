"""The embedding side of a GRIT model as a sentence-transformers folder.

:func:`export_sentence_transformers` writes a folder that ``SentenceTransformer(folder)`` loads without any code of this
package, and that gives the embeddings of :meth:`GritLM.encode`, with or without a prompt. With ``packed=True`` its first module
is :class:`GritTransformer`, which patches the decoder when it is loaded, so that batches of unequal lengths cost no padding; it
needs this package and ``trust_remote_code=True``.

sentence-transformers pools in the dtype of the decoder. The folder of a bfloat16 model therefore declares float32 (its weights
stay bfloat16 on disk); the packed form computes in the dtype that GritLM would choose and pools in float32, as GritLM does.

Source of the module layout: sentence-transformers >= 6.2. Its prompts are plain text before each text; the number of
prompt tokens it excludes from pooling is that of the prompt tokenised alone (``instruction_count="reference"``); that
differs from the default where tokens merge across the boundary, as may happen to a text that begins with a space.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import grit_kernels as gk
from python_model.model.card import CARD_FILE, carried_sections, model_card
from python_model.model.limits import max_positions
from python_model.model.modeling import ACTIVATIONS, GritLM
from python_model.model.prompts import TURN_END
from python_model.support.arguments import check_path
from python_model.support.files import new_folder, write_json
from python_model.support.optional import require
from python_model.support.precision import device_of, widen_if_emulated

_modules = require("sentence_transformers.sentence_transformer.modules", "sentence-transformers")
"""The modules of sentence-transformers >= 6.2, which :class:`GritTransformer` needs to be defined."""

# plain text in, hidden states out: with a chat template, every text would otherwise be wrapped in a chat message
_TEXT_ONLY: dict[str, Any] = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


_DECODER_INPUTS = (
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "output_hidden_states", "return_dict"),
    *("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)


class GritTransformer(_modules.Transformer):  # type: ignore[name-defined]
    """sentence-transformers' Transformer over a patched decoder: the forward pass packs padded batches and returns token
    embeddings in float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not {"dtype", "torch_dtype", "device_map"} & (kwargs.get("model_kwargs") or {}).keys():
            widen_if_emulated(self.auto_model, device_of(None))  # as GritLM does; moved to its device only afterwards
        gk.patch(self.auto_model)
        # a patched decoder refuses what it does not know, and a loss may hand on the outputs of another model's pass (CachedGIST)
        self.model_forward_params = set(_DECODER_INPUTS)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """``features`` with ``token_embeddings`` (B, T, hidden)."""
        features = super().forward(features, **kwargs)
        features["token_embeddings"] = features["token_embeddings"].float()
        return features


def export_sentence_transformers(
    model: GritLM,
    folder: str | os.PathLike[str],
    *,
    instructions: Mapping[str, str] | None = None,
    max_length: int = 512,
    packed: bool = False,
) -> Path:
    """Write the embedding side of ``model`` to ``folder``, atomically; returns the folder.

    Args:
        model: any GritLM whose embedding attention is ``bb`` or ``cc``.
        folder: replaced if it exists.
        instructions: instruction text by prompt name, in addition to the settings' own prompts, of which only an empty one may
            have the same name; default: ``{"query": "", "document": ""}`` if the settings have none. Each becomes the prefix of
            the model's format
            (``<|user|>\\n{instruction}\\n<|embed|>\\n``, or the bare embed marker), excluded from pooling unless the settings
            have ``embed_instruction``.
        max_length: longer texts are truncated; at most the positions that the model's config gives.
        packed: load through :class:`GritTransformer`.

    Raises:
        ValueError: a setting of the model has no counterpart in sentence-transformers; the message names it.
    """
    settings = model.settings
    _check(model, packed, max_length)
    check_path("folder", folder)
    target = Path(folder)
    formatter = model.formatter
    special = formatter.special_tokens
    with tempfile.TemporaryDirectory() as decoder_folder:
        model.decoder[0].save_pretrained(decoder_folder)
        formatter.tokenizer_that_adds(special.start, [*formatter.suffix, *special.end]).save_pretrained(decoder_folder)
        kind = GritTransformer if packed else _modules.Transformer
        transformer = kind(
            decoder_folder,
            model_kwargs={"dtype": model.model.dtype},
            modality_config=_TEXT_ONLY,
            module_output_name="token_embeddings",
            max_seq_length=max_length,
        )
        # set after loading: passed as an argument it would be dropped; once saved, a later load reads it
        config = transformer.auto_model.config
        config.is_causal = settings.attention.embedding_causal
        if settings.bidirectional_window == "full" and not settings.attention.embedding_causal:
            config.sliding_window = None
        modules: list[Any] = [
            transformer,
            # "cls" is the first token overall, prompt included; "lasttoken" never falls into the prompt
            _modules.Pooling(
                transformer.get_embedding_dimension(),
                settings.pooling_method,
                include_prompt=settings.embed_instruction or settings.pooling_method in ("cls", "lasttoken"),
            ),
        ]
        if model.projection is not None:
            head: Any = model.projection
            # an activation is applied to each number alone, so the head's first rows give the first numbers
            size = model.embedding_size
            dense = _modules.Dense(
                head.in_features, size, activation_function=ACTIVATIONS[settings.projection_activation]()
            )
            dense.linear.load_state_dict({"weight": head.weight[:size], "bias": head.bias[:size]})
            modules.append(dense)
        elif settings.truncate_dim is not None:
            # sentence-transformers cuts what is normalised already; a layer that keeps the first numbers cuts before
            cut = _modules.Dense(
                transformer.get_embedding_dimension(),
                settings.truncate_dim,
                bias=False,
                activation_function=nn.Identity(),
            )
            nn.init.eye_(cut.linear.weight)
            modules.append(cut)
        if settings.normalized:
            modules.append(_modules.Normalize())
        names = instructions or {}
        if instructions is None and not settings.prompts:
            names = {"query": "", "document": ""}
        if taken := sorted(name for name in names if settings.prompts.get(name)):
            raise ValueError(f"instructions: expected names that differ from the settings' prompts, got {taken[0]!r}")
        prefixes = {**settings.prompts, **{name: formatter.embed_instruction(text) for name, text in names.items()}}
        prompts = {name: text.replace(TURN_END, str(model.tokenizer.eos_token)) for name, text in prefixes.items()}
        tokenize: Any = transformer.tokenizer
        for name, prefix in {"": "", **prefixes}.items():
            theirs = tokenize(prompts.get(name, "") + "a")["input_ids"]
            if theirs != formatter.text(prefix, "a", max_length).input_ids:
                raise ValueError(
                    f"instructions: expected texts that sentence-transformers tokenises alike "
                    f"(it would give {theirs} for {name!r} and the text 'a'), got {prompts.get(name, '')!r}"
                )
        if len(special.end) > 1 and settings.pooling_method == "mean" and any(prompts.values()):
            raise ValueError(f"special_tokens: expected at most one after a text, got {list(special.end)}")
        with new_folder(target) as finished:
            default = settings.default_prompt_name
            library = require("sentence_transformers")
            exported = library.SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name=default)
            exported.save(str(finished), create_model_card=False)  # the card is ours
            card = model_card(
                settings,
                kind="sentence-transformers",
                name=target.name,
                sections=carried_sections(Path(str(model.model.name_or_path))),
                prompts=sorted(prompts),
                remote_code=packed,
            )
            (finished / CARD_FILE).write_text(card, encoding="utf-8")
            if not packed:
                file = finished / "config.json"
                write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "dtype": "float32"})
    return target


def _check(model: GritLM, packed: bool, max_length: int) -> None:
    settings = model.settings
    model.check_patch()
    model.check_plain_weights("export")
    if not settings.attention.embedding_is_uniform:
        raise ValueError(f"attn: expected 'bb' or 'cc' embeddings for an export, got {settings.attn!r}")
    if settings.pooling_method == "weightedmean" and not settings.embed_instruction:
        raise ValueError(
            "pooling_method: expected 'mean', 'lasttoken' or 'cls' for an export, got 'weightedmean', whose weights start at the "
            "first pooled token; sentence-transformers' start at the prompt"
        )
    if settings.embed_eos and settings.pooling_method not in ("lasttoken", "cls") and not settings.embed_instruction:
        raise ValueError(
            f"embed_eos: expected none for an export with pooling_method {settings.pooling_method!r} "
            f"(sentence-transformers counts it as part of the prompt), got {settings.embed_eos!r}"
        )
    if model.projection is not None and type(model.projection) is not nn.Linear:
        raise TypeError(f"projection: expected an nn.Linear for an export, got {type(model.projection).__name__}")
    limit = max_positions(model.model.config)
    if max_length > limit:
        raise ValueError(
            f"max_length: expected at most the model's {limit} positions, at which sentence-transformers cuts every text, "
            f"got {max_length}"
        )
    if not packed and gk.hf.depends_on_length(model.decoder[0]):
        raise ValueError(
            "rope_parameters: expected rotary embeddings that do not depend on the length of a text, or packed=True (--packed): "
            f"sentence-transformers scales them by the longest text of a batch; got {model.model.config.rope_parameters}"
        )
    layers = set(getattr(model.model.config, "layer_types", None) or ())
    if settings.bidirectional_window == "full" and not settings.attention.embedding_causal and len(layers) > 1:
        raise ValueError(
            "bidirectional_window: expected 'transformers' to export a model with two kinds of layers, got 'full'"
        )
