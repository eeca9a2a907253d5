"""Retrieval and generation from one model: an index of documents, their stored states, and answers from both."""

from python_model.rag.folder import StoreBusyError, StoreCorruptError, StoreError, StoreFullError
from python_model.rag.kvstore import KVStore
from python_model.rag.states import TextStates

__all__ = ["KVStore", "StoreBusyError", "StoreCorruptError", "StoreError", "StoreFullError", "TextStates"]
