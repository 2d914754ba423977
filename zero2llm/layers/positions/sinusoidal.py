"""Fixed sines and cosines of the position, added to the token embedding.

    P[pos, 2m] = sin(pos / 10000^(2m/D)),   P[pos, 2m+1] = cos(pos / 10000^(2m/D))

Source: 1706.03762 section 3.5, interleaved as printed there (some libraries concatenate halves instead).
No parameters. Shapes: (B, T) -> (B, T, D).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from zero2llm.core.config import config
from zero2llm.core.seq import Seq
from zero2llm.layers.contract import Cost


@config
class SinusoidalConfig:
    kind: Literal["sinusoidal"] = "sinusoidal"

    def build(self, d_model: int, max_len: int) -> Sinusoidal:
        if d_model % 2:
            raise ValueError(f"sinusoidal positions pair channels: d_model = {d_model} must be even")
        return Sinusoidal(d_model)

    def cost(self, d_model: int, max_len: int) -> Cost:
        return Cost(0)


class Sinusoidal(nn.Module):
    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model

    def forward(self, seq: Seq) -> Tensor:
        channel = torch.arange(0, self.d_model, 2, device=seq.pos.device, dtype=torch.float32)
        theta = seq.pos[..., None] * 10_000.0 ** -(channel / self.d_model)  # (B, T, D/2)
        return torch.stack((theta.sin(), theta.cos()), -1).flatten(-2)
