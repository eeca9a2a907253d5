"""grit_kernels: attention that is causal or bidirectional per sample, and the pooling and losses around it."""

from grit_kernels._version import __version__
from grit_kernels.attention import switch_attention, switch_attention_varlen, switch_attention_with_kvcache
from grit_kernels.backend import backend, describe_backends
from grit_kernels.contrastive import contrastive_loss
from grit_kernels.fused import gelu_tanh_mul, rms_norm, rotary, silu_mul
from grit_kernels.hf.hook import register_when_imported
from grit_kernels.hf.patch import is_patched, patch, patched, unpatch
from grit_kernels.linear_cross_entropy import linear_cross_entropy
from grit_kernels.packing import SamplePack
from grit_kernels.pooling import pool
from grit_kernels.visibility import causal_instruction_hi, prefix_lm_hi, span_hi

register_when_imported()

__all__ = [
    "SamplePack",
    "__version__",
    "backend",
    "causal_instruction_hi",
    "contrastive_loss",
    "describe_backends",
    "gelu_tanh_mul",
    "is_patched",
    "linear_cross_entropy",
    "patch",
    "patched",
    "pool",
    "prefix_lm_hi",
    "rms_norm",
    "rotary",
    "silu_mul",
    "span_hi",
    "switch_attention",
    "switch_attention_varlen",
    "switch_attention_with_kvcache",
    "unpatch",
]
