"""DeltaNet: linear attention that first reads what its memory says of a key, and writes only the correction.

    q, k, v = silu(conv(W x))                                    a causal filter of a few taps for each channel
    q, k    = q / |q|, k / |k|                                   |x| = sqrt(sum x^2 + 1e-6), per head
    S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T           beta_t = sigmoid(w_b . x_t), one for each head
    o_t = S_t^T q_t / sqrt(K),        y = W_o norm(o)            RMSNorm over each head, one weight for all of them

Source: 2406.06484 section 3; the rule itself 2102.11174.
Why: linear attention only adds, so that a key written twice answers with the sum of both values; here the second write
replaces the first, and beta says how far. Without decay nothing else is ever forgotten: see gated_delta.py.
Stored: H K V + (W - 1) H (2 K + V) values whatever the length. FLOPs per token: 2 per weight + H (6 K V + C (5 K + 3 V)).
Delete "- S_(t-1)^T k_t" and it is linear attention without its normaliser.
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
from zero2llm.layers.norms.rms import RMSNorm, check_eps
from zero2llm.ops.conv import causal_conv
from zero2llm.ops.delta import delta, unit
from zero2llm.ops.marks import Marks
from zero2llm.ops.scan import CHUNK


@config
class DeltaNetConfig:
    kind: Literal["deltanet"] = "deltanet"
    n_heads: int
    head_dim: int | None = None  # key width K; None = d_model / n_heads
    value_dim: int | None = None  # V per head; None = K
    conv_width: int = 4  # taps of the short convolution, the token itself counted
    norm_eps: float = 1e-5
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> DeltaNet:
        self.widths(d_model)
        return DeltaNet(d_model, self)

    def widths(self, d_model: int) -> tuple[int, int]:
        """(K, V) of a head. Raises ValueError for what cannot be built."""
        check_eps(self.norm_eps)
        if self.n_heads < 1 or (self.head_dim is None and d_model % self.n_heads):
            raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {self.n_heads}, or give head_dim")
        k = self.head_dim if self.head_dim is not None else d_model // self.n_heads
        v = self.value_dim if self.value_dim is not None else k
        if min(k, v, self.conv_width, self.chunk) < 1:
            raise ValueError(
                f"head_dim = {k}, value_dim = {v}, conv_width = {self.conv_width} and chunk = {self.chunk} must be positive"
            )
        return k, v

    def cost(self, d_model: int) -> Cost:
        (k, v), h = self.widths(d_model), self.n_heads
        weights = d_model * h * (2 * k + 2 * v + 1)
        filters = h * (2 * k + v) * self.conv_width
        mixing = h * (6 * k * v + self.chunk * (5 * k + 3 * v))
        state = h * k * v + (self.conv_width - 1) * h * (2 * k + v)
        return Cost(weights + filters + v, 2 * (weights + filters) + mixing, fixed_state=state)


class DeltaNet(nn.Module):
    tp: ClassVar = {
        "q_proj": "col", "k_proj": "col", "v_proj": "col", "b_proj": "col", "o_proj": "row",
        "q_conv": "col", "k_conv": "col", "v_conv": "col",
    }  # fmt: skip

    def __init__(self, d_model: int, cfg: DeltaNetConfig):
        super().__init__()
        self.head_dim, self.value_dim = k, v = cfg.widths(d_model)
        self.n_heads, self.conv_width, self.chunk = cfg.n_heads, cfg.conv_width, cfg.chunk
        h = cfg.n_heads
        self.q_proj = Linear(d_model, h * k, bias=False)
        self.k_proj = Linear(d_model, h * k, bias=False)
        self.v_proj = Linear(d_model, h * v, bias=False)
        self.b_proj = Linear(d_model, h, bias=False)
        taps = lambda width: nn.Parameter(torch.empty(width, cfg.conv_width).uniform_(-1, 1) * cfg.conv_width**-0.5)
        self.q_conv, self.k_conv, self.v_conv = taps(h * k), taps(h * k), taps(h * v)
        self.norm = RMSNorm(v, cfg.norm_eps)
        self.o_proj = Linear(h * v, d_model, bias=False)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        h, k, v = self.n_heads, self.head_dim, self.value_dim
        return Memory.zeros(batch, device, dtype, S=(h, k, v), tail=(self.conv_width - 1, h * (2 * k + v)))

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        taps, tail = torch.cat((self.q_conv, self.k_conv, self.v_conv)), None if state is None else state["tail"]
        mixed, tail = causal_conv(torch.cat(parts, -1), taps, None, marks, tail)
        q, k, v = F.silu(mixed).split([part.shape[-1] for part in parts], -1)
        q, k = (unit(p.unflatten(-1, (-1, self.head_dim))).transpose(1, 2) for p in (q, k))  # (B, H, T, K)
        v = v.unflatten(-1, (-1, self.value_dim)).transpose(1, 2)
        (beta,) = marks.silence(self.b_proj(x).sigmoid())  # (B, T, H)
        o, S = delta(
            q * self.head_dim**-0.5, k, v, beta.transpose(1, 2), None,
            marks, None if state is None else state["S"], self.chunk,
        )  # fmt: skip
        if state is not None:
            state.write(S=S, tail=tail)
        return self.o_proj(self.norm(o.transpose(1, 2).to(x.dtype)).flatten(2)), {}
