"""Heads beside the vocabulary's: one number per token or text, and predictions of several tokens ahead.

    score    s_t = w . h_t + b                        value model: every t; reward model: the last real token of a text
    MTP      z_i^k = M_k [norm(h_i^(k-1)) ; norm(e_(i+k))]        k = 1 .. depth;  h^0 = what the vocabulary head reads
             h_i^k = norm(block_k(z^k)_i)                         predicts token i + k + 1 through the shared head

Source: reward and value 2009.01325 section 3.4 (w, b start at 0 here, so that noise does not move the trunk first);
MTP DeepSeek-V3 2412.19437 section 2.2: embedding and head shared with the model; the norm behind each block is that of
its published weights, whose M_k has the halves exchanged. 2404.19737 has parallel heads without the chain.
Why: MTP asks of h_i to know what follows the next token; after training the depths are dropped, or draft tokens
for speculative decoding. Training costs one block, 4 D^2 FLOPs and one product with the vocabulary per token and depth.
Packed rows: i takes part at depth k only if i + k is in its document; the label there must be so too. The others are
padding to the block: they come last in their document, so nothing that counts depends on them. Depths are not recomputed.
Shapes: score (B, T, D) -> (B, T); MTP (B, T, D) -> depth times (B, T, D).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.batch import IGNORE
from zero2llm.core.seq import Aux, Seq, merge_aux
from zero2llm.layers.contract import Place
from zero2llm.layers.linear import Linear
from zero2llm.model.block import Block
from zero2llm.model.spec import LayerSpec, ModelConfig
from zero2llm.ops.marks import full_precision


class ScoreHead(nn.Module):
    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T), in fp32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with full_precision(hidden):
            return hidden.to(wide) @ self.weight.to(wide) + self.bias.to(wide)


def add_score(model: nn.Module, purpose: Literal["reward"] | bool = True) -> None:
    """A score head on an LM: a new one begins at 0, one that is there keeps its weights. ``purpose`` goes into model.cfg."""
    if model.score is None:
        model.score = ScoreHead(model.cfg.d_model).to(model.embed.weight.device)
    model.cfg = dataclasses.replace(model.cfg, score_head=purpose)


def text_ends(seq: Seq) -> Tensor:
    """(B, T) bool: the last real token of each document."""
    if seq.seg is None:
        return torch.arange(seq.pos.shape[1], device=seq.pos.device).expand_as(seq.pos) == seq.pos.shape[1] - 1
    return (seq.seg != 0) & (shifted(seq.seg, 1, 0) != seq.seg)


def row_scores(scores: Tensor, seq: Seq) -> Tensor:
    """(B, T) -> (B,): at the last real token of each row; 0 for a row of padding."""
    last = text_ends(seq) * (torch.arange(scores.shape[1], device=scores.device) + 1)  # the latest end has the largest
    return _at(scores, last.amax(1, keepdim=True)).squeeze(1)


def document_scores(scores: Tensor, seq: Seq, n: int) -> Tensor:
    """(B, T) -> (B, n): at the last real token of the first n documents of each row, in order; 0 where there are fewer."""
    ends = text_ends(seq)
    column = torch.arange(scores.shape[1], device=scores.device) + 1
    nth = torch.where(ends & (ends.cumsum(1) <= n), ends.cumsum(1), 0)  # 0 = no end, collected in a bin
    where = torch.zeros(len(scores), n + 1, dtype=torch.long, device=scores.device).scatter_add_(1, nth, column * ends)
    return _at(scores, where[:, 1:])


def _at(scores: Tensor, column: Tensor) -> Tensor:
    """Scores (B, T) at columns (B, n) counted from 1; 0 at column 0."""
    return torch.where(column > 0, scores.gather(1, (column - 1).clamp(min=0)), 0)


class Depth(nn.Module):
    """One token further ahead: what joins state and embedding, a block, and the norm that the shared head reads."""

    def __init__(self, spec: LayerSpec, cfg: ModelConfig, place: Place):
        super().__init__()
        self.hidden_norm, self.embed_norm = spec.norm.build(cfg.d_model), spec.norm.build(cfg.d_model)
        self.join_proj = Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        self.block = Block(spec, cfg.d_model, place)
        self.final_norm = cfg.final_norm.build(cfg.d_model) if cfg.final_norm else nn.Identity()

    def forward(self, hidden: Tensor, ahead: Tensor, seq: Seq) -> tuple[Tensor, Aux]:
        both = torch.cat((self.hidden_norm(hidden), self.embed_norm(ahead)), -1)  # (B, T, 2 D)
        x, aux = self.block(self.join_proj(both), seq)
        return self.final_norm(x), aux


class MTP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        spec, place = cfg.mtp.block or cfg.specs()[-1], Place(0, len(cfg.specs()))  # each depth is a stack of its own
        self.depths = nn.ModuleList(Depth(spec, cfg, place) for _ in range(cfg.mtp.depth))

    def forward(
        self, embed: Callable[[Tensor, Seq], Tensor], hidden: Tensor, tokens: Tensor, seq: Seq
    ) -> tuple[list[Tensor], Aux]:
        """hidden (B, T, D) of the model, tokens (B, T) -> for each depth the states (B, T, D) that the head reads."""
        found, parts = [], []
        for k, depth in enumerate(self.depths, 1):
            ahead = embed(shifted(tokens, k, 0), Seq(shifted(seq.pos, k, 0)))
            hidden, aux = depth(hidden, ahead, only(seq, inside(seq, k)))
            found.append(hidden)
            parts.append(aux)
        return found, merge_aux(parts)


def shifted(x: Tensor, k: int, fill: int) -> Tensor:
    """(B, T): column i holds column i + k; the last k hold ``fill``."""
    return torch.cat((x[:, k:], torch.full_like(x[:, :k], fill)), 1)


def inside(seq: Seq, k: int) -> Tensor:
    """(B, T) bool: token i is real, and token i + k is in its document."""
    if seq.seg is None:
        T = seq.pos.shape[1]
        return (torch.arange(T, device=seq.pos.device) < T - k).expand_as(seq.pos)
    return (seq.seg != 0) & (shifted(seq.seg, k, 0) == seq.seg)


def only(seq: Seq, keep: Tensor) -> Seq:
    """The same rows, where everything but ``keep`` is padding."""
    number = torch.ones_like(seq.pos, dtype=torch.int32) if seq.seg is None else seq.seg
    return Seq(seq.pos, number * keep, seq.grid)


def labels_ahead(labels: Tensor, seq: Seq, k: int) -> Tensor:
    """Labels of depth k: position i predicts what position i + k must, if that is in its document."""
    return torch.where(inside(seq, k), shifted(labels, k, IGNORE), IGNORE)
