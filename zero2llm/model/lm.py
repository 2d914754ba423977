"""The language model: embedding, blocks, final norm, head. Thin on purpose: mechanisms live in layers/."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zero2llm.core.seq import Aux, Seq, State, merge_aux
from zero2llm.layers.contract import Place
from zero2llm.layers.linear import Linear
from zero2llm.model.block import Block
from zero2llm.model.heads import MTP, ScoreHead
from zero2llm.model.init import init_weights, width_ratio
from zero2llm.model.spec import ModelConfig
from zero2llm.ops.linear import linear
from zero2llm.ops.xent import cap


class LM(nn.Module):
    """tokens (B, T) -> hidden states (B, T, D) -> logits (B, T, V).

    `logits` stands apart from `forward`, so that a chunked loss never builds (B, T, V).
    Set ``recompute = True`` to trade time for memory: each block's inside is computed again in the backward pass.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.recompute = cfg, False
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = cfg.position.build(cfg.d_model, cfg.max_len) if cfg.position else None
        self.embed_norm = cfg.embed_norm.build(cfg.d_model) if cfg.embed_norm else None
        specs = cfg.specs()
        self.blocks = nn.ModuleList(Block(spec, cfg.d_model, Place(i, len(specs))) for i, spec in enumerate(specs))
        self.final_norm = cfg.final_norm.build(cfg.d_model) if cfg.final_norm else nn.Identity()
        self.head = None if cfg.tie_embeddings else Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.mtp = MTP(cfg) if cfg.mtp else None
        self.score = ScoreHead(cfg.d_model) if cfg.score_head else None  # hidden -> (B, T)
        self.width_ratio = width_ratio(cfg.init, cfg.d_model)
        init_weights(self, cfg.init)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) output projection; the embedding itself when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def logit_softcap(self) -> float | None:
        return self.cfg.logit_softcap

    @property
    def continues(self) -> bool:
        """Whether a pass from states is one of whole rows in all that a loss sees: nothing is recomputed, and no layer looks at all
        tokens of a batch."""
        return not self.recompute and not any(getattr(part, "whole_rows", False) for part in self.modules())

    @staticmethod
    def clone(model: LM) -> LM:
        """An independent copy with equal weights, on the same device."""
        twin = LM(model.cfg).to(model.embed.weight.device)
        twin.load_state_dict(model.state_dict())
        return twin

    def init_states(self, batch: int, max_len: int) -> list[State]:
        """Empty memory of every layer for ``batch`` rows of up to ``max_len`` tokens."""
        where = {"device": self.embed.weight.device, "dtype": self.embed.weight.dtype}
        return [block.init_state(batch, max_len, **where) for block in self.blocks]

    def forward(self, tokens: Tensor, seq: Seq, states: list[State] | None = None) -> tuple[Tensor, Aux]:
        seq = seq.fresh()
        x, parts = self.embedded(tokens, seq), []
        for i, block in enumerate(self.blocks):
            if self.recompute and states is None and torch.is_grad_enabled():
                x, aux = checkpoint(block, x, seq, use_reentrant=False)
            else:
                x, aux = block(x, seq, None if states is None else states[i])
            parts.append(aux)
        return self.narrowed(self.final_norm(x)), merge_aux(parts)

    def embedded(self, tokens: Tensor, seq: Seq) -> Tensor:
        """What the first block reads, (B, T, D)."""
        x = self.embed(tokens)
        if self.cfg.embed_scale is not None:  # rounded to the model's dtype, as in the original
            x = x * torch.tensor(self.cfg.embed_scale, dtype=x.dtype)
        if self.position is not None:
            x = x + self.position(seq).to(x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return x

    def narrowed(self, hidden: Tensor) -> Tensor:
        """muP's output multiplier, on the hidden state so that chunked losses need not know it."""
        return hidden if self.width_ratio == 1 else hidden * self.width_ratio

    def ahead(self, hidden: Tensor, tokens: Tensor, seq: Seq) -> tuple[list[Tensor], Aux]:
        """From the hidden states of ``forward``: those from which position i predicts token i + k + 1, k = 1 .. depth."""
        found, aux = self.mtp(self.embedded, hidden, tokens, seq)
        return [self.narrowed(h) for h in found], aux

    def logits(self, hidden: Tensor) -> Tensor:
        return cap(linear(hidden, self.head_weight), self.cfg.logit_softcap)
