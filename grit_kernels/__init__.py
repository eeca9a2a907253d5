"""grit_kernels: attention that switches between causal and bidirectional per sample, pooling and losses around it."""

from grit_kernels._version import __version__
from grit_kernels.attention import switch_attention, switch_attention_varlen, switch_attention_with_kvcache
from grit_kernels.backend import backend

__all__ = [
    "__version__",
    "backend",
    "switch_attention",
    "switch_attention_varlen",
    "switch_attention_with_kvcache",
]
