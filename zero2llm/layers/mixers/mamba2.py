"""Mamba-2: a state-space model with one decay per head, which makes it linear attention (state-space duality).

    z, u, B, C, dt = W_in x                            u (H, P) values;  B, C (G, N) shared by the H / G heads of a group
    u, B, C = silu(conv(u, B, C))                      causal, W tokens, one filter per channel
    dt  = clamp(softplus(dt + dt_bias))                one step size per head;   A = -exp(A_log) < 0
    S_t = exp(dt A) S_(t-1) + B_t (dt u_t)^T           S (N, P)
    y_t = S_t^T C_t + D u_t                            D reads u, not dt u
    out = W_o norm_group(y * silu(z))                  the gate stands before the norm

Source: 2405.21060 sections 5 to 7. As linear attention: q = C, k = B, v = dt u, log-decay dt A; because heads share B and
C, Q K^T is made once per group. W_in is one matrix, as published: all five read the same x, and one product is faster
than five; split it and nothing changes. Meant as a whole block, without a feed-forward layer: `ffn: null`.
Initial values: A ~ U(1, 16), D = 1, dt_bias such that softplus(dt_bias) is log-uniform in dt_range.
Why: H P N values of state + (W - 1)(H P + 2 G N) of the convolution, at any length; a state of N = 128 per channel where
Mamba-1 affords 16, because a decay per head turns the scan into matrix products. About 6 D^2 parameters at H P = 2 D.
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
from zero2llm.layers.norms.rms import check_eps
from zero2llm.ops.conv import causal_conv
from zero2llm.ops.marks import Marks, wide
from zero2llm.ops.scan import CHUNK, scan


@config
class Mamba2Config:
    kind: Literal["mamba2"] = "mamba2"
    n_heads: int | None = None  # None = 2 d_model / head_dim
    head_dim: int = 64  # P
    state_dim: int = 128  # N
    n_groups: int = 1
    conv_width: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    dt_range: tuple[float, float] = (1e-3, 1e-1)  # of the step sizes at the start
    dt_limit: tuple[float, float] | None = None  # of the step sizes at any time
    norm_eps: float = 1e-5
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> Mamba2:
        return Mamba2(d_model, self.heads(d_model), self)

    def heads(self, d_model: int) -> int:
        """H. Raises ValueError for what cannot be built."""
        check_eps(self.norm_eps)
        least = min(self.head_dim, self.state_dim, self.n_groups, self.conv_width, self.chunk)
        if least < 1:
            raise ValueError(
                f"head_dim = {self.head_dim}, state_dim = {self.state_dim}, n_groups = {self.n_groups}, "
                f"conv_width = {self.conv_width} and chunk = {self.chunk} must be at least 1"
            )
        if self.n_heads is None and 2 * d_model % self.head_dim:
            raise ValueError(
                f"2 * d_model = 2 * {d_model} must be a multiple of head_dim = {self.head_dim}, or give n_heads"
            )
        h = 2 * d_model // self.head_dim if self.n_heads is None else self.n_heads
        if h < 1 or h % self.n_groups:
            raise ValueError(f"n_heads = {h} must be a positive multiple of n_groups = {self.n_groups}")
        if not 0 < self.dt_range[0] <= self.dt_range[1]:
            raise ValueError(f"dt_range = {self.dt_range} must be two positive numbers, the smaller first")
        if self.dt_limit is not None and not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise ValueError(f"dt_limit = {self.dt_limit} must be two numbers >= 0, the smaller first")
        return h

    def cost(self, d_model: int) -> Cost:
        h, shared = self.heads(d_model), self.n_groups * self.state_dim
        inner = h * self.head_dim
        convolved = inner + 2 * shared
        weights = d_model * (inner + convolved + h) + inner * d_model
        biases = self.proj_bias * (inner + convolved + h + d_model) + self.conv_bias * convolved
        params = weights + biases + self.conv_width * convolved + 3 * h + inner
        mixing = 4 * self.state_dim * inner + 2 * self.chunk * (inner + shared) + 2 * self.conv_width * convolved
        state = inner * self.state_dim + (self.conv_width - 1) * convolved
        return Cost(params, 2 * weights + mixing, fixed_state=state)


class Mamba2(nn.Module):
    tp: ClassVar = None  # z, u, B, C and dt lie in one matrix, and all heads may share B and C

    def __init__(self, d_model: int, n_heads: int, cfg: Mamba2Config):
        super().__init__()
        self.n_groups, self.head_dim, self.state_dim = cfg.n_groups, cfg.head_dim, cfg.state_dim
        self.n_heads, self.chunk, self.eps, self.dt_limit = n_heads, cfg.chunk, cfg.norm_eps, cfg.dt_limit
        self.inner, self.shared = n_heads * cfg.head_dim, cfg.n_groups * cfg.state_dim
        convolved, bound = self.inner + 2 * self.shared, cfg.conv_width**-0.5
        self.in_proj = Linear(d_model, self.inner + convolved + n_heads, bias=cfg.proj_bias)
        self.conv_weight = nn.Parameter(torch.empty(convolved, cfg.conv_width).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(convolved).uniform_(-bound, bound)) if cfg.conv_bias else None
        low, high = map(math.log, cfg.dt_range)
        dt = torch.empty(n_heads).uniform_(low, high).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(n_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.inner))
        self.o_proj = Linear(self.inner, d_model, bias=cfg.proj_bias)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        convolved, width = self.conv_weight.shape
        S = (self.n_groups, self.n_heads // self.n_groups, self.state_dim, self.head_dim)
        return Memory.zeros(batch, device, dtype, S=S, tail=(width - 1, convolved))

    def step_size(self, dt: Tensor) -> Tensor:
        """(B, T, H) how far the state moves at each token, > 0, in fp32 or wider."""
        dt, bias = wide(dt, self.dt_bias)
        dt = F.softplus(dt + bias)
        return dt if self.dt_limit is None else dt.clamp(*self.dt_limit)

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        S, tail = (None, None) if state is None else (state["S"], state["tail"])
        by_group = lambda t: t.unflatten(-1, (self.n_groups, -1))
        z, ubc, dt = self.in_proj(x).split((self.inner, self.inner + 2 * self.shared, self.n_heads), -1)
        ubc, tail = causal_conv(ubc, self.conv_weight, self.conv_bias, marks, tail)
        u, k, q = F.silu(ubc).split((self.inner, self.shared, self.shared), -1)
        q, k = (by_group(t)[..., None, :].movedim(1, -2) for t in (q, k))  # (B, G, 1, T, N)
        u = u.unflatten(-1, (self.n_groups, -1, self.head_dim))  # (B, T, G, R, P), R heads in a group
        (dt,) = marks.silence(self.step_size(dt))  # a step of 0 neither writes nor forgets
        A, dt = -wide(self.A_log)[0].exp(), by_group(dt)  # dt (B, T, G, R)
        v, g = (dt[..., None] * u).movedim(1, -2), (dt * by_group(A)).movedim(1, -1)  # (B, G, R, T, P), (B, G, R, T)
        o, S = scan(q, k, v, g, marks, S, self.chunk)
        if state is not None:
            state.write(S=S, tail=tail)
        y = o.movedim(-2, 1) + by_group(self.D)[..., None] * u  # (B, T, G, R, P)
        y = y.flatten(3) * F.silu(by_group(wide(z)[0]))  # (B, T, G, R P)
        y = F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(2).to(x.dtype) * self.norm_weight
        return self.o_proj(y), {}
