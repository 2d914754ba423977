"""LayerNorm: subtract the mean, divide by the standard deviation, scale and shift per channel.

    y = (x - mean(x)) / sqrt(var(x) + eps) * w + b           var is the biased one (divides by D)

Source: 1607.06450 eq. 4. Costs 2 D parameters. Shapes: (..., D) -> (..., D).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.layers.contract import Cost
from zero2llm.layers.norms.rms import check_eps


@config
class LayerNormConfig:
    kind: Literal["layer"] = "layer"
    eps: float = 1e-5
    bias: bool = True

    def build(self, d_model: int) -> LayerNorm:
        check_eps(self.eps, "eps")
        return LayerNorm(d_model, self.eps, self.bias)

    def cost(self, d_model: int) -> Cost:
        """Saved: the input, mean and deviation."""
        return Cost(d_model + self.bias * d_model, saved=d_model + 2)


class LayerNorm(nn.Module):
    def __init__(self, d_model: int, eps: float, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
