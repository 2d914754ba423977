"""Grouped-query attention: H query heads share G key/value heads; the page for MHA, MQA, windows and QK-norm too.

    q = W_q x,  k = W_k x,  v = W_v x                  split into H, G, G heads of width K
    q, k = rotate(norm(q)), rotate(norm(k))            norm only with qk_norm, rotate as the position module says
    o_i  = sum_{j <= i} softmax_j(q_i . k_j / sqrt(K)) v_j         query head h reads key head h // (H / G)
    y    = W_o o

Source: MHA 1706.03762 eq. 1; MQA (G = 1) 1911.02150; GQA 2305.13245; sliding window 2004.05150 and Mistral
2310.06825 (i - j < window, the token itself counted); QK-norm per head as in Qwen3 (2505.09388), before the rotation.
Why: G < H divides the cache by H / G. Stored per token and layer: 2 G K values; a window caps the tokens at `window`.
FLOPs per token: 2 D K (2H + 2G) for the projections + 4 H K * (tokens seen).
Shapes: x (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq
from zero2llm.layers.kv import KVState
from zero2llm.layers.linear import Linear
from zero2llm.layers.norms.rms import RMSNorm
from zero2llm.layers.positions.catalog import NoPositionConfig, RotaryConfig
from zero2llm.ops.attend import attend, attention_weights, visible


@config
class GQAConfig:
    kind: Literal["gqa"] = "gqa"
    n_heads: int
    n_kv_heads: int | None = None  # None = n_heads (MHA); 1 = MQA
    head_dim: int | None = None  # None = d_model / n_heads
    window: int | None = None  # tokens a query sees, itself included; None = all
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    norm_eps: float = 1e-6  # of the QK-norm
    position: RotaryConfig = NoPositionConfig()

    def build(self, d_model: int) -> GQA:
        n_kv = self.n_kv_heads or self.n_heads
        if self.n_heads < 1 or n_kv < 1 or self.n_heads % n_kv:
            raise ValueError(f"n_heads = {self.n_heads} must be a multiple of n_kv_heads = {n_kv}")
        if self.head_dim is None and d_model % self.n_heads:
            raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {self.n_heads}, or give head_dim")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window} must be at least 1 (the token itself)")
        return GQA(d_model, self.n_heads, n_kv, self.head_dim or d_model // self.n_heads, self)


class GQA(nn.Module):
    tp: ClassVar = {"q_proj": "col", "k_proj": "col", "v_proj": "col", "o_proj": "row"}

    def __init__(self, d_model: int, n_heads: int, n_kv: int, head_dim: int, cfg: GQAConfig):
        super().__init__()
        self.head_dim, self.window, self.n_kv = head_dim, cfg.window, n_kv
        self.q_proj = Linear(d_model, n_heads * head_dim, bias=cfg.qkv_bias)
        self.k_proj = Linear(d_model, n_kv * head_dim, bias=cfg.qkv_bias)
        self.v_proj = Linear(d_model, n_kv * head_dim, bias=cfg.qkv_bias)
        self.o_proj = Linear(n_heads * head_dim, d_model, bias=cfg.out_bias)
        self.q_norm = RMSNorm(head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.position = cfg.position.build(head_dim)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> KVState:
        ring = self.window is not None and self.window < max_len
        slots = self.window if ring else max_len
        return KVState.empty(batch, self.n_kv, slots, self.head_dim, self.head_dim, ring, device, dtype)

    def project(self, x: Tensor, seq: Seq) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, keys, and values, (B, H or G, T, K)."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.position(self.q_norm(q), self.k_norm(k), seq)  # (B, T, H, K)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, seq: Seq, state: KVState | None = None) -> tuple[Tensor, Aux]:
        q, k, v = self.project(x, seq)
        mask = None
        if state is None:
            mask = seq.once(("visible", self.window), lambda: visible(seq, self.window))
        else:
            k, v, mask = state.extend(k, v, seq, self.window)
        o = attend(q, k, v, mask)  # (B, H, T, K)
        return self.o_proj(o.transpose(1, 2).flatten(2)), {}

    @torch.no_grad()
    def weights(self, x: Tensor, seq: Seq) -> Tensor:
        """(B, H, T, T) attention probabilities, to look at."""
        q, k, _ = self.project(x, seq)
        return attention_weights(q, k, visible(seq, self.window))
