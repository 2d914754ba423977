"""Dynamic tanh: no statistics at all; squash each value, scale and shift per channel.

    y = tanh(alpha x) * w + b                            alpha one learned number, 0.5 at the start

Source: 2503.10622 section 4 and algorithm 1. Why: a trained LayerNorm is nearly linear for most values and squashes the
few large ones, as a tanh does; no reduction over channels. Not scale-free: what comes in twice as large does not come
out the same, so the start of alpha matters (the paper lowers it for wide models: 0.2 to 1 by layer and width).
Costs 2 D + 1 parameters. Shapes: (..., D) -> (..., D).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.layers.contract import Cost


@config
class DyTConfig:
    kind: Literal["dyt"] = "dyt"
    alpha: float = 0.5

    def build(self, d_model: int) -> DyT:
        if self.alpha <= 0:
            raise ValueError(f"alpha = {self.alpha} must be positive, or nothing passes a dyt")
        return DyT(d_model, self.alpha)

    def cost(self, d_model: int) -> Cost:
        """Saved: the input and the tanh."""
        return Cost(2 * d_model + 1, saved=2 * d_model)


class DyT(nn.Module):
    def __init__(self, d_model: int, alpha: float):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))  # not a scalar: sharding needs a dimension
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias
