"""Linear attention: positive features in place of the exponential, so that the past adds up to a state of fixed size.

    q = phi(W_q x),  k = phi(W_k x),  v = W_v x            phi(a) = elu(a) + 1: a + 1 above 0, e^a below
    S_t = S_(t-1) + k_t v_t^T,    z_t = z_(t-1) + k_t
    o_t = S_t^T q_t / (q_t . z_t + eps)                    = the mean of v_s, weighted by q_t . k_s, over s <= t
    y   = W_o o

Source: 2006.16236 sections 3.2 to 3.4. z is kept as the last column of S, for it is the state of a value that is always 1.
No scale: it cancels. No positions: add them to the embedding. ("1-Liner Attention", found in lists of mechanisms, names
no published method; most likely it is a garbling of this one.)
Why: softmax attention stores 2 H K values per token and meets all of them; here H K (V + 1) values hold the whole text,
and a token costs the same at any length. The price: nothing is ever forgotten, and weights cannot be sharp.
Delete z and you have RetNet without decay. Shapes: x (B, T, D) -> (B, T, D).
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
from zero2llm.ops.marks import Marks, wide
from zero2llm.ops.scan import CHUNK, scan


@config
class LinearConfig:
    kind: Literal["linear"] = "linear"
    n_heads: int
    head_dim: int | None = None  # key width K; None = d_model / n_heads
    value_dim: int | None = None  # V per head; None = K
    eps: float = 1e-6  # in the denominator
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> LinearAttention:
        if not self.eps > 0:
            raise ValueError(f"eps = {self.eps} must be positive: before the first token the denominator is 0")
        return LinearAttention(d_model, self)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(K, V) of a head. Raises ValueError for what cannot be built."""
        if self.n_heads < 1 or (self.head_dim is None and d_model % self.n_heads):
            raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {self.n_heads}, or give head_dim")
        k = d_model // self.n_heads if self.head_dim is None else self.head_dim
        v = k if self.value_dim is None else self.value_dim
        if min(self.chunk, k, v) < 1:
            raise ValueError(f"chunk = {self.chunk}, head_dim = {k} and value_dim = {v} must be at least 1")
        return k, v

    def cost(self, d_model: int) -> Cost:
        k, v = self.widths(d_model)
        weights = d_model * self.n_heads * (2 * k + 2 * v)
        mixing = self.n_heads * (4 * k * (v + 1) + 2 * self.chunk * (k + v + 1))
        return Cost(weights, 2 * weights + mixing, fixed_state=self.n_heads * k * (v + 1))


class LinearAttention(nn.Module):
    tp: ClassVar = {"q_proj": "col", "k_proj": "col", "v_proj": "col", "o_proj": "row"}

    def __init__(self, d_model: int, cfg: LinearConfig):
        super().__init__()
        self.head_dim, self.value_dim = cfg.widths(d_model)
        self.n_heads, self.chunk, self.eps = cfg.n_heads, cfg.chunk, cfg.eps
        self.q_proj = Linear(d_model, cfg.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(d_model, cfg.n_heads * self.head_dim, bias=False)
        self.v_proj = Linear(d_model, cfg.n_heads * self.value_dim, bias=False)
        self.o_proj = Linear(cfg.n_heads * self.value_dim, d_model, bias=False)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        return Memory.zeros(batch, device, dtype, S=(self.n_heads, self.head_dim, self.value_dim + 1))

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        q, k = (phi(p(x)).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj))  # (B, T, H, K)
        v = F.pad(self.v_proj(x).unflatten(-1, (-1, self.value_dim)), (0, 1), value=1.0)  # (B, T, H, V + 1)
        (k,) = marks.silence(k)
        o, S = scan(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q.new_zeros(1, 1, x.shape[1]),
            marks, None if state is None else state["S"], self.chunk,
        )  # fmt: skip
        if state is not None:
            state.write(S=S)
        o = o[..., :-1] / (o[..., -1:] + self.eps)
        return self.o_proj(o.transpose(1, 2).flatten(2).to(x.dtype)), {}


def phi(a: Tensor) -> Tensor:
    """elu(a) + 1, without the -1 + 1 that would round e^a to 0 far below zero; in fp32 or wider."""
    (a,) = wide(a)
    return torch.where(a > 0, a + 1, a.clamp(max=0).exp())
