"""GritSettings: everything besides weights and tokenizer that affects an embedding or a reply.

Model, training, index, retrieval-augmented generation, evaluation and export all read it. It is saved as ``grit.json`` in a
checkpoint's folder, so whoever loads the checkpoint embeds and generates the way it was trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from python_model.support.arguments import check_at_least, check_choice, check_path
from python_model.support.files import write_json

PoolingMethod = Literal["mean", "weightedmean", "lasttoken", "cls"]
POOLING_METHODS: tuple[str, ...] = get_args(PoolingMethod)
EmbeddingAttention = Literal["bb", "cc", "cb"]
EMBEDDING_ATTENTION: tuple[str, ...] = get_args(EmbeddingAttention)
GenerativeAttention = Literal["cc", "bc", "il"]
GENERATIVE_ATTENTION: tuple[str, ...] = get_args(GenerativeAttention)
ATTENTION = tuple(e + g for e in EMBEDDING_ATTENTION for g in ("", *GENERATIVE_ATTENTION))
"""Four letters, or two for the embedding side only."""
InstructionCount = Literal["offsets", "reference"]
INSTRUCTION_COUNTS: tuple[str, ...] = get_args(InstructionCount)
BidirectionalWindow = Literal["transformers", "full"]
BIDIRECTIONAL_WINDOWS: tuple[str, ...] = get_args(BidirectionalWindow)
Activation = Literal["identity", "tanh", "gelu", "relu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
SpecialTokenRule = Literal["tokenizer", "bos"]
SPECIAL_TOKEN_RULES: tuple[str, ...] = get_args(SpecialTokenRule)
Format = Literal["grit", "zephyr", "plain"]
FORMATS: tuple[str, ...] = get_args(Format)

SETTINGS_FILE = "grit.json"
VERSION = 2
"""Version of grit.json; older files have none."""
_SINCE = {"truncate_dim": 2}
"""The file version in which a setting was introduced; others were in the first."""
_UNVERSIONED = (
    "pooling_method",
    "normalized",
    "attn",
    "embed_eos",
    "instruction_count",
    "bidirectional_window",
    "projection",
)


@dataclass(frozen=True)
class AttentionVariant:
    """Which tokens see which: the four letters of the paper's attention variants, parsed.

    Attributes:
        embedding: texts to embed. ``bb``: every token sees the whole text. ``cc``: causal. ``cb``: the instruction is causal, the
            rest sees everything.
        generative: conversations. ``cc``: causal. ``bc`` (prefix-LM): everything before the last reply is
            bidirectional. ``il`` (interleaved): each user turn is bidirectional within itself.
    """

    embedding: EmbeddingAttention = "bb"
    generative: GenerativeAttention = "cc"

    def __post_init__(self) -> None:
        check_choice("embedding", self.embedding, EMBEDDING_ATTENTION)
        check_choice("generative", self.generative, GENERATIVE_ATTENTION)

    @classmethod
    def parse(cls, letters: str) -> AttentionVariant:
        """Parse ``"bbcc"``: the embedding side, then the generative side; ``"bb"`` alone generates causally.

        Raises:
            ValueError: other letters.
        """
        check_choice("attn", letters, ATTENTION)
        return cls(
            cast(EmbeddingAttention, letters[:2]), cast(GenerativeAttention, letters[2:]) if letters[2:] else "cc"
        )

    def __str__(self) -> str:
        return self.embedding + self.generative

    @property
    def embedding_causal(self) -> bool:
        """Whether the tokens of a text to embed (after its instruction) see only what precedes them."""
        return self.embedding == "cc"

    @property
    def instruction_causal(self) -> bool:
        """Whether the tokens of its instruction see only what precedes them."""
        return self.embedding != "bb"

    @property
    def embedding_is_uniform(self) -> bool:
        """Whether instruction and text attend alike, so that one flag per sample suffices."""
        return self.instruction_causal == self.embedding_causal

    @property
    def generates_causally(self) -> bool:
        """Whether a prompt is read causally, so that states of what precedes it can be reused."""
        return self.generative == "cc"


@dataclass(frozen=True)
class GritSettings:
    """Everything besides weights and tokenizer that affects an embedding or a reply.

    Attributes:
        pooling_method: ``"mean"``, ``"weightedmean"`` (weights 1, 2, .. from the first pooled token), ``"lasttoken"``, ``"cls"``.
        normalized: L2-normalise embeddings.
        attn: the attention variant in letters: ``bb``, ``cc`` or ``cb`` for texts to embed, then ``cc``, ``bc`` (prefix-LM) or
            ``il`` (interleaved turns) for conversations (see ``AttentionVariant``); ``cc`` is appended to two letters.
        embed_eos: text appended to each text to embed.
        instruction_count: which leading tokens are excluded from pooling. ``"offsets"``: those that end inside the instruction.
            ``"reference"``: as many as the instruction has when tokenised alone, as in the public implementation.
        embed_instruction: pool the instruction as well.
        bidirectional_window: how far a bidirectional token sees in a model with a sliding window: ``"transformers"`` (the
            window, on both sides) or ``"full"``.
        projection: output size of the embedding head, a linear layer with bias after pooling; None: no head.
        projection_activation: the activation after it: ``"identity"``, ``"tanh"``, ``"gelu"`` or ``"relu"``.
        truncate_dim: embeddings are truncated to this size before normalisation, for a model that was trained for
            it (``losses.matryoshka_dims``); None: whole.
        special_tokens: the tokens added around a text where special tokens are requested. ``"tokenizer"``: what the checkpoint's
            tokenizer itself adds. ``"bos"``: BOS at the start, whether or not the tokenizer adds one.
        format: text format, ``"grit"``, ``"zephyr"`` (an EOS ends each instruction and user turn) or ``"plain"`` (an instruction
            is prepended as it is; there are no roles, hence no conversations).
        prompts: instructions by name, for ``encode(prompt_name=..)``.
        default_prompt_name: which of them is prepended to a text without an instruction.

    Raises:
        ValueError, TypeError: an invalid value; the message names the setting.
    """

    pooling_method: PoolingMethod = "mean"
    normalized: bool = True
    attn: str = "bbcc"
    embed_eos: str = ""
    instruction_count: InstructionCount = "offsets"
    embed_instruction: bool = False
    bidirectional_window: BidirectionalWindow = "transformers"
    projection: int | None = None
    projection_activation: Activation = "identity"
    truncate_dim: int | None = None
    special_tokens: SpecialTokenRule = "tokenizer"
    format: Format = "grit"
    prompts: Mapping[str, str] = field(default_factory=dict, hash=False)
    default_prompt_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("normalized", "embed_instruction"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if not isinstance(self.embed_eos, str):
            raise TypeError(f"embed_eos: expected a str, got {self.embed_eos!r}")
        for name, accepted in (
            ("pooling_method", POOLING_METHODS),
            ("instruction_count", INSTRUCTION_COUNTS),
            ("bidirectional_window", BIDIRECTIONAL_WINDOWS),
            ("projection_activation", ACTIVATIONS),
            ("special_tokens", SPECIAL_TOKEN_RULES),
            ("format", FORMATS),
        ):
            check_choice(name, getattr(self, name), accepted)
        texts = isinstance(self.prompts, Mapping) and all(
            isinstance(x, str) for pair in self.prompts.items() for x in pair
        )
        if not texts:
            raise TypeError(f"prompts: expected texts by name, got {self.prompts!r}")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ValueError(
                f"default_prompt_name: expected one of {sorted(self.prompts)}, got {self.default_prompt_name!r}"
            )
        object.__setattr__(self, "attn", str(AttentionVariant.parse(str(self.attn))))
        if self.embed_instruction and not self.attention.embedding_is_uniform:
            raise ValueError(
                f"embed_instruction: expected False with attn {self.attn!r}, which treats it separately, got True"
            )
        for name in ("projection", "truncate_dim"):
            if (size := getattr(self, name)) is None:
                continue
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: expected an int or None, got {size!r}")
            check_at_least(name, size, 1)
        if self.projection is not None:
            if self.truncate_dim is not None and self.truncate_dim > self.projection:
                raise ValueError(
                    f"truncate_dim: expected at most the projection's {self.projection}, got {self.truncate_dim}"
                )
        elif self.projection_activation != "identity":
            raise ValueError(
                f"projection_activation: expected 'identity' without a projection, got {self.projection_activation!r}"
            )

    @property
    def attention(self) -> AttentionVariant:
        """``attn``, parsed."""
        return AttentionVariant.parse(self.attn)

    def changed(self, **changes: Any) -> GritSettings:
        """A copy with ``changes``; None leaves a setting as it is."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def of_embeddings(self) -> dict[str, Any]:
        """The settings that an embedding depends on, as plain values.

        The generative attention is left out, and so are format and prompts: they affect an embedding only through its prefix,
        which the caller provides; only the prompt of a text without a prefix is included.
        """
        values = asdict(self)
        for name in ("format", "prompts", "default_prompt_name"):
            del values[name]
        return {**values, "attn": self.attention.embedding, "default_prompt": self.default_prompt}

    @property
    def default_prompt(self) -> str:
        """The prompt prepended to a text without an instruction."""
        return "" if self.default_prompt_name is None else self.prompts[self.default_prompt_name]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``grit.json`` to ``folder``."""
        check_path("folder", folder)
        write_json(Path(folder) / SETTINGS_FILE, {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> GritSettings:
        """The settings in a ``grit.json``; a file from before there were versions is read with the defaults of its time.

        Raises:
            ValueError: a newer version, unknown or missing fields, invalid values, or not JSON.
        """
        check_path("file", file)
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not a JSON file ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file}: expected an object, got {type(content).__name__}")
        try:
            return cls(**_upgraded(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from None


NAMES: tuple[str, ...] = tuple(entry.name for entry in fields(GritSettings))
"""Of all settings."""


def _upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file of any version, converted to the current one."""
    version = content.get("version", 0)
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= VERSION:
        raise ValueError(
            f"version: expected at most {VERSION}, got {version!r}; this checkpoint needs a newer grit_kernels"
        )
    values = {name: value for name, value in content.items() if name != "version"}
    known = [name for name in NAMES if _SINCE.get(name, 1) <= version] if version else _UNVERSIONED
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown fields {unknown}; expected {sorted(known)}")
    if not version:
        # None meant the default, and every text began with BOS whatever the tokenizer said
        values = {name: value for name, value in values.items() if value is not None}
        return {**values, "special_tokens": "bos"}
    if missing := sorted(set(known) - set(values)):
        raise ValueError(f"missing fields {missing}")
    return values
