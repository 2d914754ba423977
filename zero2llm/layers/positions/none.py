"""No position in attention (NoPE, 2305.19466): order is known through the causal mask, or through an embedding."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Seq


@config
class NoPositionConfig:
    kind: Literal["none"] = "none"

    def build(self, head_dim: int, n_heads: int = 1) -> NoPosition:
        return NoPosition()

    def saved(self, head_dim: int) -> int:
        return 0


class NoPosition(nn.Module):
    def forward(self, q: Tensor, k: Tensor, seq: Seq) -> tuple[Tensor, Tensor]:
        return q, k
