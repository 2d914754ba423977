"""RWKV-7 time mixing ("Goose"): a delta rule that forgets along one key, learns along another, and shifts its input.

    x^i = x_t + (x_(t-1) - x_t) * m_i                      for each i of r, w, k, v, a, g: a mixture with the token before
    r, k, v = W_r x^r, W_k x^k, W_v x^v                    (q_proj, k_proj, v_proj)
    w = exp(-e^(-1/2) sigmoid(w_0 + tanh(x^w W1) W2))      decay of each channel, in (0.545, 1)
    a = sigmoid(a_0 + x^a A1 A2)                           learning rate of each channel
    v = v + (v_first - v) sigmoid(v_0 + x^v V1 V2)         v_first: the values of the first RWKV-7 layer
    kk = k * k_k / |k * k_k|,     k = k (1 + (a - 1) k_a)                          per head of width N
    S_t = diag(w) S_(t-1) - (a * kk) (kk^T S_(t-1)) + k v^T,     o_t = S_t^T r
    y = W_o ((groupnorm(o) + (r . (r_k * k)) v) * (sigmoid(x^g G1) G2))            eps of the norm: N 1e-5

Source: 2503.14456; initial vectors and ranks as in the authors' training code (matrices as this
model's `init` says). The value residual: whoever finds no values in the pass's memo (``Seq.memo``) puts its own there, so
a model may begin with other layers. Every layer owns v_0, V1, V2; in the first one v_first = v, and they change nothing.
Why: reading with kk and writing with k frees the memory from storing what it just erased; O(1) memory like all the family.
Stored: H N^2 + D values. FLOPs per token: 8 D^2 + 4 D (ranks) + D (8 N + 16 C).
Tensor parallelism is not supported: the low-rank pairs are no projections. Shapes: x (B, T, D) -> (B, T, D), D = H N.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq
from zero2llm.layers.contract import ALONE, Cost, Place
from zero2llm.layers.linear import Linear
from zero2llm.layers.memory import Memory
from zero2llm.ops.conv import token_shift
from zero2llm.ops.dplr import dplr
from zero2llm.ops.marks import Marks, wide
from zero2llm.ops.scan import CHUNK

FIRST = "rwkv7 first values"  # key of Seq.memo


@config
class RWKV7Config:
    kind: Literal["rwkv7"] = "rwkv7"
    n_heads: int  # d_model / n_heads is the head's width, 64 as published
    decay_rank: int | None = None  # None = about 2.5 sqrt(D), in steps of 32, at most D
    rate_rank: int | None = None  # None = as decay_rank
    value_rank: int | None = None  # None = about 1.7 sqrt(D)
    gate_rank: int | None = None  # None = about 5 sqrt(D)
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> RWKV7:
        self.ranks(d_model)
        return RWKV7(d_model, self, place)

    def ranks(self, d_model: int) -> list[int]:
        """Of decay, rate, value and gate. Raises ValueError for what cannot be built."""
        if self.n_heads < 1 or d_model % self.n_heads:
            raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {self.n_heads}")
        if self.chunk < 1:
            raise ValueError(f"chunk = {self.chunk} must be positive")
        given = {"decay": self.decay_rank, "rate": self.rate_rank, "value": self.value_rank, "gate": self.gate_rank}
        for name, rank in given.items():
            if rank is not None and not 1 <= rank <= d_model:
                raise ValueError(f"{name}_rank = {rank} must lie between 1 and d_model = {d_model}")
        usual = lambda scale: min(d_model, max(32, 32 * round(scale * d_model**0.5 / 32)))
        scales = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}
        return [usual(scales[name]) if rank is None else rank for name, rank in given.items()]

    def cost(self, d_model: int) -> Cost:
        weights = 4 * d_model * d_model + 2 * d_model * sum(self.ranks(d_model))
        n = d_model // self.n_heads
        mixing = d_model * (8 * n + 16 * self.chunk)
        return Cost(weights + 14 * d_model, 2 * weights + mixing, fixed_state=d_model * n + d_model)


class RWKV7(nn.Module):
    tp: ClassVar = None

    def __init__(self, d_model: int, cfg: RWKV7Config, place: Place):
        super().__init__()
        self.n_heads, self.head_dim, self.chunk = cfg.n_heads, d_model // cfg.n_heads, cfg.chunk
        ramp, pairs = torch.arange(d_model) / d_model, [low_rank(d_model, rank) for rank in cfg.ranks(d_model)]
        mix = lambda power: nn.Parameter(1 - ramp ** (power * (1 - place.layer / place.n_layers)))
        self.x_r, self.x_w, self.x_k = mix(0.2), mix(0.9), mix(0.7)
        self.x_v, self.x_a, self.x_g = mix(0.7), mix(0.9), mix(0.2)
        (self.w1, self.w2), (self.a1, self.a2), (self.v1, self.v2), (self.g1, self.g2) = pairs
        line = torch.arange(d_model) / max(d_model - 1, 1)  # 0 .. 1 over all channels
        wave = torch.linspace(-1, 1, self.head_dim).repeat(cfg.n_heads)  # -1 .. 1 in each head, flat in the middle
        wave = wave * wave.abs()
        depth = place.layer / max(place.n_layers - 1, 1)
        self.w0 = nn.Parameter(6 * line ** (1 + depth**0.3) - 5.5 + 2.5 * wave)
        self.a0 = nn.Parameter(0.4 * line - 0.39 + 0.3 * wave)
        self.v0 = nn.Parameter(0.93 - 0.4 * line)
        self.k_k = nn.Parameter(0.76 - 0.1 * line)
        self.k_a = nn.Parameter(torch.full((d_model,), 1.02))
        self.r_k = nn.Parameter(torch.full((d_model,), -0.04))
        self.norm_weight = nn.Parameter(torch.full((d_model,), ((1 + place.layer) / place.n_layers) ** 0.7))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))
        self.q_proj = Linear(d_model, d_model, bias=False)  # the receptance W_r
        self.k_proj = Linear(d_model, d_model, bias=False)
        self.v_proj = Linear(d_model, d_model, bias=False)
        self.o_proj = Linear(d_model, d_model, bias=False)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        h, n = self.n_heads, self.head_dim
        return Memory.zeros(batch, device, dtype, S=(h, n, n), tail=(1, h * n))

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, N)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        before, tail = token_shift(x, marks, None if state is None else state["tail"])
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        x_r, x_w, x_k, x_v, x_a, x_g = (x + (before - x) * m for m in mixes)
        r, k, v = self.q_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        log_w, w0 = wide((x_w @ self.w1).tanh() @ self.w2, self.w0)
        log_w = -math.exp(-0.5) * (w0 + log_w).sigmoid()
        rate = (self.a0 + x_a @ self.a1 @ self.a2).sigmoid()
        first = seq.memo.setdefault(FIRST, v)
        v = v + (first - v) * (self.v0 + x_v @ self.v1 @ self.v2).sigmoid()
        kk = F.normalize(self.heads(k * self.k_k), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        written, log_w, rate = marks.silence(k, log_w, rate)
        r, written, values, log_w, rate = map(self.heads, (r, written, v, log_w, rate))  # (B, H, T, N)
        o, S = dplr(
            r, written, values, -kk, kk * rate, log_w, marks, None if state is None else state["S"], self.chunk
        )  # fmt: skip
        if state is not None:
            state.write(S=S, tail=tail)
        o = F.layer_norm(o, o.shape[-1:], eps=self.head_dim * 1e-5)
        bonus = (r * self.heads(k * self.r_k)).sum(-1, keepdim=True) * values
        flat = lambda y: y.transpose(1, 2).flatten(2)
        o = (flat(o) * self.norm_weight + self.norm_bias + flat(bonus)).to(x.dtype)
        return self.o_proj(o * ((x_g @ self.g1).sigmoid() @ self.g2)), {}


def low_rank(d_model: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Zeros (D, R) and orthogonal rows of length 0.1 (R, D): the first is silent, the second lets its gradient through."""
    return nn.Parameter(torch.zeros(d_model, rank)), nn.Parameter(nn.init.orthogonal_(torch.empty(rank, d_model), 0.1))
