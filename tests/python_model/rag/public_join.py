"""Caches joined as the public implementation of the paper joins them, defects included; only tests need it."""

from __future__ import annotations

from python_model.generate.states import TextStates, concatenate
from python_model.rag.answer import RAG
from python_model.rag.modes import DOCUMENT_PREFIX, Document


class PublicRAG(RAG):
    """Joined texts keep the positions they were read at, which overlap, and their own BOS.

    Behind a question, a document opens on a new line without BOS, so its stored states do not serve.
    """

    def _join(self, parts: list[TextStates]) -> tuple[TextStates, list[int]]:
        starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
        return concatenate(parts), starts

    def _document_states(self, document: Document, bos: bool) -> TextStates | None:
        return super()._document_states(document, bos) if bos else None

    def _document_ids(self, document: Document, bos: bool) -> list[int]:
        if bos:
            return super()._document_ids(document, bos)
        return self._ids("\n" + DOCUMENT_PREFIX, document.content, bos=False)
