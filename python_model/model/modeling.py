"""GritLM: one set of weights that embeds and generates, with the call signatures of the reference class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import grit_kernels as gk
from python_model.model.checkpoint import (
    HEAD_FILE,
    WHERE,
    check_no_head,
    check_place,
    one_flag_per_sample,
    reading,
    saved_head,
    saved_limit,
    saved_settings,
)
from python_model.model.limits import check_prompts, max_positions, warn_beyond_positions
from python_model.model.parallel import run_on_devices
from python_model.model.prompts import EncodedSample, Formatter
from python_model.settings import NAMES, AttentionVariant, GritSettings, InstructionCount, PoolingMethod
from python_model.support.arguments import check_at_least, check_choice, check_path
from python_model.support.precision import device_of, widen_if_emulated

MODES = ("unified", "embedding", "generative")
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}
"""The module of each ``projection_activation``."""
TOKENS_PER_PACK = 16384
"""encode() fills each forward pass with up to this many tokens."""
MAX_LENGTH = 512
"""encode() reads up to this many tokens of a text by default, unless the checkpoint says otherwise."""


class GritLM(nn.Module):
    """A patched decoder with a tokenizer, pooling and text formats.

    Args:
        model_name_or_path: a transformers checkpoint of a supported decoder.
        mode: ``"unified"`` and ``"generative"`` load the language-model head, ``"embedding"`` does not.
        pooling_method: ``"mean"``, ``"weightedmean"``, ``"lasttoken"`` or ``"cls"``.
        normalized: L2-normalise embeddings.
        projection: output size of the embedding head, which is read from ``embedding_head.safetensors`` if the checkpoint has one
            and random otherwise (with a warning if ``is_inference``).
        attn: the attention variant, see :class:`python_model.settings.AttentionVariant`.
        embed_eos: text appended to each text to embed (``lasttoken`` models).
        device: where to put the model; default: CUDA if available, else the CPU.
        is_inference: eval mode, and encode() without gradients.
        instruction_count: how the leading tokens excluded from pooling are counted, see
            :class:`python_model.settings.GritSettings`.
        from_pretrained_kwargs: the other settings of :class:`python_model.settings.GritSettings` by name; the rest is passed to
            ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...), and what locates files to the tokenizer's as well.
            ``dtype``: default: the checkpoint's, but float32 on a CPU that emulates products in 16 bits.

    Settings not given are those saved with the checkpoint, in a folder or on the hub: ``grit.json``, else what
    sentence-transformers saves (``modules.json`` and the files beside it). Attributes: ``settings`` (all of them), ``model``,
    ``tokenizer``, ``projection`` (a module or None), ``max_length`` (how many tokens of a text :meth:`encode` reads by default:
    512, or as many as sentence-transformers reads of a folder that it saved; not kept by :meth:`save_pretrained`), ``texts_cut``
    (how many texts were truncated so far, by any method or function that has a limit).
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

        check_place(model_name_or_path)
        path = str(model_name_or_path)
        check_choice("mode", mode, MODES)
        self.mode = mode
        where = {name: from_pretrained_kwargs[name] for name in WHERE if name in from_pretrained_kwargs}
        others = {name: from_pretrained_kwargs.pop(name) for name in NAMES if name in from_pretrained_kwargs}
        self.settings = (saved_settings(path, **where) or GritSettings()).changed(
            pooling_method=pooling_method,
            normalized=normalized,
            projection=projection,
            attn=attn,
            embed_eos=embed_eos,
            instruction_count=instruction_count,
            **others,
        )
        if self.settings.projection is None:
            check_no_head(path, subfolder=where.get("subfolder") or "")
        loader: Any = AutoModel if mode == "embedding" else AutoModelForCausalLM
        where_to = device_of(device)
        with reading(path):
            arguments = one_flag_per_sample(path, from_pretrained_kwargs)
            loaded, report = loader.from_pretrained(path, output_loading_info=True, **arguments)
        if is_inference and (missing := sorted(report["missing_keys"])):
            warnings.warn(
                f"mode: {path} has no {', '.join(missing[:3])}, which mode={mode!r} initialises at random; load an embedding "
                "model without a language-model head with mode='embedding'",
                stacklevel=2,
            )
        if not {"dtype", "torch_dtype", "device_map"} & from_pretrained_kwargs.keys():
            widen_if_emulated(loaded, where_to)
        self.model = gk.patch(loaded, bidirectional_window=self.settings.bidirectional_window)
        remote = {
            name: from_pretrained_kwargs[name] for name in ("trust_remote_code",) if name in from_pretrained_kwargs
        }
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", **where, **remote)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        special = [token for token in self.tokenizer.all_special_tokens if len(token) > 1]
        for name, text in self.settings.prompts.items():
            if found := [token for token in special if token in text]:
                raise ValueError(f"prompts: expected plain texts, got the special token {found[0]!r} in {name!r}")
        self.decoder = [
            self.model if mode == "embedding" else self.model.get_decoder()
        ]  # in a list: not registered twice
        self.projection: nn.Module | None = None
        if self.settings.projection is not None:
            self.projection = nn.Linear(self.model.config.hidden_size, self.settings.projection, dtype=self.model.dtype)
            head = saved_head(path, **where)
            if head is not None:
                self.projection.load_state_dict(head)
            elif is_inference:
                warnings.warn(
                    f"projection: there is no {HEAD_FILE} in {path}, so the embedding head is initialised at random",
                    stacklevel=2,
                )
        whole = self.settings.projection or self.model.config.hidden_size
        if (size := self.settings.truncate_dim) is not None and size > whole:
            raise ValueError(f"truncate_dim: expected at most the embedding's {whole}, got {size}")
        positions = max_positions(self.model.config)
        self.max_length = saved_limit(path, self.tokenizer, positions, **where) or MAX_LENGTH
        self.texts_cut = 0
        self.is_inference = is_inference
        if "device_map" not in from_pretrained_kwargs:
            self.to(where_to)
        self.train(not is_inference)

    @property
    def pooling_method(self) -> PoolingMethod:
        """``settings.pooling_method``."""
        return self.settings.pooling_method

    @property
    def normalized(self) -> bool:
        """``settings.normalized``."""
        return self.settings.normalized

    @property
    def attn(self) -> str:
        """``settings.attn``, four letters."""
        return self.settings.attn

    @property
    def attention(self) -> AttentionVariant:
        """``attn``, parsed."""
        return self.settings.attention

    @property
    def embed_eos(self) -> str:
        """``settings.embed_eos``."""
        return self.settings.embed_eos

    @property
    def embedding_size(self) -> int:
        """The size of an embedding."""
        return self.settings.truncate_dim or self.settings.projection or int(self.model.config.hidden_size)

    @property
    def instruction_count(self) -> InstructionCount:
        """``settings.instruction_count``."""
        return self.settings.instruction_count

    @property
    def formatter(self) -> Formatter:
        """Turns texts, prompts and conversations into token ids in the format this model was trained with."""
        return Formatter(self.tokenizer, self.settings)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate`` of the model; causal attention. ValueError beyond the model's positions."""
        self.check_head("generate")
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if ids is not None:
            mask = kwargs.get("attention_mask")
            longest = ids.shape[-1] if mask is None or mask.dim() != 2 else int(mask.sum(dim=-1).max())
            check_prompts(self.model.config, [longest], kwargs.get("max_new_tokens") or 1)
        return self.model.generate(*args, **kwargs)

    def check_head(self, purpose: str) -> None:
        """ValueError if the model was loaded without the language-model head that ``purpose`` (a verb) needs."""
        if self.mode == "embedding":
            raise ValueError(
                f"mode: expected 'unified' or 'generative' to {purpose}, got 'embedding', which loads no language-model head"
            )

    def check_patch(self) -> None:
        """Check that the decoder attends as ``settings`` say, which are what is saved and exported, and may be called by itself.

        Raises:
            ValueError: the decoder is no longer patched, or was patched again with another ``bidirectional_window``; PEFT applies
                adapters around the model (see ``grit_kernels.hf.check_unwrapped``).
        """
        gk.hf.check_unwrapped(self.model)
        options = gk.hf.patch_options(self.decoder[0])
        if options is None:
            raise ValueError("model: expected a patched decoder, as it is loaded, got one after unpatch()")
        if (window := options["bidirectional_window"]) != self.settings.bidirectional_window:
            raise ValueError(
                f"bidirectional_window: expected {self.settings.bidirectional_window!r} as in the settings, got a decoder "
                f"patched with {window!r}; load the model with GritLM(.., bidirectional_window={window!r}) instead"
            )

    def check_plain_weights(self, purpose: str, *, quantized: bool = False) -> None:
        """Check that nothing but weights has to be written to ``purpose`` (a verb).

        Raises:
            ValueError: there are adapters of PEFT, or (unless ``quantized``) weights that are not plain floating-point numbers.
        """
        for name, module in self.model.named_modules():
            if type(module).__module__.partition(".")[0] == "peft":
                raise ValueError(
                    f"model: expected plain weights to {purpose}, got {name or 'a model'} of type {type(module).__name__}; merge "
                    "the adapters first: model.model = model.model.merge_and_unload()"
                )
        for name, weight in () if quantized else self.model.named_parameters():
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                raise ValueError(
                    f"model: expected plain weights to {purpose}, got {type(weight).__name__} of {weight.dtype} in {name}"
                )

    def hidden_states(self, input_ids: Tensor, pack: gk.SamplePack) -> Tensor:
        """(tokens) ids of a pack -> (tokens, hidden) states after the last norm, each sample in its own attention mode."""
        self.check_patch()
        return self.decoder[0](input_ids=input_ids[None], sample_pack=pack).last_hidden_state[0]

    def embedding_pack(self, lengths: Sequence[int], instruction_lens: Sequence[int]) -> gk.SamplePack:
        """The pack of texts to embed under this model's attention variant."""
        causal = self.attention.embedding_causal
        pack = gk.SamplePack.from_lengths(lengths, causal, instruction_lens)
        if not self.attention.embedding_is_uniform:
            places = torch.arange(pack.tokens) - torch.repeat_interleave(pack.cu_seqlens[:-1], pack.lengths)
            behind = places >= torch.repeat_interleave(pack.instruction_lens, pack.lengths)
            hi = gk.span_hi(pack.cu_seqlens, behind)
            pack = gk.SamplePack.from_lengths(lengths, causal, instruction_lens, hi=hi)
        return pack.to(self.device)

    def pool(self, hidden: Tensor, cu_seqlens: Tensor, instruction_lens: Tensor) -> Tensor:
        """(tokens, hidden) of texts to embed -> float32 (B, size): pooled, projected, cut, normalised.

        The head is applied after pooling. For a linear head this equals applying it to every token, as the public implementation
        does (pooling weights sum to one), at a fraction of the work.
        """
        pooled = gk.pool(hidden, cu_seqlens=cu_seqlens, instruction_lens=instruction_lens, method=self.pooling_method)
        if self.projection is not None:
            pooled = ACTIVATIONS[self.settings.projection_activation]()(_in_float32(self.projection, pooled))
        pooled = pooled[:, : self.settings.truncate_dim]
        return nn.functional.normalize(pooled, dim=-1) if self.normalized else pooled

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int = 256,
        max_length: int | None = None,
        instruction: str = "",
        embed_instruction: bool = False,
        get_cache: bool = False,
        convert_to_tensor: bool = False,
        recast: bool = False,
        add_special_tokens: bool = True,
        *,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        show_progress_bar: bool | None = None,
        devices: Sequence[str | torch.device] | None = None,
    ) -> Any:
        """Embed texts: a float32 array (texts, size), one-dimensional for a single string.

        Args:
            sentences: one text or several; an empty one is an error that names its index.
            batch_size: maximum number of texts in a forward pass (which also holds at most 16384 tokens).
            max_length: longer texts are truncated; instruction and special tokens count. Default: the attribute ``max_length``.
            instruction: the formatted prefix, e.g. ``prompts.embed_instruction("Find the article")``; by default that of
                ``prompt_name``.
            embed_instruction: pool the instruction as well (always done if the settings say so).
            get_cache: also return the key-value states as a ``DynamicCache`` (single batch only), right-padded, with the number
                of used slots per text in its attribute ``seqlens``.
            convert_to_tensor: return a tensor on the model's device instead of a NumPy array.
            recast: round the embedding to the model's dtype (the paper's "BF16 embedding").
            add_special_tokens: add what ``settings.special_tokens`` says, usually what the tokenizer adds.
            prompt_name: one of ``settings.prompts``; by default ``settings.default_prompt_name``, if there is one.
            truncate_dim: truncate embeddings to this size (and renormalise them, if the settings say so), at most those
                that the settings give.
            show_progress_bar: by default only if there is more than one batch.
            devices: distribute the batches over copies of the model on these devices (not with gradients); the copies live for
                the duration of the call.
        """
        single = isinstance(sentences, str)
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        if not texts:
            raise ValueError("sentences: expected at least one text, got an empty list")
        if embed_instruction and not self.attention.embedding_is_uniform:
            raise ValueError(
                f"embed_instruction: expected False with attn {self.attn!r}, which treats it separately, got True"
            )
        if instruction and prompt_name is not None:
            raise ValueError(f"prompt_name: expected none beside an instruction, got {prompt_name!r}")
        if truncate_dim is not None and not 1 <= truncate_dim <= self.embedding_size:
            raise ValueError(f"truncate_dim: expected 1 to {self.embedding_size}, got {truncate_dim}")
        instruction = instruction or self._prompt(prompt_name)
        limit = self.max_length if max_length is None else max_length
        samples = self._encode_texts(texts, instruction, limit, add_special_tokens)
        skips = [0 if embed_instruction else s.instruction_len for s in samples]
        batches = token_batches([len(s) for s in samples], batch_size)
        if get_cache and len(batches) > 1:
            raise ValueError(f"get_cache: expected one batch, got {len(texts)} texts in {len(batches)} batches")
        if get_cache:
            batches = [sorted(batches[0])]  # the cache's rows are in the order of the texts
        cache = None
        if get_cache:
            chosen = [samples[i] for i in batches[0]]
            pack = self.embedding_pack([len(s) for s in chosen], [skips[i] for i in batches[0]])
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_inference):
                hidden, cache = self._cached_states(chosen, pack)
                rows = list(self._pool_batch(hidden, pack, recast))
        else:
            bar = len(batches) > 1 if show_progress_bar is None else show_progress_bar
            with tqdm(total=len(texts), disable=not bar, unit="text", leave=False) as progress:
                rows = self._embed_batches(samples, skips, batches, recast, progress, devices)
        embeddings = torch.stack(rows)
        if truncate_dim is not None and truncate_dim < self.embedding_size:
            embeddings = embeddings[:, :truncate_dim]
            if self.normalized:
                embeddings = nn.functional.normalize(embeddings, dim=-1)
        embeddings = embeddings[0] if single else embeddings
        result: Any = embeddings if convert_to_tensor else embeddings.detach().float().cpu().numpy().astype(np.float32)
        return (result, cache) if get_cache else result

    def _prompt(self, name: str | None) -> str:
        if name is None:
            return self.settings.default_prompt
        check_choice("prompt_name", name, sorted(self.settings.prompts))
        return self.settings.prompts[name]

    def _with_prompt(self, options: dict[str, Any], *names: str) -> dict[str, Any]:
        """encode()'s options, with the first of the prompts ``names`` that there is, unless they choose an instruction."""
        found = [name for name in names if name in self.settings.prompts]
        if not found or options.get("instruction") or options.get("prompt_name") is not None:
            return options
        return {**options, "prompt_name": found[0]}

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
        """One row per sample, on this model's device; each batch runs on whichever device is free."""

        def embed(model: GritLM, batch: list[int]) -> Tensor:
            chosen = [samples[i] for i in batch]
            pack = model.embedding_pack([len(s) for s in chosen], [skips[i] for i in batch])
            ids = torch.tensor([t for s in chosen for t in s.input_ids], device=model.device)
            # grad mode is per thread, so each call sets it
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_inference):
                return model._pool_batch(model.hidden_states(ids, pack), pack, recast).to(self.device)

        rows: dict[int, Tensor] = {}
        for batch, pooled in run_on_devices(self, batches, embed, devices):
            rows |= zip(batch, pooled, strict=True)
            progress.update(len(batch))
        return [rows[index] for index in range(len(samples))]

    def encode_queries(self, queries: str | Sequence[str], **kwargs: Any) -> Any:
        """:meth:`encode`, under the name that retrieval benchmarks call for queries; by default with the prompt ``query``, if
        the settings have one."""
        return self.encode(queries, **self._with_prompt(kwargs, "query"))

    def encode_corpus(self, corpus: str | dict[str, str] | Sequence[str | dict[str, str]], **kwargs: Any) -> Any:
        """:meth:`encode` of documents; a dict is read as ``title + " " + text``, without the space if the title is empty. By
        default with the first prompt of ``document``, ``passage`` and ``corpus`` that the settings have."""
        kwargs = self._with_prompt(kwargs, "document", "passage", "corpus")
        if isinstance(corpus, str):
            return self.encode(corpus, **kwargs)
        documents = [corpus] if isinstance(corpus, dict) else list(corpus)
        texts = [
            d if isinstance(d, str) else f"{d['title']} {d['text']}" if d.get("title") else d["text"] for d in documents
        ]
        return self.encode(texts, **kwargs)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Save a plain transformers checkpoint (safetensors), the tokenizer, and ``grit.json`` with this class's settings."""
        check_path("path", path)
        folder = Path(path)
        if self.projection is not None and type(self.projection) is not nn.Linear:
            raise TypeError(
                f"projection: expected an nn.Linear to save, got {type(self.projection).__name__}; merge it first"
            )
        # transformers writes, and reads again, the weights that it has quantised itself
        self.check_plain_weights("save", quantized=hasattr(self.model.config, "quantization_config"))
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.projection is not None:
            from safetensors.torch import save_file

            save_file(self.projection.state_dict(), folder / HEAD_FILE)
        else:
            (folder / HEAD_FILE).unlink(missing_ok=True)  # of a model that was there before
        self.settings.save(folder)

    def _encode_texts(
        self, texts: list[str], prefix: str, max_length: int, add_special_tokens: bool
    ) -> list[EncodedSample]:
        samples = []
        formatter = self.formatter
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"sentences: entry {index}: expected a str, got {type(text).__name__}")
            try:
                samples.append(formatter.text(prefix, text, max_length, add_special_tokens=add_special_tokens))
            except ValueError as error:
                raise ValueError(f"sentences: entry {index}: {error}") from None
        self.texts_cut += sum(sample.truncated for sample in samples)
        warn_beyond_positions(self, map(len, samples))
        return samples

    def _cached_states(self, samples: list[EncodedSample], pack: gk.SamplePack) -> tuple[Tensor, Any]:
        """Hidden states of the pack, and the cache filled by a padded pass (a transformers cache holds padded rows)."""
        self.check_patch()
        if pack.hi is not None:
            raise ValueError("get_cache: expected attn 'bb' or 'cc', got 'cb', which fills no cache")
        longest = pack.max_seqlen
        ids = torch.full((len(samples), longest), self.tokenizer.pad_token_id, device=self.device)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            ids[row, : len(sample)] = torch.tensor(sample.input_ids, device=self.device)
            mask[row, : len(sample)] = 1
        cache = gk.hf.new_cache()
        states = self.decoder[0](
            input_ids=ids, attention_mask=mask, is_causal=pack.causal, cache=cache
        ).last_hidden_state
        cache.seqlens = pack.lengths
        return states[mask.bool()], cache


def token_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices sorted by length, split into packs of at most ``batch_size`` texts and TOKENS_PER_PACK tokens."""
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


def _in_float32(layer: nn.Module, rows: Tensor) -> Tensor:
    """``layer(rows)`` with its weights cast to float32; the layer is called as a module, so wrappers and hooks apply."""
    half = {name: p.float() for name, p in layer.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    with torch.autocast(rows.device.type, enabled=False):
        if not half:
            return layer(rows.float())
        return torch.func.functional_call(layer, half, (rows.float(),))
