"""Mixture of block attention: every query reads its own block of tokens and the few earlier ones that suit it best.

    block of token j = pos_j // B,    m_b = mean of the keys of block b (as rotated)
    kept(i, h) = own block of i, and the top_k - 1 blocks b before it of highest q_i,h . m_b
    o_i = sum_{j <= i, block of j in kept(i)} softmax_j(q_i . k_j / sqrt(K)) v_j          query head h reads key head h // (H / G)

Source: MoBA 2502.13189 section 2.2, eq. 2-6: the choice is made for each query and head, no block from the future is
scored, and the own block counts towards top_k. Training has no gradient through the choice.
Why: a query meets at most top_k * B keys, whatever the context. Training here is the dense mask: full attention's price
plus 2 H K (T / B) FLOPs of routing per token; decoding gathers the top_k * B keys. Stored per token and layer: 2 G K
values, per block G K more, and the last B - 1 keys.
With top_k * B >= T it is `gqa`; top_k = 1 is attention inside blocks.
Shapes: x (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq
from zero2llm.layers.contract import ALONE, Cost, Place
from zero2llm.layers.heads import grouped_heads
from zero2llm.layers.kv import KVState
from zero2llm.layers.linear import Linear
from zero2llm.layers.memory import Both, Memory
from zero2llm.layers.positions.catalog import RotaryConfig
from zero2llm.layers.positions.none import NoPositionConfig
from zero2llm.layers.positions.rope import check_unscaled
from zero2llm.ops.attend import visible
from zero2llm.ops.sparse_attend import Blocks, attend_blocks, best, overlap, places, summaries


@config
class MoBAConfig:
    kind: Literal["moba"] = "moba"
    n_heads: int
    n_kv_heads: int | None = None  # None = n_heads
    head_dim: int | None = None  # None = d_model / n_heads
    block: int = 512  # tokens
    top_k: int = 3  # blocks a query reads, its own included
    position: RotaryConfig = NoPositionConfig()

    def build(self, d_model: int, place: Place = ALONE) -> MoBA:
        self.widths(d_model)
        return MoBA(d_model, self)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(G, K). Raises ValueError for what cannot be built."""
        if self.block < 1 or self.top_k < 1:
            raise ValueError(f"block = {self.block} and top_k = {self.top_k} must be at least 1 (the own block counts)")
        check_unscaled(self.position)
        return grouped_heads(d_model, self.n_heads, self.n_kv_heads, self.head_dim)

    def cost(self, d_model: int) -> Cost:
        (g, k), h = self.widths(d_model), self.n_heads
        weights, routing = 2 * d_model * k * (h + g), 2 * h * k // self.block
        return Cost(
            weights, 2 * weights, 4 * h * k + routing, state=2 * g * k,
            fixed_state=self.block * g * k, block=self.block, block_state=g * k,
        )  # fmt: skip


class MoBA(nn.Module):
    tp: ClassVar = {"q_proj": "col", "k_proj": "col", "v_proj": "col", "o_proj": "row"}

    def __init__(self, d_model: int, cfg: MoBAConfig):
        super().__init__()
        self.n_kv, self.head_dim = cfg.widths(d_model)
        self.block, self.top_k = cfg.block, cfg.top_k
        self.q_proj = Linear(d_model, cfg.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(d_model, self.n_kv * self.head_dim, bias=False)
        self.v_proj = Linear(d_model, self.n_kv * self.head_dim, bias=False)
        self.o_proj = Linear(cfg.n_heads * self.head_dim, d_model, bias=False)
        self.position = cfg.position.build(self.head_dim, cfg.n_heads)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Both:
        """All keys and values; the mean key of every full block, and the keys of the one that is not full yet."""
        kv = KVState.empty(batch, self.n_kv, max_len, self.head_dim, self.head_dim, False, device, dtype)
        width = self.n_kv * self.head_dim
        shapes = {"tail": (self.block - 1, width), "stored": (max_len // self.block + 1, width)}
        return Both(kv, Memory.zeros(batch, device, dtype, **shapes))

    def forward(self, x: Tensor, seq: Seq, state: Both | None = None) -> tuple[Tensor, Aux]:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.position(q, k, seq)  # (B, T, H, K), (B, T, G, K)
        means = summaries(
            k.flatten(2), seq, self.block, self.block, lambda x, start: x.mean(2), state and state.parts[1]
        )
        q, k, v = (p.transpose(1, 2) for p in (q, k, v))
        if state is None:
            mask, pos = seq.once(("visible", None, True), lambda: visible(seq, None, True)), places(seq)
            key_pos, length = pos, x.shape[1]
        else:
            pos, length = seq.pos, state.parts[0].slots
            k, v, mask, key_pos = state.parts[0].extend(k, v, seq, None)
        n = -(-length // self.block)
        own, block = ((p // self.block).clamp(0, n - 1) for p in (pos, key_pos))
        o = attend_blocks(q, k, v, self.choose(q, means, own, n), block, mask, self.top_k * self.block)
        return self.o_proj(o.transpose(1, 2).flatten(2)), {}

    @torch.no_grad()
    def choose(self, q: Tensor, means: Blocks, own: Tensor, n: int) -> Tensor:
        """(B, H, T, n) bool: the blocks that each query (B, H, T, K) in block ``own`` (B, T) keeps."""
        mean = means.x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, G, N, K)
        scores = q @ mean.repeat_interleave(q.shape[1] // mean.shape[1], 1).transpose(-1, -2)  # (B, H, T, N)
        before = means.seen & (means.number[:, None] < own[..., None])
        kept = best(scores, self.top_k - 1, before[:, None])
        kept = kept.to(q.dtype) @ overlap(means.number, self.block, self.block, self.block, n)[:, None].to(q.dtype) > 0
        return kept | (torch.arange(n, device=q.device) == own[..., None])[:, None]
