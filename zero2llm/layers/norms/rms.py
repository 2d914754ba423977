"""RMSNorm: divide by the root mean square, scale per channel; no mean, no bias.

    y = x / sqrt(mean(x^2) + eps) * w

Source: 1910.07467 eq. 4; in half precision as Llama does: normalise in fp32, cast back, then multiply by w.
Why: one reduction less than LayerNorm and D parameters instead of 2 D, at equal quality in practice.
Shapes: (..., D) -> (..., D).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config


@config
class RMSNormConfig:
    kind: Literal["rms"] = "rms"
    eps: float = 1e-6

    def build(self, d_model: int) -> RMSNorm:
        return RMSNorm(d_model, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d_model)), eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
