"""Generation: replies, sampling and beams on static or packed caches, and reranking by a model's own words."""

from python_model.generate.text import complete, replies, reply

__all__ = ["complete", "replies", "reply"]
