"""Retention: linear attention whose memory of a token fades by a fixed factor per step, another for each head.

    q, k = rotate(W_q x), rotate(W_k x)          rotary angles, so that the decay is complex: (gamma e^(i theta))^(n-m)
    S_n = gamma_h S_(n-1) + k_n v_n^T,    o_n = S_n^T q_n / sqrt(K)          gamma_h = 1 - 2^(-5-h)
    y = W_o (silu(W_g x) * norm_head(o))

Source: RetNet 2307.08621 eq. 5-8. Parallel form of the same: o = (Q K^T * D) V / sqrt(K), D_nm = gamma^(n-m) for m <= n.
The norm is RMSNorm over each head without weight (the paper: GroupNorm per head; the scale is W_o's business).
Why: decoding keeps H K V values whatever the length. With V = 2 K as published: 8 D^2 parameters with W_g.
Delete the rotation and gamma and it is linear attention without its normaliser; make gamma depend on x and it is GLA.
Shapes: x (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq
from zero2llm.layers.contract import ALONE, Cost, Place
from zero2llm.layers.linear import Linear
from zero2llm.layers.memory import Memory
from zero2llm.layers.norms.rms import check_eps
from zero2llm.layers.positions.rope import RoPEConfig
from zero2llm.ops.marks import Marks
from zero2llm.ops.scan import CHUNK, scan


@config
class RetNetConfig:
    kind: Literal["retnet"] = "retnet"
    n_heads: int
    head_dim: int | None = None  # key width K; None = d_model / n_heads
    value_dim: int | None = None  # V per head; None = 2 K
    base: float = 10_000.0  # of the rotary angles
    norm_eps: float = 1e-5
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> RetNet:
        self.widths(d_model)
        return RetNet(d_model, self)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(K, V) of a head. Raises ValueError for what cannot be built."""
        check_eps(self.norm_eps)
        if self.n_heads < 1 or (self.head_dim is None and d_model % self.n_heads):
            raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {self.n_heads}, or give head_dim")
        k = d_model // self.n_heads if self.head_dim is None else self.head_dim
        v = 2 * k if self.value_dim is None else self.value_dim
        if k % 2:
            raise ValueError(f"retention rotates pairs of channels: head_dim = {k} must be even")
        if min(self.chunk, k, v) < 1:
            raise ValueError(f"chunk = {self.chunk}, head_dim = {k} and value_dim = {v} must be at least 1")
        return k, v

    def cost(self, d_model: int) -> Cost:
        k, v = self.widths(d_model)
        weights = d_model * self.n_heads * (2 * k + 3 * v)
        mixing = self.n_heads * (4 * k * v + 2 * self.chunk * (k + v))
        return Cost(weights, 2 * weights + mixing, fixed_state=self.n_heads * k * v)


class RetNet(nn.Module):
    tp: ClassVar = None  # the decays are numbered over all heads

    def __init__(self, d_model: int, cfg: RetNetConfig):
        super().__init__()
        self.head_dim, self.value_dim = cfg.widths(d_model)
        self.n_heads, self.chunk, self.eps = cfg.n_heads, cfg.chunk, cfg.norm_eps
        self.q_proj = Linear(d_model, cfg.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(d_model, cfg.n_heads * self.head_dim, bias=False)
        self.v_proj = Linear(d_model, cfg.n_heads * self.value_dim, bias=False)
        self.g_proj = Linear(d_model, cfg.n_heads * self.value_dim, bias=False)
        self.o_proj = Linear(cfg.n_heads * self.value_dim, d_model, bias=False)
        self.position = RoPEConfig(base=cfg.base, layout="interleaved").build(self.head_dim)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        return Memory.zeros(batch, device, dtype, S=(self.n_heads, self.head_dim, self.value_dim))

    def log_decay(self, x: Tensor) -> Tensor:
        """(1, T, H) constant log gamma_h."""
        heads = torch.arange(self.n_heads, device=x.device, dtype=torch.float64)
        g = torch.log1p(-(2.0 ** (-5 - heads)))
        return g.to(torch.promote_types(x.dtype, torch.float32)).expand(1, x.shape[1], -1)

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        q, k = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj))  # (B, T, H, K)
        q, k = self.position(q, k, seq)
        v = self.v_proj(x).unflatten(-1, (-1, self.value_dim))
        k, g = marks.silence(k, self.log_decay(x))
        o, S = scan(
            q.transpose(1, 2) * self.head_dim**-0.5, k.transpose(1, 2), v.transpose(1, 2), g.transpose(1, 2),
            marks, None if state is None else state["S"], self.chunk,
        )  # fmt: skip
        if state is not None:
            state.write(S=S)
        o = F.rms_norm(o, o.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2).to(x.dtype)  # (B, T, H V)
        return self.o_proj(F.silu(self.g_proj(x)) * o), {}
