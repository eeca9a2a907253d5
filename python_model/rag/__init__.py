"""Retrieval and generation from one model: an index of documents, their stored states, and answers from both."""

from python_model.generate.states import TextStates
from python_model.rag.store.folder import StoreBusyError, StoreCorruptError, StoreError, StoreFullError
from python_model.rag.store.kvstore import KVStore

__all__ = ["KVStore", "StoreBusyError", "StoreCorruptError", "StoreError", "StoreFullError", "TextStates"]
