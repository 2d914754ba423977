"""RMSNorm: divide by the root mean square, scale per channel; no mean, no bias.

    y = x / sqrt(mean(x^2) + eps) * w                    plus_one: * (1 + w), w starts at 0

Source: 1910.07467 eq. 4; in half precision as Llama does: normalise in fp32, cast back, then multiply by w.
(1 + w) as in Gemma and Qwen3-Next, which multiply before they cast back; weight decay then pulls the scale to 1, not to 0.
Why: one reduction less than LayerNorm and D parameters instead of 2 D, at equal quality in practice.
Shapes: (..., D) -> (..., D).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.layers.contract import Cost


@config
class RMSNormConfig:
    kind: Literal["rms"] = "rms"
    eps: float = 1e-6
    plus_one: bool = False

    def build(self, d_model: int) -> RMSNorm:
        check_eps(self.eps, "eps")
        return RMSNorm(d_model, self.eps, self.plus_one)

    def cost(self, d_model: int) -> Cost:
        """Saved: the input, its root mean square and their quotient."""
        return Cost(d_model, saved=2 * d_model + 1)


def check_eps(eps: float, name: str = "norm_eps") -> None:
    """Raises ValueError for what would take the root of a negative number; 0 is allowed, as on paper."""
    if not eps >= 0:
        raise ValueError(f"{name} = {eps} must not be negative: it stands under a root")


class RMSNorm(nn.Module):
    def __init__(self, d_model: int, eps: float, plus_one: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model) if plus_one else torch.ones(d_model))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        if self.plus_one:
            wide = torch.promote_types(x.dtype, torch.float32)
            return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps).to(x.dtype)
        if x.dtype not in (torch.float16, torch.bfloat16):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
