"""RWKV's channel mixing: a feed-forward network that also sees the token before.

    x^k = x_t + (x_(t-1) - x_t) * m          m_c one share for each channel; x_(t-1) = 0 at a document's start
    y   = W_down max(0, W_up x^k)^2

Source: RWKV-7 2503.14456 (RWKV-4 to 6 also gate y by a sigmoid). m starts as 1 - c / D, the first layer's value
in the authors' code, for a feed-forward layer does not know its depth.
Why: half a step of convolution for D parameters; with m = 0 it is mlp.py with relu2.
Cost: 2 D * hidden + D parameters, 4 D * hidden FLOPs per token; decoding keeps D values, the token before.
Shapes: (B, T, D) -> (B, T, D).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Aux, Seq
from zero2llm.layers.contract import Cost
from zero2llm.layers.linear import Linear
from zero2llm.layers.memory import Memory
from zero2llm.ops.conv import token_shift
from zero2llm.ops.marks import Marks


@config
class RWKVChannelConfig:
    kind: Literal["rwkv_channel"] = "rwkv_channel"
    hidden: int | None = None  # None = 4 D, as published

    def build(self, d_model: int) -> RWKVChannel:
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden = {self.hidden} must be positive")
        return RWKVChannel(d_model, 4 * d_model if self.hidden is None else self.hidden)

    def cost(self, d_model: int) -> Cost:
        weights = 2 * d_model * (4 * d_model if self.hidden is None else self.hidden)
        return Cost(weights + d_model, 2 * weights, fixed_state=d_model)


class RWKVChannel(nn.Module):
    tp: ClassVar = {"up_proj": "col", "down_proj": "row"}

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.d_model = d_model
        self.x_k = nn.Parameter(1 - torch.arange(d_model) / d_model)
        self.up_proj = Linear(d_model, hidden, bias=False)
        self.down_proj = Linear(hidden, d_model, bias=False)

    def init_state(self, batch: int, max_len: int, *, device=None, dtype=None) -> Memory:
        return Memory.zeros(batch, device, dtype, tail=(1, self.d_model))

    def forward(self, x: Tensor, seq: Seq, state: Memory | None = None) -> tuple[Tensor, Aux]:
        before, tail = token_shift(x, Marks.of(seq, state is not None), None if state is None else state["tail"])
        if state is not None:
            state.write(tail=tail)
        return self.down_proj(F.relu(self.up_proj(x + (before - x) * self.x_k)).square()), {}
