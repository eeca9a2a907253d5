"""The interface to transformers: the only part of this package that imports it, and what other code needs to know about it.

* :func:`patch`, :func:`unpatch`, :func:`patched`, :func:`is_patched`, :func:`patch_options`: a decoder with an attention mode per
  sample.
* caches, whatever the argument is called in this version of transformers: :func:`new_cache`, :func:`cached_states`,
  :func:`cache_keyword`, and ``StaticCache``, whose layout the kernels read without a copy. ``PackedCache``, for packed passes
  whose samples continue; :func:`packed_cache_refusal`: why a model cannot run them; :func:`states_geometry`: what it keeps of a
  token; :func:`own_logits`: its logits of states that are known.
* :func:`unwrapped`, :func:`decoder_of`, :func:`layers_of`, :func:`rotary_of`: the parts of a model. :func:`is_watched`: whether a
  module has hooks or a forward of its own. :func:`depends_on_length`: whether a decoder's rotary frequencies depend on the length
  of a text; :func:`has_recurrent_layers`: whether some of its layers carry a state. :func:`check_plain_head`: whether applying
  the language-model head directly gives the model's logits; :func:`check_unwrapped`: whether calling the decoder directly leaves
  nothing out. :func:`reads_texts_both_ways`: what a flag in a config says.
* :func:`checkpoint_activations`, :func:`checkpoints_activations`, :func:`expert_balance_loss`: for training.

Only compat.py knows how versions of transformers differ; importing this package does not import transformers.
"""

from typing import Any

from grit_kernels.hf.compat import (
    cache_keyword,
    cached_states,
    check_unwrapped,
    checkpoint_activations,
    checkpoints_activations,
    decoder_of,
    expert_balance_loss,
    layers_of,
    new_cache,
    reads_texts_both_ways,
    rotary_of,
    unwrapped,
)
from grit_kernels.hf.fuse import is_watched
from grit_kernels.hf.packed_trial import StatesGeometry, own_logits, packed_cache_refusal, states_geometry
from grit_kernels.hf.patch import is_patched, patch, patch_options, patched, unpatch
from grit_kernels.hf.proof import check_plain_head
from grit_kernels.hf.recurrent import has_recurrent_layers
from grit_kernels.hf.rope import FrequencyChange, depends_on_length, frequency_change

__all__ = [
    "FrequencyChange",
    "PackedCache",
    "StatesGeometry",
    "StaticCache",
    "cache_keyword",
    "cached_states",
    "check_plain_head",
    "check_unwrapped",
    "checkpoint_activations",
    "checkpoints_activations",
    "decoder_of",
    "depends_on_length",
    "expert_balance_loss",
    "frequency_change",
    "has_recurrent_layers",
    "is_patched",
    "is_watched",
    "layers_of",
    "new_cache",
    "own_logits",
    "packed_cache_refusal",
    "patch",
    "patch_options",
    "patched",
    "reads_texts_both_ways",
    "rotary_of",
    "states_geometry",
    "unpatch",
    "unwrapped",
]


def __getattr__(name: str) -> Any:
    # derived from a transformers class: importing them imports transformers
    if name == "StaticCache":
        from grit_kernels.hf.static_cache import StaticCache

        return StaticCache
    if name == "PackedCache":
        from grit_kernels.hf.packed_cache import PackedCache

        return PackedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
