"""Kimi Delta Attention: the gated delta rule in which every channel of a key fades at a pace of its own.

    q, k, v = silu(conv(W x)),     q, k = q / |q|, k / |k|         H heads of width K
    alpha_t = exp(-exp(A) softplus(W_fb W_fa x_t + dt))            one in (0, 1) for each channel; A for each head
    beta_t  = sigmoid(w_b . x_t)                                   one for each head
    S' = diag(alpha_t) S_(t-1)     S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
    o_t = S_t^T q_t / sqrt(K)      y = W_o (w * norm(o) * sigmoid(W_gb W_ga x))

Source: Kimi Linear 2510.26692 sections 3 and 4, with the names of its checkpoints: f_a, f_b, g_a, g_b are
the two low-rank pairs, of rank K unless said otherwise. A starts as the log of U(1, 16), softplus(dt) log-uniform in
[0.001, 0.1]; both are vectors, which no optimizer here decays, and the decay is computed in fp32.
Why: a channel that forgets slowly can keep what a fast one has to drop, and paces along the channels do for order what
rotary angles do; Kimi Linear runs its full-attention layers without positions. It costs D R + R H K parameters more than
one pace per head, and products within a chunk that decay channel by channel (`halving`).
Stored: H K^2 + 3 (W - 1) H K values whatever the length. FLOPs per token: 2 per weight + H (6 K^2 + 8 C K).
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
from zero2llm.layers.mixers.gated_delta import step_bias
from zero2llm.layers.norms.rms import RMSNorm, check_eps
from zero2llm.ops.conv import causal_conv
from zero2llm.ops.delta import delta, unit
from zero2llm.ops.marks import Marks, wide
from zero2llm.ops.scan import CHUNK


@config
class KDAConfig:
    kind: Literal["kda"] = "kda"
    n_heads: int
    head_dim: int | None = None  # K, of keys and values; None = d_model / n_heads
    rank: int | None = None  # of the decay's and the output gate's projections; None = head_dim
    conv_width: int = 4  # taps of the short convolution, the token itself counted
    norm_eps: float = 1e-5
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> KDA:
        self.widths(d_model)
        return KDA(d_model, self)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(K, rank). Raises ValueError for what cannot be built."""
        check_eps(self.norm_eps)
        if self.n_heads < 1 or (self.head_dim is None and d_model % self.n_heads):
            raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {self.n_heads}, or give head_dim")
        k = self.head_dim if self.head_dim is not None else d_model // self.n_heads
        rank = self.rank if self.rank is not None else k
        if min(k, rank, self.conv_width, self.chunk) < 1:
            raise ValueError(
                f"head_dim = {k}, rank = {rank}, conv_width = {self.conv_width} and chunk = {self.chunk} must be positive"
            )
        if rank > min(d_model, self.n_heads * k):
            raise ValueError(
                f"rank = {rank} is more than d_model = {d_model} or n_heads * head_dim = {self.n_heads * k}: "
                "a full matrix would be smaller; lower it"
            )
        return k, rank

    def cost(self, d_model: int) -> Cost:
        (k, rank), h = self.widths(d_model), self.n_heads
        weights = 4 * d_model * h * k + 2 * rank * (d_model + h * k) + d_model * h
        mixing = h * (6 * k * k + 8 * self.chunk * k) + 6 * h * k * self.conv_width
        params = weights + 3 * h * k * self.conv_width + h + h * k + k
        return Cost(params, 2 * weights + mixing, fixed_state=h * k * k + 3 * (self.conv_width - 1) * h * k)


class KDA(nn.Module):
    tp: ClassVar = {
        "q_proj": "col", "k_proj": "col", "v_proj": "col", "f_b_proj": "col", "g_b_proj": "col", "b_proj": "col",
        "q_conv": "col", "k_conv": "col", "v_conv": "col", "A_log": "col", "dt_bias": "col", "o_proj": "row",
    }  # fmt: skip

    def __init__(self, d_model: int, cfg: KDAConfig):
        super().__init__()
        self.head_dim, rank = cfg.widths(d_model)
        self.n_heads, self.conv_width, self.chunk = cfg.n_heads, cfg.conv_width, cfg.chunk
        inner = cfg.n_heads * self.head_dim
        self.q_proj = Linear(d_model, inner, bias=False)
        self.k_proj = Linear(d_model, inner, bias=False)
        self.v_proj = Linear(d_model, inner, bias=False)
        self.f_a_proj = Linear(d_model, rank, bias=False)
        self.f_b_proj = Linear(rank, inner, bias=False)
        self.g_a_proj = Linear(d_model, rank, bias=False)
        self.g_b_proj = Linear(rank, inner, bias=False)
        self.b_proj = Linear(d_model, cfg.n_heads, bias=False)
        taps = lambda: nn.Parameter(torch.empty(inner, cfg.conv_width).uniform_(-1, 1) * cfg.conv_width**-0.5)
        self.q_conv, self.k_conv, self.v_conv = taps(), taps(), taps()
        self.A_log = nn.Parameter(torch.empty(cfg.n_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(step_bias(inner))
        self.norm = RMSNorm(self.head_dim, cfg.norm_eps)
        self.o_proj = Linear(inner, d_model, bias=False)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        h, k = self.n_heads, self.head_dim
        return Memory.zeros(batch, device, dtype, S=(h, k, k), tail=(self.conv_width - 1, 3 * h * k))

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, T, H, K) log alpha."""
        f, A_log, dt = wide(self.f_b_proj(self.f_a_proj(x)), self.A_log, self.dt_bias)
        return -A_log.exp()[:, None] * F.softplus(f + dt).unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        taps, tail = torch.cat((self.q_conv, self.k_conv, self.v_conv)), None if state is None else state["tail"]
        qkv, tail = causal_conv(qkv, taps, None, marks, tail)
        q, k, v = F.silu(qkv).unflatten(-1, (3, -1, self.head_dim)).transpose(1, 3).unbind(2)  # (B, H, T, K)
        beta, g = marks.silence(self.b_proj(x).sigmoid(), self.log_decay(x))
        o, S = delta(
            unit(q) * self.head_dim**-0.5, unit(k), v, beta.transpose(1, 2), g.transpose(1, 2),
            marks, None if state is None else state["S"], self.chunk,
        )  # fmt: skip
        if state is not None:
            state.write(S=S, tail=tail)
        o = self.norm(o.transpose(1, 2).to(x.dtype)).flatten(2)  # (B, T, H K)
        return self.o_proj(o * self.g_b_proj(self.g_a_proj(x)).sigmoid()), {}
