"""Lightning attention: unnormalised linear attention with a fixed decay per head and layer, normed and gated behind.

    q = silu(W_q x),  k = silu(W_k x),  v = silu(W_v x)
    S_t = exp(-s_h) S_(t-1) + k_t v_t^T,    o_t = S_t^T q_t                no 1 / sqrt(K): the norm takes it away
    y   = W_o (sigmoid(W_g x) * norm(o))                                   RMSNorm over all heads at once

    s_h = 2^(-8 (h + 1) / H) * (1 - l / (L - 1) + 1e-5)                    head h of H, layer l of L

Source: slopes, activation and norm TransNormerLLM 2307.14995; the tiling that gave the name Lightning Attention-2
2401.04658; the gate and this composition MiniMax-01 2501.08313 section 2.2. The first layers look at the neighbourhood,
the last one hardly forgets; the slopes are constants, nothing learns them.
Why: H K^2 values of state at any length, no division to go wrong, and a decay that needs no projection. 5 D^2 parameters.
Add rotation and make the decay the same in every layer and it is RetNet. Shapes: x (B, T, D) -> (B, T, D).
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
from zero2llm.ops.marks import Marks
from zero2llm.ops.scan import CHUNK, scan


@config
class LightningConfig:
    kind: Literal["lightning"] = "lightning"
    n_heads: int
    head_dim: int | None = None  # None = d_model / n_heads
    norm_eps: float = 1e-6
    chunk: int = CHUNK

    def build(self, d_model: int, place: Place = ALONE) -> Lightning:
        return Lightning(d_model, self.width(d_model), self, place)

    def width(self, d_model: int) -> int:
        """K of a head. Raises ValueError for what cannot be built."""
        check_eps(self.norm_eps)
        if self.n_heads < 1 or (self.head_dim is None and d_model % self.n_heads):
            raise ValueError(f"d_model = {d_model} must be a multiple of n_heads = {self.n_heads}, or give head_dim")
        if self.chunk < 1 or (self.head_dim is not None and self.head_dim < 1):
            raise ValueError(f"chunk = {self.chunk} and head_dim = {self.head_dim} must be at least 1")
        return d_model // self.n_heads if self.head_dim is None else self.head_dim

    def cost(self, d_model: int) -> Cost:
        k, h = self.width(d_model), self.n_heads
        weights = 5 * d_model * h * k
        return Cost(weights + h * k, 2 * weights + h * (4 * k * k + 4 * self.chunk * k), fixed_state=h * k * k)


class Lightning(nn.Module):
    tp: ClassVar = None  # the norm runs over all heads, and the slopes are numbered over all heads

    def __init__(self, d_model: int, head_dim: int, cfg: LightningConfig, place: Place):
        super().__init__()
        self.head_dim, self.n_heads, self.chunk, self.eps = head_dim, cfg.n_heads, cfg.chunk, cfg.norm_eps
        self.depth = 1 - place.layer / max(place.n_layers - 1, 1) + 1e-5  # 1 in the first layer, about 0 in the last
        width = cfg.n_heads * head_dim
        self.q_proj = Linear(d_model, width, bias=False)
        self.k_proj = Linear(d_model, width, bias=False)
        self.v_proj = Linear(d_model, width, bias=False)
        self.g_proj = Linear(d_model, width, bias=False)
        self.o_proj = Linear(width, d_model, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(width))

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        return Memory.zeros(batch, device, dtype, S=(self.n_heads, self.head_dim, self.head_dim))

    def log_decay(self, x: Tensor) -> Tensor:
        """(1, T, H) constant -s_h."""
        heads = torch.arange(1, self.n_heads + 1, device=x.device, dtype=torch.float64)
        g = -(2.0 ** (-8 * heads / self.n_heads)) * self.depth
        return g.to(torch.promote_types(x.dtype, torch.float32)).expand(1, x.shape[1], -1)

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        marks = Marks.of(seq, state is not None)
        q, k, v = (
            F.silu(p(x)).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, T, H, K)
        k, g = marks.silence(k, self.log_decay(x))
        o, S = scan(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), g.transpose(1, 2),
            marks, None if state is None else state["S"], self.chunk,
        )  # fmt: skip
        if state is not None:
            state.write(S=S)
        o = o.transpose(1, 2).flatten(2)  # (B, T, H K)
        o = F.rms_norm(o, o.shape[-1:], eps=self.eps).to(x.dtype) * self.norm_weight
        return self.o_proj(self.g_proj(x).sigmoid() * o), {}
