"""Generation: replies, sampling, beam search on static or packed caches, and reranking by generation."""

from python_model.generate.text import complete, replies, reply

__all__ = ["complete", "replies", "reply"]
