"""Gated linear attention: a linear-attention state in which every key channel forgets at a rate that the token chooses.

    q = W_q x / sqrt(K),  k = W_k x,  v = W_v x
    g   = logsigmoid(W_b W_a x + b) / tau                   log-decay per key channel; W_a leads through a narrow rank
    S_t = diag(exp g_t) S_(t-1) + k_t v_t^T,    o_t = S_t^T q_t
    y   = W_o (silu(W_g x) * norm_head(o))                  RMSNorm over each head, one weight (V) for all of them

Source: 2312.06635 section 4 (recurrence, gate with tau = 16 and rank 16, widths D / 2 for keys and D for values in all).
Changed: RMSNorm where the paper has LayerNorm, and no bias in W_g.
Why: about 4 D^2 parameters at the published widths, as much as softmax attention; H K V values of state at any length.
tau keeps exp g near 1 at the start (0.96 for a pre-activation of 0), so that the state remembers. A decay per channel
costs exponentials of whole keys where RetNet's and Mamba-2's decay per head costs one number.
Make g one number per head and it is Mamba-2's recurrence; make it constant, RetNet's. Shapes: x (B, T, D) -> (B, T, D).
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
from zero2llm.ops.marks import Marks, wide
from zero2llm.ops.scan import CHUNK, scan


@config
class GLAConfig:
    kind: Literal["gla"] = "gla"
    n_heads: int
    head_dim: int | None = None  # key width K; None = d_model / (2 n_heads)
    value_dim: int | None = None  # V per head; None = 2 K
    gate_rank: int = 16
    tau: float = 16.0
    norm_eps: float = 1e-5
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> GLA:
        self.widths(d_model)
        return GLA(d_model, self)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(K, V) of a head. Raises ValueError for what cannot be built."""
        check_eps(self.norm_eps)
        if self.n_heads < 1 or (self.head_dim is None and d_model % (2 * self.n_heads)):
            raise ValueError(f"d_model = {d_model} must be a multiple of 2 * {self.n_heads} heads, or give head_dim")
        k = d_model // (2 * self.n_heads) if self.head_dim is None else self.head_dim
        v = 2 * k if self.value_dim is None else self.value_dim
        if min(self.chunk, k, v) < 1:
            raise ValueError(f"chunk = {self.chunk}, head_dim = {k}, value_dim = {v} must be at least 1")
        if not self.tau > 0 or self.gate_rank < 1:
            raise ValueError(f"tau = {self.tau} and gate_rank = {self.gate_rank} must be positive")
        if self.gate_rank > d_model:
            raise ValueError(f"gate_rank = {self.gate_rank} is more than d_model = {d_model}: it compresses; lower it")
        return k, v

    def cost(self, d_model: int) -> Cost:
        k, v = self.widths(d_model)
        h, r = self.n_heads, self.gate_rank
        weights = d_model * h * (2 * k + 3 * v) + r * (d_model + h * k)
        mixing = h * (4 * k * v + 2 * self.chunk * (k + v))
        return Cost(weights + h * k + v, 2 * weights + mixing, fixed_state=h * k * v)


class GLA(nn.Module):
    tp: ClassVar = {
        "q_proj": "col", "k_proj": "col", "v_proj": "col", "g_proj": "col", "f_b_proj": "col", "o_proj": "row",
    }  # fmt: skip

    def __init__(self, d_model: int, cfg: GLAConfig):
        super().__init__()
        self.head_dim, self.value_dim = k, v = cfg.widths(d_model)
        self.n_heads, self.tau, self.chunk, self.eps = cfg.n_heads, cfg.tau, cfg.chunk, cfg.norm_eps
        self.q_proj = Linear(d_model, cfg.n_heads * k, bias=False)
        self.k_proj = Linear(d_model, cfg.n_heads * k, bias=False)
        self.v_proj = Linear(d_model, cfg.n_heads * v, bias=False)
        self.g_proj = Linear(d_model, cfg.n_heads * v, bias=False)
        self.f_a_proj = Linear(d_model, cfg.gate_rank, bias=False)  # W_a, W_b of the forget gate
        self.f_b_proj = Linear(cfg.gate_rank, cfg.n_heads * k, bias=True)
        self.o_proj = Linear(cfg.n_heads * v, d_model, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(v))

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        return Memory.zeros(batch, device, dtype, S=(self.n_heads, self.head_dim, self.value_dim))

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, T, H, K) g <= 0, in fp32 or wider."""
        (a,) = wide(self.f_b_proj(self.f_a_proj(x)))
        return F.logsigmoid(a).unflatten(-1, (-1, self.head_dim)) / self.tau

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        q, k = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj))  # (B, T, H, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.value_dim))
        k, g = marks.silence(k, self.log_decay(x))
        o, S = scan(
            q.transpose(1, 2) * self.head_dim**-0.5, k.transpose(1, 2), v.transpose(1, 2), g.transpose(1, 2),
            marks, None if state is None else state["S"], self.chunk,
        )  # fmt: skip
        if state is not None:
            state.write(S=S)
        o = F.rms_norm(o, o.shape[-1:], eps=self.eps).to(x.dtype) * self.norm_weight
        return self.o_proj(F.silu(self.g_proj(x)) * o.transpose(1, 2).flatten(2)), {}
