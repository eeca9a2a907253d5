"""The module that is trained: a single forward serves both objectives, so that FSDP and DDP can wrap it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import grit_kernels as gk
from python_model.model.chunks import Chunk
from python_model.model.losses import next_token_losses, sums_per_sample
from python_model.model.modeling import GritLM


class TrainingModel(nn.Module):
    """A GritLM whose forward takes a :class:`Chunk`.

    FSDP gathers weights around a module's forward, so everything that touches a weight (including head and projection) happens
    inside this one.
    """

    def __init__(self, grit: GritLM, router_loss: bool = False) -> None:
        super().__init__()
        self.grit = grit
        self.router_loss = router_loss
        self.touch_all = False
        """Give every weight a (zero) gradient, including those that this rank's chunk does not use: ranks must agree on which
        have one.
        """

    def forward(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Run one chunk.

        Returns:
            float32 (E, size) embeddings of the texts, float32 (C) sums of the conversations' token losses (either is None when
            the chunk has no such sample), and the float32 router loss (0 without one).
        """
        hidden, router = self._states(chunk)
        vectors = sums = None
        texts = chunk.embedded.shape[0]
        if texts:
            vectors = self.grit.pool(
                hidden[: chunk.embedding_tokens],
                chunk.pack.cu_seqlens[: texts + 1],
                chunk.pack.instruction_lens[:texts],
            )
        if chunk.conversations.shape[0]:
            losses = next_token_losses(self.grit, hidden[chunk.embedding_tokens :], chunk.labels)
            sums = sums_per_sample(losses, chunk.generative_cu_seqlens)
        if self.touch_all and torch.is_grad_enabled():
            router = router + hidden.reshape(-1)[0].float() * 0
            for weight in self.unused(vectors is None, sums is None):
                router = router + weight.reshape(-1)[:1].sum().float() * 0
        return vectors, sums, router

    def unused(self, no_texts: bool, no_conversations: bool) -> Iterable[nn.Parameter]:
        """Weights that such a chunk does not use."""
        if no_texts and self.grit.projection is not None:
            yield from self.grit.projection.parameters()
        head = None if self.grit.mode == "embedding" else self.grit.model.get_output_embeddings()
        if no_conversations and head is not None:
            yield from head.parameters()

    def _states(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        if not self.router_loss:
            states = self.grit.hidden_states(chunk.input_ids, chunk.pack)
            return states, states.new_zeros((), dtype=torch.float32)
        self.grit.check_patch()
        decoder = self.grit.decoder[0]
        output = decoder(input_ids=chunk.input_ids[None], sample_pack=chunk.pack, output_router_logits=True)
        # a pack has no padding, so all tokens count for load balancing
        loss = gk.hf.expert_balance_loss(
            output.router_logits, decoder.config.num_local_experts, decoder.config.num_experts_per_tok
        )
        return output.last_hidden_state[0], loss.float()
