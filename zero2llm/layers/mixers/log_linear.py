"""Log-linear attention over a gated linear one: log2(T) matrix states, recent tokens in small ones, distant in large.

    q, k, v = W_q x, W_k x, W_v x;   dt = softplus(W_dt x + b);   g = -exp(A_log) dt        one dt and g a head
    lam^(l) = softplus(L^(l) * (W_l x)^(l))                                      a weight a head, token and level
    o_t = sum_{s <= t} lam_t^(level(t, s)) exp(G_t - G_s) (q_t . k_s / sqrt(K)) dt_s v_s        G = cumsum g
    y = W_o (silu(W_g x) * norm_head(o))                        level(t, s) = bit_length(t xor s), in the document

Source: 2506.04761 section 3 over the gate and write strength of Mamba-2 (2405.21060), lam as in its published code
(softplus, so that levels do not compete; L starts at 1). We leave out Mamba-2's convolution and D, and norm each head.
Some lists of mechanisms have a "Logic Attention"; no method of that name is published, and this is the nearest.
Why: a fixed state forgets what does not fit; here it grows with log T. Decoding keeps (levels - 1) H K V values, of
which those in use grow with log2 of the position, and a decoded token reads them all; in training it costs 2 K V FLOPs
a head for each level above a chunk. Fix lam at 1 and it is one state.
`levels` weights cover 2^(levels - 1) tokens; those farther back share the last one.
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
from zero2llm.ops.log_linear import CHUNK, log_linear
from zero2llm.ops.marks import Marks, wide


@config
class LogLinearConfig:
    kind: Literal["log_linear"] = "log_linear"
    n_heads: int
    head_dim: int | None = None  # key width K; None = d_model / n_heads
    value_dim: int | None = None  # V per head; None = K
    levels: int = 15  # weights a head: 16,384 tokens
    norm_eps: float = 1e-5
    chunk: int = CHUNK  # a power of two

    def build(self, d_model: int, place: Place = ALONE) -> LogLinear:
        self.widths(d_model)
        return LogLinear(d_model, self)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(K, V) of a head. Raises ValueError for what cannot be built."""
        check_eps(self.norm_eps)
        if self.n_heads < 1 or (self.head_dim is None and d_model % self.n_heads):
            raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {self.n_heads}, or give head_dim")
        for name in ("head_dim", "value_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk = {self.chunk} must be a power of two: it is a subtree of the Fenwick tree")
        if not 2 <= self.levels <= 63:
            raise ValueError(f"levels = {self.levels} must be 2 to 63: the token itself, and what lies before it")
        k = d_model // self.n_heads if self.head_dim is None else self.head_dim
        return k, k if self.value_dim is None else self.value_dim

    def cost(self, d_model: int) -> Cost:
        (k, v), h = self.widths(d_model), self.n_heads
        weights = d_model * h * (2 * k + 3 * v + 1 + self.levels)
        above = max(1, self.levels - self.chunk.bit_length())
        mixing = h * (4 * self.chunk * (k + v) + 2 * k * v * (1 + above))
        return Cost(weights + h * (2 + self.levels), 2 * weights + mixing, fixed_state=(self.levels - 1) * h * k * v)


class LogLinear(nn.Module):
    tp: ClassVar = {
        "q_proj": "col", "k_proj": "col", "v_proj": "col", "g_proj": "col", "dt_proj": "col", "l_proj": "col",
        "dt_bias": "col", "A_log": "col", "L": "col", "o_proj": "row",
    }  # fmt: skip

    def __init__(self, d_model: int, cfg: LogLinearConfig):
        super().__init__()
        self.head_dim, self.value_dim = cfg.widths(d_model)
        self.n_heads, self.levels, self.chunk, self.eps = cfg.n_heads, cfg.levels, cfg.chunk, cfg.norm_eps
        self.q_proj = Linear(d_model, cfg.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(d_model, cfg.n_heads * self.head_dim, bias=False)
        self.v_proj = Linear(d_model, cfg.n_heads * self.value_dim, bias=False)
        self.g_proj = Linear(d_model, cfg.n_heads * self.value_dim, bias=False)
        self.dt_proj = Linear(d_model, cfg.n_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(cfg.n_heads))
        self.A_log = nn.Parameter(torch.arange(1.0, cfg.n_heads + 1).log())
        self.l_proj = Linear(d_model, cfg.n_heads * cfg.levels, bias=False)
        self.L = nn.Parameter(torch.ones(cfg.n_heads, cfg.levels))
        self.o_proj = Linear(cfg.n_heads * self.value_dim, d_model, bias=False)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        return Memory.zeros(batch, device, dtype, S=(self.n_heads, self.levels - 1, self.head_dim, self.value_dim))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt, g (B, T, H) and lam (B, T, H, L), fp32 or wider."""
        dt, low, bias, A_log, L = wide(self.dt_proj(x), self.l_proj(x), self.dt_bias, self.A_log, self.L)
        dt = F.softplus(dt + bias)
        return dt, -A_log.exp() * dt, F.softplus(L * low.unflatten(-1, (-1, self.levels)))

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        q, k = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj))  # (B, T, H, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.value_dim))
        dt, g, lam = self.gates(x)
        o, S = log_linear(
            q.transpose(1, 2) * self.head_dim**-0.5, k.transpose(1, 2), (v * dt[..., None]).transpose(1, 2),
            g.transpose(1, 2), lam.transpose(1, 2), seq.pos, marks, None if state is None else state["S"], self.chunk,
        )  # fmt: skip
        if state is not None:
            state.write(S=S)
        o = F.rms_norm(o, o.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2).to(x.dtype)  # (B, T, H V)
        return self.o_proj(F.silu(self.g_proj(x)) * o), {}
