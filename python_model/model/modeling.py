"""GritLM: one set of weights that embeds and generates, with the call signatures of the reference class."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import grit_kernels as gk
from python_model.model.parallel import run_on_devices
from python_model.model.prompts import EncodedSample, encode_text
from python_model.support.arguments import check_at_least, check_choice
from python_model.support.files import write_json

MODES = ("unified", "embedding", "generative")
PoolingMethod = Literal["mean", "weightedmean", "lasttoken", "cls"]
POOLING_METHODS: tuple[str, ...] = get_args(PoolingMethod)
InstructionCount = Literal["offsets", "reference"]
INSTRUCTION_COUNTS: tuple[str, ...] = get_args(InstructionCount)
EMBEDDING_ATTENTION = ("bb", "cc", "cb")
GENERATIVE_ATTENTION = ("cc", "bc", "il")
ATTENTION = tuple(e + g for e in EMBEDDING_ATTENTION for g in ("", *GENERATIVE_ATTENTION))
"""Four letters, or two for the embedding side alone."""
SETTINGS_FILE = "grit.json"
HUB_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "trust_remote_code")
"""Arguments of ``from_pretrained`` that model and tokenizer share."""
TOKENS_PER_PACK = 16384
"""encode() fills one forward pass up to this many tokens."""


class GritLM(nn.Module):
    """A patched decoder with a tokenizer, pooling and text formats.

    Args:
        model_name_or_path: a transformers checkpoint of a supported decoder.
        mode: ``"unified"`` and ``"generative"`` load the language-model head, ``"embedding"`` does not.
        pooling_method: ``"mean"``, ``"weightedmean"``, ``"lasttoken"`` or ``"cls"``.
        normalized: L2-normalise embeddings.
        projection: output size of a linear embedding head (with bias), read from ``embedding_head.safetensors`` where the
            checkpoint has one, else random (with ``is_inference`` that is a warning).
        attn: attention of embedding instruction, embedding sample, then generative instruction and sample. ``bb``, ``cc``, ``cb``
            for embedding; ``cc``, ``bc`` (prefix-LM: the prompt before the last reply is bidirectional) or ``il`` (interleaved:
            each user turn is bidirectional within itself) for generation. Two letters mean ``cc`` for generation.
        embed_eos: text appended to each text to embed (``lasttoken`` models).
        device: where to put the model; default CUDA if there is one, else the CPU.
        is_inference: eval mode, and encode() without gradients.
        instruction_count: which leading tokens are not pooled. ``"offsets"``: those that end inside of the instruction.
            ``"reference"``: as many as the instruction has when it is tokenised alone, as the public implementation counts.
        from_pretrained_kwargs: passed to ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...); what says where the
            files are is passed to the tokenizer's as well.

    Settings saved with a checkpoint (``grit.json``) are the defaults of arguments that are not given.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        mode: str = "unified",
        pooling_method: str | None = None,
        normalized: bool | None = None,
        projection: int | None = None,
        attn: str | None = None,
        embed_eos: str | None = None,
        device: str | torch.device | None = None,
        is_inference: bool = True,
        instruction_count: InstructionCount | None = None,
        **from_pretrained_kwargs: Any,
    ) -> None:
        super().__init__()
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        path = str(model_name_or_path)
        folder = Path(path) / from_pretrained_kwargs.get("subfolder", "")
        saved = _saved_settings(folder)
        check_choice("mode", mode, MODES)
        self.mode = mode
        method = _first(pooling_method, saved, "mean", "pooling_method")
        check_choice("pooling_method", method, POOLING_METHODS)
        self.pooling_method = cast(PoolingMethod, method)
        self.normalized = bool(_first(normalized, saved, True, "normalized"))
        self.embed_eos = str(_first(embed_eos, saved, "", "embed_eos"))
        count = _first(instruction_count, saved, "offsets", "instruction_count")
        check_choice("instruction_count", count, INSTRUCTION_COUNTS)
        self.instruction_count = cast(InstructionCount, count)
        self.attn: str = _first(attn, saved, "bbcc", "attn")
        check_choice("attn", self.attn, ATTENTION)
        self.bidirectional_window: str = saved.get("bidirectional_window", "transformers")
        projection = _first(projection, saved, None, "projection")
        if not Path(path).exists() and path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"model_name_or_path: there is no folder {path}")
        loader = AutoModel if mode == "embedding" else AutoModelForCausalLM
        self.model = gk.patch(
            loader.from_pretrained(path, **from_pretrained_kwargs), bidirectional_window=self.bidirectional_window
        )
        found_at = {name: value for name, value in from_pretrained_kwargs.items() if name in HUB_OPTIONS}
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", **found_at)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.decoder = [
            self.model if mode == "embedding" else self.model.get_decoder()
        ]  # in a list: not registered twice
        self.projection: nn.Linear | None = None
        if projection is not None:
            self.projection = nn.Linear(self.model.config.hidden_size, projection, dtype=self.model.dtype)
            head = folder / "embedding_head.safetensors"
            if head.exists():
                from safetensors.torch import load_file

                self.projection.load_state_dict(load_file(head))
            elif is_inference:
                warnings.warn(f"projection: there is no {head}, so the embedding head starts at random", stacklevel=2)
        self.is_inference = is_inference
        if "device_map" not in from_pretrained_kwargs:
            self.to(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        self.train(not is_inference)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate`` of the model; causal attention."""
        if self.mode == "embedding":
            raise ValueError("mode: 'embedding' loads no language-model head; load with mode='unified' to generate")
        return self.model.generate(*args, **kwargs)

    def hidden_states(self, input_ids: Tensor, pack: gk.SamplePack) -> Tensor:
        """(tokens) ids of a pack -> (tokens, hidden) states after the last norm, each sample in its own attention mode."""
        return self.decoder[0](input_ids=input_ids[None], sample_pack=pack).last_hidden_state[0]

    def embedding_pack(self, lengths: Sequence[int], instruction_lens: Sequence[int]) -> gk.SamplePack:
        """The pack of texts to embed under this model's attention variant."""
        causal = self.attn[:2] == "cc"
        pack = gk.SamplePack.from_lengths(lengths, causal, instruction_lens)
        if self.attn[:2] == "cb":
            hi = gk.causal_instruction_hi(pack.cu_seqlens, pack.instruction_lens, pack.tokens)
            pack = gk.SamplePack.from_lengths(lengths, causal, instruction_lens, hi=hi)
        return pack.to(self.device)

    def pool(self, hidden: Tensor, cu_seqlens: Tensor, instruction_lens: Tensor) -> Tensor:
        """(tokens, hidden) of texts to embed -> float32 (B, size): pooled, projected, normalised.

        The linear head is applied after pooling: weights sum to one, so the two commute, at a hundredth of the work.
        """
        pooled = gk.pool(hidden, cu_seqlens=cu_seqlens, instruction_lens=instruction_lens, method=self.pooling_method)
        if self.projection is not None:
            pooled = nn.functional.linear(pooled, self.projection.weight.float(), self.projection.bias.float())
        return nn.functional.normalize(pooled, dim=-1) if self.normalized else pooled

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int = 256,
        max_length: int = 512,
        instruction: str = "",
        embed_instruction: bool = False,
        get_cache: bool = False,
        convert_to_tensor: bool = False,
        recast: bool = False,
        add_special_tokens: bool = True,
        *,
        show_progress_bar: bool | None = None,
        devices: Sequence[str | torch.device] | None = None,
    ) -> Any:
        """Embed texts: a float32 array (texts, size), one-dimensional for a single string.

        Args:
            sentences: a text or texts; an empty one is an error that names its index.
            batch_size: most texts in one forward pass (a pass also ends at 16384 tokens).
            max_length: longer texts lose their end; counts instruction and special tokens.
            instruction: the formatted prefix, e.g. ``prompts.embed_instruction("Find the article")``.
            embed_instruction: pool the instruction as well.
            get_cache: also return the key-value states as a ``DynamicCache`` (one batch only), right-padded, with the number of
                real slots per text in its attribute ``seqlens``.
            convert_to_tensor: return a tensor on the model's device instead of a NumPy array.
            recast: round the embedding to the model's dtype (the paper's "BF16 embedding").
            add_special_tokens: start with BOS.
            show_progress_bar: default: when there is more than one batch.
            devices: share the batches among copies of the model on these devices (with gradients: not accepted); the copies
                live as long as the call.
        """
        single = isinstance(sentences, str)
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        if not texts:
            raise ValueError("sentences: expected at least one text, got an empty list")
        samples = self._encode_texts(texts, instruction, max_length, add_special_tokens)
        skips = [0 if embed_instruction else s.instruction_len for s in samples]
        batches = _batches([len(s) for s in samples], batch_size)
        if get_cache and len(batches) > 1:
            raise ValueError(f"get_cache: expected one batch, got {len(texts)} texts in {len(batches)} batches")
        if get_cache:
            batches = [sorted(batches[0])]  # the rows of the cache follow the texts
        cache = None
        if get_cache:
            chosen = [samples[i] for i in batches[0]]
            pack = self.embedding_pack([len(s) for s in chosen], [skips[i] for i in batches[0]])
            with torch.set_grad_enabled(not self.is_inference):
                hidden, cache = self._cached_states(chosen, pack)
                rows = list(self._pool_batch(hidden, pack, recast))
        else:
            bar = len(batches) > 1 if show_progress_bar is None else show_progress_bar
            with tqdm(total=len(texts), disable=not bar, unit="text", leave=False) as progress:
                rows = self._embed_batches(samples, skips, batches, recast, progress, devices)
        embeddings = torch.stack(rows)
        embeddings = embeddings[0] if single else embeddings
        result: Any = embeddings if convert_to_tensor else embeddings.detach().float().cpu().numpy().astype(np.float32)
        return (result, cache) if get_cache else result

    def _pool_batch(self, hidden: Tensor, pack: gk.SamplePack, recast: bool) -> Tensor:
        pooled = self.pool(hidden, pack.cu_seqlens, pack.instruction_lens)
        return pooled.to(hidden.dtype) if recast else pooled

    def _embed_batches(
        self,
        samples: list[EncodedSample],
        skips: list[int],
        batches: list[list[int]],
        recast: bool,
        progress: Any,
        devices: Sequence[str | torch.device] | None,
    ) -> list[Tensor]:
        """One row per sample, on this model's device; batches run where a device is free."""

        def embed(model: GritLM, batch: list[int]) -> Tensor:
            chosen = [samples[i] for i in batch]
            pack = model.embedding_pack([len(s) for s in chosen], [skips[i] for i in batch])
            ids = torch.tensor([t for s in chosen for t in s.input_ids], device=model.device)
            # grad mode belongs to a thread, so each call sets it
            with torch.set_grad_enabled(not self.is_inference):
                return model._pool_batch(model.hidden_states(ids, pack), pack, recast).to(self.device)

        rows: dict[int, Tensor] = {}
        for batch, pooled in run_on_devices(self, batches, embed, devices):
            rows |= zip(batch, pooled, strict=True)
            progress.update(len(batch))
        return [rows[index] for index in range(len(samples))]

    def encode_queries(self, queries: str | Sequence[str], **kwargs: Any) -> Any:
        """:meth:`encode`, under the name retrieval benchmarks call for queries."""
        return self.encode(queries, **kwargs)

    def encode_corpus(self, corpus: str | dict[str, str] | Sequence[str | dict[str, str]], **kwargs: Any) -> Any:
        """:meth:`encode` of documents; a dict gives ``title + " " + text``, without the space when the title is empty."""
        if isinstance(corpus, str):
            return self.encode(corpus, **kwargs)
        documents = [corpus] if isinstance(corpus, dict) else list(corpus)
        texts = [
            d if isinstance(d, str) else f"{d['title']} {d['text']}" if d.get("title") else d["text"] for d in documents
        ]
        return self.encode(texts, **kwargs)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """A plain transformers checkpoint (safetensors), the tokenizer, and ``grit.json`` with this class's settings."""
        folder = Path(path)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.projection is not None:
            from safetensors.torch import save_file

            save_file(self.projection.state_dict(), folder / "embedding_head.safetensors")
        settings = {
            "pooling_method": self.pooling_method,
            "normalized": self.normalized,
            "attn": self.attn,
            "embed_eos": self.embed_eos,
            "instruction_count": self.instruction_count,
            "bidirectional_window": self.bidirectional_window,
            "projection": None if self.projection is None else self.projection.out_features,
        }
        write_json(folder / SETTINGS_FILE, settings)

    def _encode_texts(
        self, texts: list[str], prefix: str, max_length: int, add_special_tokens: bool
    ) -> list[EncodedSample]:
        samples = []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"sentences: entry {index} is {type(text).__name__}, accepted is a str")
            try:
                samples.append(
                    encode_text(
                        self.tokenizer,
                        prefix,
                        text,
                        max_length,
                        suffix=self.embed_eos,
                        add_special_tokens=add_special_tokens,
                        instruction_count=self.instruction_count,
                    )
                )
            except ValueError as error:
                raise ValueError(f"sentences: entry {index}: {error}") from None
        return samples

    def _cached_states(self, samples: list[EncodedSample], pack: gk.SamplePack) -> tuple[Tensor, Any]:
        """Hidden states of the pack, and the cache a padded pass fills (a transformers cache holds padded rows)."""
        from transformers import DynamicCache

        if pack.hi is not None:
            raise ValueError("get_cache: attn 'cb' fills no cache; accepted are 'bb' and 'cc'")
        longest = pack.max_seqlen
        ids = torch.full((len(samples), longest), self.tokenizer.pad_token_id, device=self.device)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            ids[row, : len(sample)] = torch.tensor(sample.input_ids, device=self.device)
            mask[row, : len(sample)] = 1
        # without a config the cache keeps every state; transformers' default would drop those beyond the sliding window
        cache: Any = DynamicCache()
        states = self.decoder[0](
            input_ids=ids, attention_mask=mask, is_causal=pack.causal, past_key_values=cache
        ).last_hidden_state
        cache.seqlens = pack.lengths
        return states[mask.bool()], cache


def _batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices sorted by length, cut into packs of at most ``batch_size`` texts and TOKENS_PER_PACK tokens."""
    check_at_least("batch_size", batch_size, 1)
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == batch_size or tokens + lengths[index] > TOKENS_PER_PACK:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches


def _saved_settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _first(given: Any, saved: dict[str, Any], default: Any, key: str) -> Any:
    if given is not None:
        return given
    return saved[key] if saved.get(key) is not None else default
