"""Mamba: a recurrence that chooses, token by token, what to write, how long to keep it and what to read.

    u, z = W_in x                                      two streams of width E
    u = silu(conv(u))                                  causal, one filter of W taps a channel
    d, B, C = W_x u                                    d of rank R; B, C of N numbers, shared by all channels
    dt = softplus(W_dt d + b_dt)                       step size of each channel: 0 = ignore the token, large = forget
    h_t = exp(dt_t A) * h_(t-1) + (dt_t u_t) B_t^T     A = -exp(A_log) (E, N): negative, so that every state decays
    y = W_o ((h_t C_t + D * u_t) * silu(z))

Source: 2312.00752 section 3 and algorithm 2; dt_norms: RMSNorm on d, B and C as in Jamba (2403.19887 section 6.4),
which keeps large models from exploding. A_log starts at log 1 .. log N, b_dt so that dt is log-uniform in [0.001,
0.1]; W_dt starts like any projection (the paper: uniform in +-R^-1/2).
Why: block and feed-forward in one (E = 2 D: 6 D^2 parameters), used without an ffn. Decoding keeps E (N + W - 1) values
however long the text, and a token costs the same at any position. Delete the dependence of dt, B, C on u and it is S4D;
give a head one decay instead of E N and it is Mamba-2, a matrix product.
Shapes: x (B, T, D) -> (B, T, D).
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
from zero2llm.layers.norms.rms import RMSNorm, check_eps
from zero2llm.ops.conv import causal_conv
from zero2llm.ops.marks import Marks, wide
from zero2llm.ops.selective_scan import selective_scan


@config
class Mamba1Config:
    kind: Literal["mamba1"] = "mamba1"
    state_dim: int = 16  # N
    conv_width: int = 4  # W
    expand: int = 2  # E / D
    dt_rank: int | None = None  # R; None = D / 16, rounded up
    conv_bias: bool = True
    proj_bias: bool = False
    dt_norms: bool = False
    norm_eps: float = 1e-6  # of those norms

    def build(self, d_model: int, place: Place = ALONE) -> Mamba1:
        self.rank(d_model)
        return Mamba1(d_model, self)

    def rank(self, d_model: int) -> int:
        """R. Raises ValueError for what cannot be built."""
        check_eps(self.norm_eps)
        for name in ("state_dim", "conv_width", "expand"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        rank, width = self.dt_rank if self.dt_rank is not None else math.ceil(d_model / 16), self.expand * d_model
        if not 1 <= rank <= width:
            raise ValueError(f"dt_rank = {rank} must be between 1 and expand * d_model = {width}")
        return rank

    def cost(self, d_model: int) -> Cost:
        d, r, n, w, e = d_model, self.rank(d_model), self.state_dim, self.conv_width, self.expand * d_model
        weights = 3 * d * e + e * (r + 2 * n) + r * e
        filters = e * (w + self.conv_bias) + self.proj_bias * (2 * e + d) + self.dt_norms * (r + 2 * n)
        mixing = 2 * w * e + 9 * e * n
        return Cost(weights + filters + e * (n + 2), 2 * weights + mixing, fixed_state=e * (n + w - 1))


class Mamba1(nn.Module):
    tp: ClassVar = None  # W_in's halves are two streams, and W_x reads all channels

    def __init__(self, d_model: int, cfg: Mamba1Config):
        super().__init__()
        e, n, rank = cfg.expand * d_model, cfg.state_dim, cfg.rank(d_model)
        self.sizes, self.width, self.taps = [rank, n, n], e, cfg.conv_width
        self.in_proj = Linear(d_model, 2 * e, bias=cfg.proj_bias)
        reach = cfg.conv_width**-0.5
        self.conv_weight = nn.Parameter(torch.empty(e, cfg.conv_width).uniform_(-reach, reach))
        self.conv_bias = nn.Parameter(torch.empty(e).uniform_(-reach, reach)) if cfg.conv_bias else None
        self.x_proj = Linear(e, rank + 2 * n, bias=False)
        self.norms = nn.ModuleList(RMSNorm(size, cfg.norm_eps) for size in self.sizes) if cfg.dt_norms else None
        self.dt_proj = Linear(rank, e, bias=False)
        self.dt_bias = nn.Parameter(first_dt_bias(e))
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(e, 1))
        self.D = nn.Parameter(torch.ones(e))
        self.o_proj = Linear(e, d_model, bias=cfg.proj_bias)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        return Memory.zeros(batch, device, dtype, h=self.A_log.shape, tail=(self.taps - 1, self.width))

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        u, z = self.in_proj(x).chunk(2, -1)  # (B, T, E)
        u, tail = causal_conv(u, self.conv_weight, self.conv_bias, marks, None if state is None else state["tail"])
        u = F.silu(u)
        d, B, C = self.x_proj(u).split(self.sizes, -1)  # (B, T, R), (B, T, N)
        if self.norms is not None:
            d, B, C = (norm(part) for norm, part in zip(self.norms, (d, B, C), strict=True))
        d, bias, A_log = wide(self.dt_proj(d), self.dt_bias, self.A_log)
        dt = F.softplus(d + bias)
        y, h = selective_scan(u, dt, -A_log.exp(), B, C, self.D, marks, None if state is None else state["h"])
        if state is not None:
            state.write(h=h, tail=tail)
        return self.o_proj(y.to(x.dtype) * F.silu(z)), {}


def first_dt_bias(width: int, low: float = 1e-3, high: float = 1e-1) -> Tensor:
    """b with softplus(b) log-uniform in [low, high]: memories of 10 to 1000 tokens for A = -1."""
    dt = torch.empty(width).uniform_(math.log(low), math.log(high)).exp()
    return dt + torch.log(-torch.expm1(-dt))
