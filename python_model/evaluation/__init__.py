"""Retrieval and next-token metrics."""

from python_model.evaluation.language import next_token_loss
from python_model.evaluation.retrieval import RetrievalScores, embed_documents, evaluate_retrieval

__all__ = ["RetrievalScores", "embed_documents", "evaluate_retrieval", "next_token_loss"]
