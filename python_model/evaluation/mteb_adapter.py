"""mteb on a GritLM: an encoder for its tasks, and a search that reranks what it finds with the generative side.

    import mteb
    from python_model.evaluation.mteb_adapter import mteb_encoder

    mteb.evaluate(mteb_encoder(model), mteb.get_tasks(tasks=["SciFact"]))

mteb (the extra ``eval``) is imported when these functions are called. A warning says how many texts were truncated.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from python_model.generate.rerank import PASSAGE_TOKENS, Method, rerank
from python_model.model.modeling import GritLM
from python_model.support.optional import require


def _meta(name: str, revision: str) -> Any:
    # the score that training, index and search use; mteb's default is the cosine, another one where vectors have any length
    meta = require("mteb.models.model_meta", "eval")
    overwrites = {"name": name, "revision": revision, "similarity_fn_name": meta.ScoringFunction.DOT_PRODUCT}
    return meta.ModelMeta.create_empty(overwrites=overwrites)


def prefix_for(model: GritLM, encoder: Any, task_metadata: Any, prompt_type: Any) -> str:
    """The prefix for one side of a task: its instruction, or none for the documents of retrieval, as in the paper.

    mteb passes the same instruction for both sides if a task has only one; for retrieval that is the queries'.
    """
    side = getattr(prompt_type, "value", prompt_type)
    if task_metadata.type in ("Retrieval", "InstructionRetrieval") and side == "document":
        return model.formatter.embed_instruction("")
    return model.formatter.embed_instruction(encoder.get_instruction(task_metadata, prompt_type) or "")


def query_text(row: Any) -> str:
    """The text of a query, followed by the instruction that some tasks have for each, as mteb's own models read it.

    Raises:
        ValueError: the query is a conversation.
    """
    if not isinstance(row["text"], str):
        raise ValueError(f"queries: expected texts, got a conversation ({row['id']!r})")
    return f"{row['text']} {row['instruction']}" if row.get("instruction") is not None else row["text"]


def _encode(model: GritLM, texts: Sequence[str], max_length: int, **options: Any) -> Any:
    """:meth:`GritLM.encode`, with a warning about truncated texts."""
    before = model.texts_cut
    vectors = model.encode(texts, max_length=max_length, **options)
    _tell_cut(model.texts_cut - before, len(texts), "max_length", max_length)
    return vectors


def _tell_cut(cut: int, texts: int, name: str, limit: int) -> None:
    if cut:
        said = f"{name}: {cut} of {texts} texts are longer than {limit} tokens; what follows is ignored"
        warnings.warn(said, stacklevel=3)


def _encode_options(given: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """mteb's ``encode_kwargs`` as those of :meth:`GritLM.encode`.

    Raises:
        ValueError, TypeError: one that would be ignored, such as a ``precision`` in which the vectors are not.
    """
    options = dict(given)
    if (precision := options.pop("precision", None)) not in (None, "float32"):
        raise ValueError(f"precision: expected 'float32', in which vectors are scored, got {precision!r}")
    found = {"batch_size": batch_size} | {
        n: options.pop(n) for n in ("batch_size", "show_progress_bar") if n in options
    }
    if unknown := [name for name, value in options.items() if value is not None]:
        raise TypeError(f"encode_kwargs: expected any of batch_size, show_progress_bar, precision, got {unknown}")
    return found


class GritEncoder:
    """What :func:`mteb_encoder` adds to mteb's base class, from which it has ``get_instruction``."""

    def __init__(self, model: GritLM, *, max_length: int = 512, batch_size: int = 256) -> None:
        self.model, self.max_length, self.batch_size = model, max_length, batch_size

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The vectors of the texts in mteb's batches."""
        texts = [text for batch in inputs for text in batch["text"]]
        return _encode(
            self.model,
            texts,
            self.max_length,
            instruction=prefix_for(self.model, self, task_metadata, prompt_type),
            **_encode_options(kwargs, self.batch_size),
        )


def mteb_encoder(
    model: GritLM,
    *,
    name: str = "local/grit",
    revision: str = "0",
    max_length: int = 512,
    batch_size: int = 256,
) -> Any:
    """An mteb encoder. Its results are filed under ``name`` (with one slash) and ``revision``."""
    require("mteb", "eval")
    from mteb.models.abs_encoder import AbsEncoder

    class Encoder(GritEncoder, AbsEncoder):
        mteb_model_meta = _meta(name, revision)

    return Encoder(model, max_length=max_length, batch_size=batch_size)


def mteb_search(
    model: GritLM,
    *,
    method: Method = "likelihood",
    rerank_top: int = 10,
    passage_tokens: int = PASSAGE_TOKENS,
    name: str = "local/grit-rerank",
    revision: str = "0",
    max_length: int = 512,
) -> Any:
    """An mteb search model: exact search with embeddings, whose ``rerank_top`` best hits are reordered by :func:`rerank`, which
    reads ``passage_tokens`` tokens of each.

    The reranked documents keep their scores as a set, reassigned in the new order, so they stay ahead of the others.
    """

    class Search:
        def __init__(self) -> None:
            self.mteb_model_meta = _meta(name, revision)
            self._encoder = mteb_encoder(model, max_length=max_length)
            self._keys: list[str] = []
            self._texts: list[str] = []
            self._vectors = torch.zeros(0, 0)

        def index(self, corpus: Any, *, task_metadata: Any, encode_kwargs: Any = None, **kwargs: Any) -> None:
            self._keys = [str(row["id"]) for row in corpus]
            titles = [row.get("title") or "" for row in corpus]
            texts = [row["text"] for row in corpus]
            self._texts = [f"{title} {text}" if title else text for title, text in zip(titles, texts, strict=True)]
            self._vectors = self._embed(self._texts, task_metadata, "document", encode_kwargs)

        def search(
            self,
            queries: Any,
            *,
            task_metadata: Any,
            top_k: int,
            top_ranked: Any = None,
            encode_kwargs: Any = None,
            **kwargs: Any,
        ) -> dict[str, dict[str, float]]:
            texts = [query_text(row) for row in queries]
            scores = self._embed(texts, task_metadata, "query", encode_kwargs) @ self._vectors.T
            places = {key: place for place, key in enumerate(self._keys)}
            results = {}
            shown, before = 0, model.texts_cut
            for row, query, text in zip(scores, queries, texts, strict=True):
                wanted = None if top_ranked is None else [places[key] for key in top_ranked[query["id"]]]
                allowed = torch.arange(len(self._keys)) if wanted is None else torch.tensor(wanted)
                best = row[allowed].topk(min(top_k, len(allowed)))
                found = allowed[best.indices].tolist()
                head = [self._texts[place] for place in found[:rerank_top]]
                ranked = rerank(model, text, head, method=method, passage_tokens=passage_tokens)
                shown += len(head)
                order = [place.index for place in ranked]
                found = [found[i] for i in order] + found[len(order) :]
                results[str(query["id"])] = {
                    self._keys[place]: float(score) for place, score in zip(found, best.values, strict=True)
                }
            _tell_cut(model.texts_cut - before, shown, "passage_tokens", passage_tokens)
            return results

        def _embed(self, texts: list[str], task_metadata: Any, side: str, encode_kwargs: Any) -> torch.Tensor:
            from mteb.types import PromptType

            prefix = prefix_for(model, self._encoder, task_metadata, PromptType(side))
            options = _encode_options(encode_kwargs or {}, self._encoder.batch_size)
            vectors = _encode(model, texts, max_length, instruction=prefix, convert_to_tensor=True, **options)
            return vectors.float().cpu()

    return Search()
