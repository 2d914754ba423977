"""Gated DeltaNet: the delta rule with a memory that also fades, by a factor per head that each token chooses.

    q, k, v = silu(conv(W x)),     q, k = q / |q|, k / |k|         H_k heads of width K; H_v heads of width V
    alpha_t = exp(-exp(A) softplus(w_a . x_t + dt))                one in (0, 1) for each of the H_v heads
    beta_t  = sigmoid(w_b . x_t)
    S' = alpha_t S_(t-1)           S_t = S' + beta_t k_t (v_t - S'^T k_t)^T          fade first, then correct what is left
    o_t = S_t^T q_t / sqrt(K)      y = W_o (w * norm(o) * silu(W_g x))               value head h reads key head h // (H_v / H_k)

Source: 2412.06464 section 3, as Qwen3-Next builds it: the norm before the gate, one scale w for
all heads, no biases. A starts as the log of U(0.01, 16), softplus(dt) log-uniform in [0.001, 0.1] as in Mamba-2
(2405.21060); both are vectors, which no optimizer here decays, and the decay is computed in fp32.
Why: the delta rule replaces one key's value at a time; the gate clears the whole memory when the subject changes.
Stored: H_v K V + (W - 1)(2 H_k K + H_v V) values whatever the length. FLOPs per token: 2 per weight
+ H_v (6 K V + C (5 K + 3 V)). With alpha = 1 and without the output gate it is deltanet.py.
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
from zero2llm.ops.delta import delta, unit
from zero2llm.ops.marks import Marks, wide
from zero2llm.ops.scan import CHUNK


@config
class GatedDeltaConfig:
    kind: Literal["gated_delta"] = "gated_delta"
    n_v_heads: int
    n_k_heads: int | None = None  # None = n_v_heads
    head_dim: int | None = None  # key width K; None = d_model / n_v_heads
    value_dim: int | None = None  # V per head; None = K
    conv_width: int = 4  # taps of the short convolution, the token itself counted
    norm_eps: float = 1e-6
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> GatedDelta:
        self.widths(d_model)
        return GatedDelta(d_model, self)

    def widths(self, d_model: int) -> tuple[int, int, int, int]:
        """(H_k, H_v, K, V). Raises ValueError for what cannot be built."""
        check_eps(self.norm_eps)
        h_k, h_v = self.n_v_heads if self.n_k_heads is None else self.n_k_heads, self.n_v_heads
        if h_k < 1 or h_v < 1 or h_v % h_k:
            raise ValueError(f"n_v_heads = {h_v} must be a positive multiple of n_k_heads = {h_k}")
        if self.head_dim is None and d_model % h_v:
            raise ValueError(f"d_model = {d_model} must be a multiple of n_v_heads = {h_v}, or give head_dim")
        k = self.head_dim if self.head_dim is not None else d_model // h_v
        v = self.value_dim if self.value_dim is not None else k
        if min(k, v, self.conv_width, self.chunk) < 1:
            raise ValueError(
                f"head_dim = {k}, value_dim = {v}, conv_width = {self.conv_width} and chunk = {self.chunk} must be positive"
            )
        return h_k, h_v, k, v

    def cost(self, d_model: int) -> Cost:
        h_k, h_v, k, v = self.widths(d_model)
        mixed = 2 * h_k * k + h_v * v  # channels that the convolution sees
        weights = d_model * (mixed + 2 * h_v * v + 2 * h_v)
        mixing = h_v * (6 * k * v + self.chunk * (5 * k + 3 * v)) + 2 * mixed * self.conv_width
        state = h_v * k * v + (self.conv_width - 1) * mixed
        return Cost(weights + mixed * self.conv_width + 2 * h_v + v, 2 * weights + mixing, fixed_state=state)


class GatedDelta(nn.Module):
    tp: ClassVar = {
        "q_proj": "col", "k_proj": "col", "v_proj": "col", "g_proj": "col", "b_proj": "col", "a_proj": "col",
        "q_conv": "col", "k_conv": "col", "v_conv": "col", "A_log": "col", "dt_bias": "col", "o_proj": "row",
    }  # fmt: skip

    def __init__(self, d_model: int, cfg: GatedDeltaConfig):
        super().__init__()
        self.n_k, self.n_v, self.head_dim, self.value_dim = h_k, h_v, k, v = cfg.widths(d_model)
        self.conv_width, self.chunk = cfg.conv_width, cfg.chunk
        self.q_proj = Linear(d_model, h_k * k, bias=False)
        self.k_proj = Linear(d_model, h_k * k, bias=False)
        self.v_proj = Linear(d_model, h_v * v, bias=False)
        self.g_proj = Linear(d_model, h_v * v, bias=False)
        self.b_proj = Linear(d_model, h_v, bias=False)
        self.a_proj = Linear(d_model, h_v, bias=False)
        taps = lambda width: nn.Parameter(torch.empty(width, cfg.conv_width).uniform_(-1, 1) * cfg.conv_width**-0.5)
        self.q_conv, self.k_conv, self.v_conv = taps(h_k * k), taps(h_k * k), taps(h_v * v)
        self.A_log = nn.Parameter(torch.empty(h_v).uniform_(0.01, 16).log())
        self.dt_bias = nn.Parameter(step_bias(h_v))
        self.norm = RMSNorm(v, cfg.norm_eps)
        self.o_proj = Linear(h_v * v, d_model, bias=False)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        tail = (self.conv_width - 1, 2 * self.n_k * self.head_dim + self.n_v * self.value_dim)
        return Memory.zeros(batch, device, dtype, S=(self.n_v, self.head_dim, self.value_dim), tail=tail)

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, T, H_v) log alpha."""
        a, A_log, dt = wide(self.a_proj(x), self.A_log, self.dt_bias)
        return -A_log.exp() * F.softplus(a + dt)

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        taps, tail = torch.cat((self.q_conv, self.k_conv, self.v_conv)), None if state is None else state["tail"]
        mixed, tail = causal_conv(torch.cat(parts, -1), taps, None, marks, tail)
        q, k, v = F.silu(mixed).split([part.shape[-1] for part in parts], -1)
        v = v.unflatten(-1, (-1, self.value_dim)).transpose(1, 2)  # (B, H_v, T, V)
        q, k = (unit(p.unflatten(-1, (-1, self.head_dim))).transpose(1, 2) for p in (q, k))
        q, k = (p.repeat_interleave(v.shape[1] // p.shape[1], 1) for p in (q, k))  # (B, H_v, T, K)
        beta, g = marks.silence(self.b_proj(x).sigmoid(), self.log_decay(x))  # (B, T, H_v)
        o, S = delta(
            q * self.head_dim**-0.5, k, v, beta.transpose(1, 2), g.transpose(1, 2),
            marks, None if state is None else state["S"], self.chunk,
        )  # fmt: skip
        if state is not None:
            state.write(S=S, tail=tail)
        o = self.norm(o.transpose(1, 2).to(x.dtype)).flatten(2)  # (B, T, H_v V)
        return self.o_proj(o * F.silu(self.g_proj(x))), {}


def step_bias(n: int) -> Tensor:
    """(n,) values whose softplus is log-uniform in [0.001, 0.1]: how fast a fresh layer forgets."""
    step = torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return step + (-torch.expm1(-step)).log()
