"""A learned vector per position, added to the token embedding.

    x_t = E[token_t] + P[pos_t]

Source: GPT-2 (wpe). Cost: max_len * D parameters; positions from max_len on do not exist. Shapes: (B, T) -> (B, T, D).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Seq
from zero2llm.layers.contract import Cost


@config
class LearnedConfig:
    kind: Literal["learned"] = "learned"

    def build(self, d_model: int, max_len: int) -> Learned:
        return Learned(d_model, max_len)

    def cost(self, d_model: int, max_len: int) -> Cost:
        return Cost(d_model * max_len)


class Learned(nn.Module):
    def __init__(self, d_model: int, max_len: int):
        super().__init__()
        self.table = nn.Embedding(max_len, d_model)

    def forward(self, seq: Seq) -> Tensor:
        return self.table(seq.pos)
